"""GraNd in full: the norm of every example's gradient in all parameters of a small model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

__all__ = ["exact_grand"]


def exact_grand(
    model: nn.Module,
    inputs: Float[Tensor, "n ..."],
    targets: Int[Tensor, " n"],
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    chunk_size: int = 64,
) -> Float[Tensor, " n"]:
    """Return ||d loss_i / d theta||_2 for every example (Paul et al. 2021, arXiv 2107.07075).

    The score is the expectation over initialisations: average the results of several models. The
    memory is `chunk_size` times the trainable parameters. The model runs in evaluation mode (batch
    statistics would mix the examples) and is left as it was.

    Args:
        model: Maps (1, ...) inputs to (1, classes) logits.
        inputs: Examples on the model's device.
        targets: Their labels.
        loss_fn: Loss of a batch of one.
        chunk_size: Examples at once.
    """
    trainable = {k: v.detach() for k, v in model.named_parameters() if v.requires_grad}
    frozen = {k: v.detach() for k, v in model.named_parameters() if not v.requires_grad}
    fixed = {**frozen, **dict(model.named_buffers())}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(model, {**parameters, **fixed}, (x[None],))
        return loss_fn(logits, y[None])

    def norm(x: Tensor, y: Tensor) -> Tensor:
        gradients = grad(loss)(trainable, x, y)
        return torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()

    was_training = model.training
    model.eval()
    try:
        return vmap(norm, chunk_size=chunk_size)(inputs, targets)
    finally:
        model.train(was_training)
