"""What a recipe is given to learn clicks from: batches in the order of time, in three parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from jaxtyping import Float32, Int

from mlkit.errors import InvalidValueError, nearest

__all__ = ["CTRBatch", "CTRData", "CTRStream", "Split", "check_split", "split_ends"]

Split = Literal["train", "val", "test"]


class CTRBatch(NamedTuple):
    """Examples in the order of time, as NumPy arrays.

    Attributes:
        dense: float32.
        sparse: The id in each table, 0 .. rows - 1.
        label: 0 or 1, float32.
    """

    dense: Float32[np.ndarray, "batch features"]
    sparse: Int[np.ndarray, "batch tables"]
    label: Float32[np.ndarray, " batch"]


class CTRStream(Protocol):
    """Labelled examples of several tables of ids, oldest first.

    Attributes:
        name: Name in reports.
        source: Where the examples come from, with a hash of their content.
        table_sizes: Rows of each table.
        table_names: What each table's ids are.
        num_dense: Number of dense features.
    """

    name: str
    source: str
    table_sizes: tuple[int, ...]
    table_names: tuple[str, ...]
    num_dense: int

    def batches(self, split: Split, batch_size: int) -> Iterator[CTRBatch]:
        """The examples of "train", "val" or "test"; the last batch may be short."""
        ...

    def num_samples(self, split: Split) -> int:
        """How many examples a part has; of a file, malformed rows are counted in."""
        ...


class CTRData:
    """A `CTRStream` in memory.

    Args:
        name: Name in reports.
        source: Where the examples come from, with a hash of their content.
        dense: One row per example, oldest first.
        sparse: The ids, one column per table.
        label: 0 or 1.
        table_sizes: Rows of each table.
        table_names: What each table's ids are.
        ends: Where training ends and validation ends; the rest is the test part.

    Raises:
        InvalidValueError: If the arrays do not fit together, or an id is not in its table; the
            message names the table and the id.
    """

    def __init__(
        self,
        *,
        name: str,
        source: str,
        dense: Float32[np.ndarray, "n features"],
        sparse: Int[np.ndarray, "n tables"],
        label: Float32[np.ndarray, " n"],
        table_sizes: Sequence[int],
        table_names: Sequence[str],
        ends: tuple[int, int],
    ) -> None:
        if not len(dense) == len(sparse) == len(label):
            raise InvalidValueError(
                f"{name}: {len(dense)} rows of dense features, {len(sparse)} of ids and "
                f"{len(label)} labels; there must be as many of each"
            )
        if not sparse.shape[1] == len(table_sizes) == len(table_names):
            raise InvalidValueError(
                f"{name}: {sparse.shape[1]} columns of ids, {len(table_sizes)} sizes and "
                f"{len(table_names)} names of tables; there must be as many of each"
            )
        for column, (table, rows) in enumerate(zip(table_names, table_sizes, strict=True)):
            ids = sparse[:, column]
            wrong = ids[(ids < 0) | (ids >= rows)]
            if len(wrong):
                raise InvalidValueError(
                    f"{name}: id {wrong[0]} is not in table {table!r}, whose ids are 0 .. {rows - 1}"
                )
        if not 0 <= ends[0] <= ends[1] <= len(label):
            raise InvalidValueError(
                f"{name}: the parts of {len(label)} examples cannot end at {ends}"
            )
        self.name, self.source = name, source
        self.dense, self.sparse, self.label = dense, sparse, label
        self.table_sizes, self.table_names = tuple(table_sizes), tuple(table_names)
        self.num_dense = dense.shape[1]
        self.ends = ends

    def part(self, split: Split) -> CTRBatch:
        """All examples of "train", "val" or "test", without a copy.

        Raises:
            InvalidValueError: For another name.
        """
        rows = self.rows(split)
        return CTRBatch(self.dense[rows], self.sparse[rows], self.label[rows])

    def rows(self, split: Split) -> slice:
        """Which examples a part is."""
        check_split(split)
        train, val = self.ends
        parts = {"train": (0, train), "val": (train, val), "test": (val, len(self.label))}
        return slice(*parts[split])

    def num_samples(self, split: Split) -> int:
        """How many examples a part has."""
        return len(self.label[self.rows(split)])

    def batches(self, split: Split, batch_size: int) -> Iterator[CTRBatch]:
        """The examples of a part in the order of time; the last batch may be short.

        Raises:
            InvalidValueError: For another part, or a size below 1.
        """
        whole = self.part(split)
        if batch_size < 1:
            raise InvalidValueError(f"batch_size must be at least 1, got {batch_size}")
        return (
            CTRBatch(*(array[start : start + batch_size] for array in whole))
            for start in range(0, len(whole.label), batch_size)
        )


def check_split(split: str) -> None:
    """Raise for what is not the name of a part.

    Raises:
        InvalidValueError: With the names that there are.
    """
    if split not in get_args(Split):
        raise InvalidValueError(f"no part {split!r} of the data; {nearest(split, get_args(Split))}")


def split_ends(
    num_samples: int,
    val_fraction: float,
    test_fraction: float,
    times: Sequence[int] | np.ndarray | None = None,
) -> tuple[int, int]:
    """Where training and validation end when the last examples are for testing.

    Args:
        num_samples: Examples, oldest first.
        val_fraction: Share of all examples for validation, just before the test part.
        test_fraction: Share of all examples for testing.
        times: When each happened, ascending. A part then begins no later than its share says, with
            the first example of an instant, so that no instant is in two parts.

    Example:
        >>> split_ends(10, 0.1, 0.2)
        (7, 8)
        >>> split_ends(5, 0.2, 0.2, times=[1, 2, 2, 7, 7])
        (1, 3)
    """
    test = num_samples - round(test_fraction * num_samples)
    val = test - round(val_fraction * num_samples)
    ends = max(val, 0), test
    if times is not None and num_samples:
        instants = np.asarray(times)
        first, second = (
            int(np.searchsorted(instants, instants[end])) if end < num_samples else end
            for end in ends
        )
        return first, second
    return ends
