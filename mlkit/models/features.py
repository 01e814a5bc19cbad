"""Penultimate features of any classifier: what its linear head sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlkit.errors import InvalidValueError

__all__ = ["extract_features"]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    head: str | None = None,
    get_input: Callable[[Any], Tensor] = lambda batch: batch["input"],
) -> Float[Tensor, "n features"]:
    """Return the input of the model's linear head for every example, in order, on the CPU.

    Args:
        model: Any module; it runs in evaluation mode on its own device and is left as it was.
        batches: Batches of inputs.
        head: Name of the head; the last `nn.Linear` if None.
        get_input: Takes the input tensor from a batch.

    Raises:
        InvalidValueError: If there is no such linear layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not layers or (head is not None and head not in layers):
        raise InvalidValueError(f"no linear layer {head!r} in the model; it has {list(layers)}")
    layer = layers[head] if head is not None else list(layers.values())[-1]
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(1).cpu()))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            model(get_input(batch).to(device))
    finally:
        hook.remove()
        model.train(was_training)
    return torch.cat(rows)
