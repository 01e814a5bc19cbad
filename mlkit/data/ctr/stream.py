"""What a recipe is given to learn clicks from: batches in the order of time, in three parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from jaxtyping import Float32, Int

from mlkit.errors import InvalidValueError, nearest

__all__ = [
    "CTRBatch",
    "CTRData",
    "CTRStream",
    "Split",
    "TestShare",
    "check_fractions",
    "check_split",
    "split_ends",
]

Split = Literal["train", "val", "test"]

TestShare = float | Literal["last_day"]
"""How much of the data is for testing: a share of the examples, or the last day."""


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
    """Labelled examples of several tables of ids, oldest first."""

    @property
    def name(self) -> str:
        """Name in reports."""
        ...

    @property
    def source(self) -> str:
        """Where the examples come from, with a hash of their content."""
        ...

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """Rows of each table."""
        ...

    @property
    def table_names(self) -> tuple[str, ...]:
        """What each table's ids are."""
        ...

    @property
    def num_dense(self) -> int:
        """Number of dense features."""
        ...

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
                    f"{name}: table {table!r} has the ids 0 .. {rows - 1}, got {wrong[0]}"
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
        raise InvalidValueError(
            f"no part {split!r} of the data; {nearest(str(split), get_args(Split))}"
        )


def split_ends(
    num_samples: int,
    val_fraction: float,
    test_fraction: TestShare,
    *,
    days: Sequence[int] | np.ndarray = (),
    times: np.ndarray | None = None,
) -> tuple[int, int]:
    """Where training and validation end when the last examples are for testing.

    Args:
        num_samples: Examples, oldest first.
        val_fraction: Share of all examples for validation, just before the test part.
        test_fraction: Share of all examples for testing, or "last_day".
        days: The first example of each day.
        times: When each happened, ascending. A part then begins with the first example of an
            instant, so that no instant is in two parts, and is longer by that.

    Raises:
        InvalidValueError: For a share out of range, "last_day" without two days, or if nothing is
            left for training.

    Example:
        >>> split_ends(10, 0.1, 0.2)
        (7, 8)
        >>> split_ends(10, 0.1, "last_day", days=[0, 5])
        (4, 5)
        >>> split_ends(5, 0.2, 0.2, times=np.array([1, 2, 2, 7, 7]))
        (1, 3)
    """
    check_fractions(val_fraction, test_fraction)
    if isinstance(test_fraction, str):
        if len(days) < 2:
            raise InvalidValueError(
                f"data.test_fraction=last_day needs two days, and the data name {len(days)}; give "
                "a share of the examples, such as 0.1"
            )
        val_end = int(days[-1])
    else:
        val_end = num_samples - round(test_fraction * num_samples)
    val_end = _first_of_instant(val_end, times)
    train_end = _first_of_instant(val_end - round(val_fraction * num_samples), times)
    if train_end < 1:
        raise InvalidValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing of "
            f"{num_samples} examples for training; lower them"
        )
    return train_end, val_end


def _first_of_instant(end: int, times: np.ndarray | None) -> int:
    if times is None or not 0 <= end < len(times):
        return end
    return int(np.searchsorted(times, times[end]))


def check_fractions(val_fraction: float, test_fraction: TestShare) -> None:
    """Raise for shares out of range.

    Raises:
        InvalidValueError: With what is allowed.
    """
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        is_named = key == "test_fraction" and value == "last_day"
        if not is_named and not (isinstance(value, int | float) and 0 <= value < 1):
            also = " or last_day" if key == "test_fraction" else ""
            raise InvalidValueError(f"data.{key} must be a number in [0, 1){also}, got {value!r}")
