"""A LightningModule for Hugging Face networks on text, and how they are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlkit.errors import InvalidValueError

__all__ = ["TransformerModule", "classification_accuracy", "language_model_loss"]

Batch = dict[str, Tensor]


class TransformerModule(L.LightningModule):
    """The network's own loss, with a linear warm-up and a linear decay to 0 per step.

    Args:
        net: Takes a batch as keyword arguments and returns an object with `loss` and `logits`, as
            Hugging Face's models do.
        optimizer: Called with the parameters that want a gradient.
        warmup_fraction: Share of the steps in which the learning rate rises, in [0, 1]; 0.06 is the
            LTE paper's (arXiv 2402.06126).

    Raises:
        InvalidValueError: For a fraction out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        warmup_fraction: float = 0.06,
    ) -> None:
        if not 0 <= warmup_fraction <= 1:
            raise InvalidValueError(f"warmup_fraction must be in [0, 1], got {warmup_fraction!r}")
        super().__init__()
        self.net = net
        self._optimizer = optimizer
        self._warmup_fraction = warmup_fraction

    def forward(self, **batch: Tensor) -> Any:
        """Return what the network returns."""
        return self.net(**batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule over all steps of the fit.

        Raises:
            InvalidValueError: If the trainer has no last step.
        """
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InvalidValueError("the learning rate falls to 0 at the last step; set max_steps")
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        warmup = math.ceil(self._warmup_fraction * steps)

        def factor(step: int) -> float:
            rising = (step + 1) / max(warmup, 1)
            return min(rising, (steps - step) / max(steps - warmup, 1), 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def language_model_loss(net: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean cross entropy in nats of all predicted tokens, each counted once, whatever its batch.

    The network runs in evaluation mode on its own device and is left as it was.

    Args:
        net: Takes `input_ids` (and `attention_mask` where the batch has one); returns `logits`.
        batches: `{"input_ids", "labels"}`, (batch, seq) each; the label of a token is predicted
            from the tokens before it, and -100 is not counted.

    Raises:
        InvalidValueError: If there is no token to predict.
    """
    total, count = 0.0, 0
    with _evaluating(net) as device:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            targets = batch["labels"][:, 1:].to(device)
            logits = net(**inputs).logits[:, :-1].float()
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            total += float(losses)
            count += int((targets != -100).sum())
    if not count:
        raise InvalidValueError("there is no token to predict in these batches")
    return total / count


@torch.no_grad()
def classification_accuracy(net: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of right predictions in [0, 1].

    The network runs in evaluation mode on its own device and is left as it was.

    Args:
        net: Takes the batch without its labels; returns `logits` (batch, classes).
        batches: `{"input_ids", "attention_mask", "labels"}`.

    Raises:
        InvalidValueError: If there is no example.
    """
    right, count = 0, 0
    with _evaluating(net) as device:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            predicted = net(**inputs).logits.argmax(-1).cpu()
            right += int((predicted == batch["labels"].cpu()).sum())
            count += len(predicted)
    if not count:
        raise InvalidValueError("there is no example in these batches")
    return right / count


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[torch.device]:
    """Every module in evaluation mode, and each back in its own mode afterwards."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield next(net.parameters()).device
    finally:
        for module, mode in modes.items():
            module.training = mode
