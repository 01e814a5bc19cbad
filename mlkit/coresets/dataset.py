"""Map-style data sets for coresets: one that tells its indices, one that is the coreset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset

from mlkit.coresets.selection import Selection
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["CoresetSubset", "IndexedDataset", "IndexedItem"]


class IndexedItem(NamedTuple):
    """An example and its position; a batch of them collates to the same pair."""

    index: Any
    item: Any


class IndexedDataset(Dataset[IndexedItem]):
    """Yield `IndexedItem(index, item)` for any map-style data set.

    Args:
        dataset: A data set with a length.

    Raises:
        InvalidTypeError: For an iterable-style data set.

    Example:
        >>> IndexedDataset(["a", "b"])[1]
        IndexedItem(index=1, item='b')
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = _map_style(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> IndexedItem:
        return IndexedItem(index, self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[IndexedItem]:
        """Fetch a batch at once, through the data set's own `__getitems__` where it has one."""
        many = getattr(self.dataset, "__getitems__", None)
        items = many(indices) if many else [self.dataset[i] for i in indices]
        return [IndexedItem(i, item) for i, item in zip(indices, items, strict=True)]


class CoresetSubset(Subset[Any]):
    """The chosen part of a data set, with the account of how it was chosen.

    For a Hugging Face data set, `dataset.select(selection.indices)` does the same natively.

    Args:
        dataset: The full map-style data set that was scored.
        selection: What a selector returned for it.

    Attributes:
        indices: Chosen positions, ascending.
        report: The selection's report.

    Raises:
        InvalidValueError: If the data set's length is not that which was selected from.
        InvalidTypeError: For an iterable-style data set.
    """

    indices: Sequence[int]

    def __init__(self, dataset: Any, selection: Selection) -> None:
        size = len(_map_style(dataset))
        if size != selection.report["num_samples"]:
            raise InvalidValueError(
                f"the selection was made from {selection.report['num_samples']} examples and the "
                f"data set has {size}; select from the data set that you train on"
            )
        super().__init__(dataset, np.asarray(selection.indices))  # type: ignore[arg-type]
        self.report = selection.report

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, list):
            return self.dataset[[int(self.indices[i]) for i in idx]]
        return self.dataset[int(self.indices[idx])]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Fetch a batch at once, through the data set's own `__getitems__` where it has one."""
        rows = [int(self.indices[i]) for i in indices]
        many = getattr(self.dataset, "__getitems__", None)
        return many(rows) if many else [self.dataset[i] for i in rows]


def _map_style(dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InvalidTypeError(
            f"{type(dataset).__name__} has no length or positions. A stream can be pruned in two "
            "passes: score it once keeping (id, score) per example, choose ids with a selector on "
            "those arrays, then filter the second pass by id"
        )
    return dataset
