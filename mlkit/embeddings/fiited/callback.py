"""Dynamic embeddings under a Lightning trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.hooks import RemovableHandle

from mlkit.embeddings.fiited.density import AutoDensity
from mlkit.embeddings.fiited.distributed import exclude_from_broadcast
from mlkit.embeddings.fiited.optimizer import FusedEmbeddingOptimizer, dynamic_stores
from mlkit.embeddings.fiited.round import RoundStats
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.errors import InvalidValueError, RunError, nearest

__all__ = ["EmbeddingBudget"]


class EmbeddingBudget(L.Callback):
    """Runs the rounds of a model's dynamic embeddings, logs what they do, and adapts the density.

    Every store ends its step once for each step of the optimizer, however many batches that takes:
    an unfused store after the optimizer that trains its pool, whose states move with the chunks; a
    fused store with its `FusedEmbeddingOptimizer`, or, if `configure_optimizers` returned none,
    after the first optimizer. Validation and its sanity check change nothing but `auto_density`.

    Logged after each round: `embeddings/density/<table>`, and by the first table of each store
    `embeddings/churn/...`, `embeddings/threshold/...` and `embeddings/bytes/...`.

    Args:
        auto_density: Lowers the density while a metric allows it.
        metric: Name of that metric, as logged in validation.

    Raises:
        InvalidValueError: If only one of the two is given.

    Example:
        >>> callback = EmbeddingBudget()
        >>> trainer = L.Trainer(callbacks=[callback], logger=False)  # doctest: +SKIP
    """

    def __init__(
        self, *, auto_density: AutoDensity | None = None, metric: str | None = None
    ) -> None:
        if (auto_density is None) != (metric is None):
            raise InvalidValueError(
                "auto_density and metric belong together: which metric the density follows; got "
                f"auto_density={auto_density!r}, metric={metric!r}"
            )
        self.auto_density, self.metric = auto_density, metric
        self._stores: list[DynamicEmbeddingStore] = []
        self._logged: list[RoundStats | None] = []
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the stores for the load of a checkpoint and for DDP."""
        self._stores = dynamic_stores(pl_module)
        if trainer.world_size > 1:
            exclude_from_broadcast(pl_module)
        if self.auto_density is not None:
            for store in self._stores:
                store.follow_checkpoints = True
                if trainer.world_size > 1 and store.config.optimizer is None:
                    raise RunError(
                        "auto_density changes the pool's shape, which DDP does not follow: use a "
                        "fused optimizer, FIITEDConfig(optimizer=...)"
                    )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have every store step after an optimizer."""
        self._stores = dynamic_stores(pl_module)
        if not self._stores:
            raise InvalidValueError(
                f"{type(pl_module).__name__} has no dynamic embedding: call mlkit.convert(model, "
                "FIITEDConfig(...)) before the fit, or leave EmbeddingBudget out"
            )
        self._logged = [s.rounds[-1] if s.rounds else None for s in self._stores]
        driven = [
            store
            for optimizer in trainer.optimizers
            if isinstance(optimizer, FusedEmbeddingOptimizer)
            for store in optimizer.stores
        ]
        for store in self._stores:
            if store.config.optimizer is None:
                self._register(store, trainer.optimizers)
            elif not any(store is other for other in driven):
                self._undo.append(_step_after(trainer.optimizers[0], store).remove)

    def _register(
        self, store: DynamicEmbeddingStore, optimizers: list[torch.optim.Optimizer]
    ) -> None:
        for optimizer in optimizers:
            if any(p is store.pool for group in optimizer.param_groups for p in group["params"]):
                if store.register_optimizer(optimizer):
                    self._undo.append(functools.partial(store.unregister_optimizer, optimizer))
                return
        raise InvalidValueError(
            f"no optimizer of the trainer trains the pool of {store.tables.specs[0].name}: give "
            "model.parameters() to one, or use a fused optimizer (FIITEDConfig(optimizer=...))"
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        for undo in self._undo:
            undo()
        self._undo = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log the rounds."""
        for number, store in enumerate(self._stores):
            last = store.rounds[-1] if store.rounds else None
            if last is None or last is self._logged[number]:
                continue
            self._logged[number] = last
            name = store.tables.specs[0].name
            values = {
                f"embeddings/churn/{name}": last.churn,
                f"embeddings/threshold/{name}": last.threshold,
                f"embeddings/bytes/{name}": float(store.memory_report().total_bytes),
            }
            for table, spec in enumerate(store.tables.specs):
                resident = store.resident(store.tables.rows_of(table))
                values[f"embeddings/density/{spec.name}"] = float(resident.float().mean())
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let `auto_density` decide."""
        auto, metric = self.auto_density, self.metric
        if auto is None or metric is None or trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            return
        found = trainer.callback_metrics.get(metric)
        if found is None:
            raise InvalidValueError(
                f"EmbeddingBudget(metric={metric!r}) was not logged in validation; "
                f"{nearest(metric, trainer.callback_metrics)}"
            )
        value = float(trainer.strategy.reduce(found, reduce_op="mean"))
        before = self.density
        after = auto.update(value, before)
        if after != before:
            for store in self._stores:
                store.retarget(min(store.density_of(store.budget) * after / before, 1.0))

    @property
    def density(self) -> float:
        """Chunks that may be resident, of all chunks of all stores."""
        return sum(s.budget for s in self._stores) / sum(s.num_chunks for s in self._stores)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `auto_density`; the rest is in the stores."""
        return {} if self.auto_density is None else {"auto": self.auto_density.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of `auto_density`."""
        if self.auto_density is not None and "auto" in state_dict:
            self.auto_density.load_state_dict(state_dict["auto"])


def _step_after(optimizer: torch.optim.Optimizer, store: DynamicEmbeddingStore) -> RemovableHandle:
    def after(*_: Any) -> None:
        store.step()

    return optimizer.register_step_post_hook(after)
