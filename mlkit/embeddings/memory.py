"""Bytes of embedding tables and of their optimizer state, without torch.

All methods are compared at equal *bytes*: weights, optimizer state and whatever else a method needs
to find them. A fraction is one of the dense table with the same optimizer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Final

from mlkit.errors import InvalidTypeError, InvalidValueError, nearest

__all__ = [
    "OPTIMIZER_STATE",
    "MemoryReport",
    "dense_bytes",
    "optimizer_bytes",
    "parse_budget",
]

OPTIMIZER_STATE: Final[dict[str, tuple[int, int]]] = {
    "sgd": (0, 0),
    "rowwise_adagrad": (4, 0),
    "adagrad": (0, 1),
    "adam": (0, 2),
}
"""Name of an optimizer to (bytes per row, words of 4 bytes per weight) of its state.

Scalars such as torch's step counter, one per parameter, are not counted.
"""

_UNITS: Final[dict[str, int]] = {
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}


def parse_budget(budget: int | str | float, dense_bytes: int) -> int:
    """Read a memory budget.

    Args:
        budget: An integer: bytes. A string: bytes with a unit ("2GiB", "512 MB", "1.5GiB"). A float
            in (0, 1]: the fraction of `dense_bytes`, rounded down.
        dense_bytes: Bytes of the dense table (or tables) with the same optimizer.

    Returns:
        Bytes, at least 0; whether they suffice is for the caller to say.

    Raises:
        InvalidTypeError: For another type.
        InvalidValueError: For a number out of range or a string without a known unit.

    Example:
        >>> parse_budget(0.25, 1000), parse_budget("2KiB", 1000), parse_budget(700, 1000)
        (250, 2048, 700)
    """
    allowed = "bytes as an integer, a string such as '2GiB', or a fraction as a float in (0, 1]"
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise InvalidTypeError(f"memory_budget must be {allowed}, got {budget!r}")
    if isinstance(budget, str):
        return _parse_size(budget, allowed)
    if isinstance(budget, int):
        if budget < 1:
            raise InvalidValueError(f"memory_budget must be {allowed}, got {budget} bytes")
        return budget
    if not 0 < budget <= 1:
        raise InvalidValueError(
            f"memory_budget must be {allowed}, got {budget}; bytes are written as an integer"
        )
    return math.floor(budget * dense_bytes)


def _parse_size(text: str, allowed: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise InvalidValueError(
            f"memory_budget must be {allowed}, got {text!r}; units: B, KB, MB, GB, TB (powers of "
            "1000), KiB, MiB, GiB, TiB (powers of 1024)"
        )
    size = math.floor(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise InvalidValueError(f"memory_budget must be at least one byte, got {text!r}")
    return size


def optimizer_bytes(rows: int, dim: int, optimizer: str) -> int:
    """Bytes of optimizer state of a matrix of parameters; states are fp32 as in torch on fp32.

    Raises:
        InvalidValueError: For an optimizer that is not in `OPTIMIZER_STATE`.

    Example:
        >>> optimizer_bytes(10, 16, "rowwise_adagrad"), optimizer_bytes(10, 16, "adam")
        (40, 1280)
    """
    if optimizer not in OPTIMIZER_STATE:
        raise InvalidValueError(
            f"optimizer {optimizer!r} is unknown; {nearest(str(optimizer), OPTIMIZER_STATE)}"
        )
    per_row, words = OPTIMIZER_STATE[optimizer]
    return rows * (per_row + 4 * words * dim)


def dense_bytes(rows: int, dim: int, optimizer: str, element_size: int = 4) -> int:
    """Bytes of a dense table: weights of `element_size` bytes and optimizer state.

    Raises:
        InvalidValueError: For an optimizer that is not in `OPTIMIZER_STATE`.

    Example:
        >>> dense_bytes(1000, 16, "rowwise_adagrad")
        68000
    """
    return rows * dim * element_size + optimizer_bytes(rows, dim, optimizer)


@dataclass(frozen=True)
class MemoryReport:
    """What a table holds, in bytes; prints as a small table, and adds up over tables.

    Args:
        weight_bytes: Weights.
        optimizer_bytes: Optimizer state, as the table was told at construction.
        header_bytes: What is held per virtual row: addresses, masks, utilities.
        allocator_bytes: What is held per physical piece of storage: owners, free lists.
        other_bytes: Anything else: sketches, counters, scales.
        dense_bytes: The dense table with the same optimizer.
        dense_weight_bytes: The weights among `dense_bytes`.
    """

    weight_bytes: int
    optimizer_bytes: int
    header_bytes: int
    allocator_bytes: int
    other_bytes: int
    dense_bytes: int
    dense_weight_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that is held."""
        return (
            self.weight_bytes
            + self.optimizer_bytes
            + self.header_bytes
            + self.allocator_bytes
            + self.other_bytes
        )

    @property
    def byte_fraction(self) -> float:
        """`total_bytes` over `dense_bytes`: what counts."""
        return self.total_bytes / self.dense_bytes

    @property
    def weight_fraction(self) -> float:
        """`weight_bytes` over `dense_weight_bytes`: what papers often state."""
        return self.weight_bytes / self.dense_weight_bytes

    def __add__(self, other: MemoryReport) -> MemoryReport:
        return MemoryReport(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(MemoryReport))
        )

    def __str__(self) -> str:
        rows = [
            ("weights", self.weight_bytes),
            ("optimizer state", self.optimizer_bytes),
            ("headers", self.header_bytes),
            ("allocator", self.allocator_bytes),
            ("other", self.other_bytes),
            ("total", self.total_bytes),
            ("dense", self.dense_bytes),
        ]
        lines = [
            f"{name:<15}  {size:>18,} B  {100 * size / self.dense_bytes:6.2f} % of dense"
            for name, size in rows
        ]
        share = f"{100 * self.weight_fraction:.2f}"
        return "\n".join([*lines, f"weights alone: {share} % of the dense weights"])
