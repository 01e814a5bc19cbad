"""Lightning glue: a module that takes indexed batches, a data module that trains on a coreset."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from mlkit.coresets.dataset import CoresetSubset, IndexedItem
from mlkit.coresets.selection import Selection
from mlkit.errors import InvalidTypeError

__all__ = ["CoresetDataModule", "IndexedStepMixin"]


class IndexedStepMixin:
    """Let any LightningModule train on an `IndexedDataset` without changing its `training_step`.

    The batch reaches `training_step` as the inner data set would have given it; the indices are
    kept in `coreset_indices`, where `TrainingDynamics` finds them. Put it before the module's
    class: `class Model(IndexedStepMixin, MyModule): ...`.
    """

    coreset_indices: Tensor | None = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep the indices of an indexed batch and pass the rest on."""
        self.coreset_indices = None
        if isinstance(batch, IndexedItem):
            self.coreset_indices, batch = batch.index, batch.item
        return super().on_after_batch_transfer(batch, dataloader_idx)  # type: ignore[misc]


class CoresetDataModule(L.LightningDataModule):
    """Any data module, with its training data reduced to a coreset.

    The training dataloader keeps its batch size, workers, collate function and the like, and
    shuffles (`drop_last` only where a batch is left); everything else is the inner module's.

    Args:
        datamodule: The data module of the full data set.
        selection: A selection from its training data.
    """

    def __init__(self, datamodule: L.LightningDataModule, selection: Selection) -> None:
        super().__init__()
        self.inner = datamodule
        self.selection = selection

    def prepare_data(self) -> None:
        """Prepare the inner data module."""
        self.inner.prepare_data()

    def setup(self, stage: str) -> None:
        """Set the inner data module up."""
        self.inner.trainer = self.trainer
        self.inner.setup(stage)

    def teardown(self, stage: str) -> None:
        """Tear the inner data module down."""
        self.inner.teardown(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """The inner training dataloader over the coreset."""
        full = self.inner.train_dataloader()
        if not isinstance(full, DataLoader) or full.batch_size is None:
            raise InvalidTypeError(
                "CoresetDataModule needs a train_dataloader that is one DataLoader with a "
                f"batch_size, got {type(full).__name__}; build yours over "
                "CoresetSubset(dataset, selection)"
            )
        if not isinstance(full.sampler, RandomSampler | SequentialSampler):
            raise InvalidTypeError(
                f"the inner train_dataloader samples by {type(full.sampler).__name__}, which knows "
                "nothing of the coreset; build your own over CoresetSubset(dataset, selection)"
            )
        subset = CoresetSubset(full.dataset, self.selection)
        return DataLoader(
            subset,
            batch_size=full.batch_size,
            shuffle=True,
            num_workers=full.num_workers,
            collate_fn=full.collate_fn,
            pin_memory=full.pin_memory,
            drop_last=full.drop_last and len(subset) >= full.batch_size,
            timeout=full.timeout,
            worker_init_fn=full.worker_init_fn,
            generator=full.generator,
            persistent_workers=full.persistent_workers,
        )

    def val_dataloader(self) -> Any:
        """The inner validation data."""
        return self.inner.val_dataloader()

    def test_dataloader(self) -> Any:
        """The inner test data."""
        return self.inner.test_dataloader()

    def predict_dataloader(self) -> Any:
        """The inner prediction data."""
        return self.inner.predict_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The inner module's hook."""
        return self.inner.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """The inner module's hook."""
        return self.inner.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The inner module's hook."""
        return self.inner.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """The inner module's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the inner module's state."""
        self.inner.load_state_dict(state_dict)
