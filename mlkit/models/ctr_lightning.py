"""A LightningModule for click-through rates: tables and dense layers have their own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from mlkit.errors import InvalidValueError

__all__ = ["CTRModule", "ctr_quality", "split_parameters"]

Batch = dict[str, Tensor]
Made = torch.optim.Optimizer | list[torch.optim.Optimizer]
Optimizer = Callable[[Iterable[nn.Parameter]], Made]


def split_parameters(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What wants a gradient outside the tables, and inside.

    Tables that train themselves (no parameter of theirs wants a gradient) give an empty list.

    Args:
        net: A network with its tables in `net.tables`.
    """
    inside = {id(p) for p in net.get_submodule("tables").parameters()}
    wanted = [p for p in net.parameters() if p.requires_grad]
    return [p for p in wanted if id(p) not in inside], [p for p in wanted if id(p) in inside]


class CTRModule(L.LightningModule):
    """Binary cross entropy on dict batches `{"dense", "sparse", "label"}`.

    Optimization is manual: both optimizers step once per batch. There is no schedule.
    `ctr_quality` measures the network.

    Args:
        net: Maps (dense, sparse) to logits; its tables are in `net.tables`.
        dense_optimizer: Called with the parameters outside the tables.
        table_optimizer: Called with those of the tables, where any wants a gradient; it has to take
            sparse gradients if the tables give such. It may return a list of optimizers.
    """

    def __init__(
        self, net: nn.Module, dense_optimizer: Optimizer, table_optimizer: Optimizer
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self._make = (dense_optimizer, table_optimizer)

    def forward(
        self, dense: Float[Tensor, "batch features"], sparse: Int[Tensor, "batch tables"]
    ) -> Float[Tensor, " batch"]:
        """Return the logits."""
        return self.net(dense, sparse)

    def training_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Step both optimizers; return `{"loss", "logits"}`, the logits from before the step."""
        logits = self(batch["dense"], batch["sparse"])
        loss = F.binary_cross_entropy_with_logits(logits, batch["label"])
        optimizers = self.optimizers()
        both = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in both:
            optimizer.step()
        return {"loss": loss.detach(), "logits": logits.detach()}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those outside the tables and inside, or the first alone."""
        parts = split_parameters(self.net)
        made = [make(part) for make, part in zip(self._make, parts, strict=True) if part]
        return [o for one in made for o in (one if isinstance(one, list) else [one])]


@torch.no_grad()
def ctr_quality(net: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Exact AUC and mean log loss in nats, over all examples.

    The network runs in evaluation mode on its own device and is left as it was.

    Args:
        net: Maps (dense, sparse) to logits.
        batches: `{"dense", "sparse", "label"}`.

    Returns:
        `{"auc", "log_loss"}`.

    Raises:
        InvalidValueError: If the labels are all the same, or there is none: there is no AUC then.
    """
    modes = {module: module.training for module in net.modules()}
    device = next(net.parameters()).device
    logits, labels = [], []
    net.eval()
    try:
        for batch in batches:
            logits.append(net(batch["dense"].to(device), batch["sparse"].to(device)).cpu().float())
            labels.append(batch["label"].cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    label = torch.cat(labels) if labels else torch.empty(0)
    if not 0 < label.sum() < len(label):
        raise InvalidValueError(
            f"{int(label.sum())} of {len(label)} examples are clicks; AUC needs both kinds: make "
            "the part longer"
        )
    scores = torch.cat(logits)
    return {
        "auc": float(binary_auroc(scores, label.int())),
        "log_loss": float(F.binary_cross_entropy_with_logits(scores, label)),
    }
