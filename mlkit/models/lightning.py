"""A LightningModule for classification with a cosine schedule per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

__all__ = ["Classifier", "accuracy"]


class Classifier(L.LightningModule):
    """Cross entropy on dict batches `{"input", "label"}`.

    `training_step` returns the logits beside the loss, as recording callbacks expect.

    Args:
        net: Maps inputs to logits.
        optimizer: Called with the parameters.
        min_lr: Learning rate at the last step; the schedule is a cosine over `trainer.max_steps`.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        min_lr: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = net
        self._optimizer = optimizer
        self._min_lr = min_lr

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self(batch["input"])
        return {"loss": nn.functional.cross_entropy(logits, batch["label"]), "logits": logits}

    def configure_optimizers(self) -> Any:
        """The optimizer and its cosine schedule."""
        optimizer = self._optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=self.trainer.max_steps, eta_min=self._min_lr
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[dict[str, Tensor]], num_classes: int) -> float:
    """Share of right predictions in [0, 1], over every example once, on this process alone."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for batch in batches:
        logits.append(model(batch["input"].to(device)).cpu())
        labels.append(batch["label"])
    model.train(was_training)
    return float(
        multiclass_accuracy(torch.cat(logits), torch.cat(labels), num_classes, average="micro")
    )
