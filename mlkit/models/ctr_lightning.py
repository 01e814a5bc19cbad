"""A LightningModule for click-through rates: one optimizer for the tables, one for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CTRModule"]


class CTRModule(L.LightningModule):
    """Binary cross entropy on clicks, optimised by hand: tables and layers have rules of their own.

    The trainer counts the steps of the layers' optimizer.

    Args:
        net: Takes dense features and ids, returns logits; its tables are in `net.tables`.
        table_optimizer: Called with the network; returns the optimizer of its tables.
        lr: Of Adam on everything else.

    Attributes:
        last_logits: Of the last training batch, before its update: a forecast of labels that the
            network had not seen.
    """

    def __init__(
        self,
        net: nn.Module,
        table_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self._table_optimizer, self._lr = table_optimizer, lr
        self.last_logits: Tensor | None = None

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(dense, sparse)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Train on a batch and return its loss."""
        layers, tables = self.optimizers()  # type: ignore[misc]
        layers.zero_grad()
        tables.zero_grad()
        logits = self.net(batch["dense"], batch["sparse"])
        loss = F.binary_cross_entropy_with_logits(logits, batch["label"])
        self.manual_backward(loss)
        tables.optimizer.step()  # not through Lightning, which would count it as a step of its own
        layers.step()
        self.last_logits = logits.detach()
        return loss

    def configure_optimizers(self) -> Any:
        """The layers' optimizer, then the tables'."""
        tables = {id(p) for p in self.net.tables.parameters()}
        rest = [p for p in self.net.parameters() if id(p) not in tables]
        return [torch.optim.Adam(rest, lr=self._lr), self._table_optimizer(self.net)]
