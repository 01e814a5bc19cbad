"""The batches of a `CTRStream` as dicts of tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mlkit.data.ctr.stream import CTRBatch, CTRStream, Split

__all__ = ["CTRBatches", "ctr_loader", "to_tensors"]


def to_tensors(batch: CTRBatch) -> dict[str, Tensor]:
    """`{"dense", "sparse", "label"}`: float32, int64 and float32."""
    return {
        "dense": torch.from_numpy(batch.dense),
        "sparse": torch.from_numpy(batch.sparse).long(),
        "label": torch.from_numpy(batch.label),
    }


class CTRBatches(IterableDataset[dict[str, Tensor]]):
    """One part of a stream, batch by batch, in the order of time.

    Args:
        stream: What to read.
        split: Which part.
        batch_size: Examples per batch; the last one may be short.
    """

    def __init__(self, stream: CTRStream, split: Split, batch_size: int) -> None:
        self.stream, self.split, self.batch_size = stream, split, batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(to_tensors, self.stream.batches(self.split, self.batch_size))


def ctr_loader(stream: CTRStream, split: Split, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """A dataloader over `CTRBatches`, in the main process: workers would each read all of it."""
    return DataLoader(CTRBatches(stream, split, batch_size), batch_size=None)
