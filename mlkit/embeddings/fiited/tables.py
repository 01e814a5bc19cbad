"""Tables of one dimension that share a header and a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["TableSpec", "Tables"]


@dataclass(frozen=True)
class TableSpec:
    """One table.

    Args:
        name: Used in messages, logs and reports.
        num_embeddings: Virtual rows, at least 1.
        padding_idx: A row that is never resident and never counted, or None.
    """

    name: str
    num_embeddings: int
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        rows = self.num_embeddings
        if isinstance(rows, bool) or not isinstance(rows, int):
            raise InvalidTypeError(f"num_embeddings must be an integer, got {rows!r}")
        if rows < 1:
            raise InvalidValueError(f"num_embeddings must be at least 1, got {rows} ({self.name})")
        if self.padding_idx is not None and not -rows <= self.padding_idx < rows:
            raise InvalidValueError(
                f"padding_idx must be in [-{rows}, {rows}), got {self.padding_idx} ({self.name})"
            )
        if self.padding_idx is not None and self.padding_idx < 0:
            object.__setattr__(self, "padding_idx", self.padding_idx + rows)


class Tables:
    """Tables one after the other in a header.

    Args:
        specs: At least one; names must differ.
        spare: Whether each table has one row more, behind its own, that never gets storage: where
            lookups of unknown ids go.
    """

    def __init__(self, specs: Sequence[TableSpec], *, spare: bool = False) -> None:
        self.specs = tuple(specs)
        if not self.specs:
            raise InvalidValueError("a store needs at least one table")
        names = [s.name for s in self.specs]
        if len(set(names)) < len(names):
            raise InvalidValueError(f"tables must have names of their own, got {names}")
        self.first: list[int] = []
        self.num_rows = 0
        for spec in self.specs:
            self.first.append(self.num_rows)
            self.num_rows += spec.num_embeddings + spare
        self.spare_rows: list[int] = []
        if spare:
            self.spare_rows = [
                first + s.num_embeddings for first, s in zip(self.first, self.specs, strict=True)
            ]
        self._metadata: dict[tuple[int, ...], Tensor] = {}

    def _tensor(self, numbers: Sequence[int]) -> Int[Tensor, "tables 3"]:
        rows = []
        for number in numbers:
            spec = self.specs[number]
            padding = -1 if spec.padding_idx is None else spec.padding_idx
            size = spec.num_embeddings + bool(self.spare_rows)
            rows.append([self.first[number], size, padding])
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def rows_of(self, number: int) -> slice:
        """Return the header's rows of a table, without the spare one."""
        first = self.first[number]
        return slice(first, first + self.specs[number].num_embeddings)

    def metadata(self, numbers: tuple[int, ...] | None = None) -> Int[Tensor, "tables 3"]:
        """Return what the kernels take of some tables; of all by default."""
        numbers = tuple(range(len(self.specs))) if numbers is None else numbers
        found = self._metadata.get(numbers)
        if found is None:
            found = self._metadata[numbers] = self._tensor(numbers)
        return found

    @property
    def padding_rows(self) -> list[int]:
        """The header's rows that are padding."""
        return [
            first + spec.padding_idx
            for first, spec in zip(self.first, self.specs, strict=True)
            if spec.padding_idx is not None
        ]

    @property
    def empty_rows(self) -> list[int]:
        """The header's rows that never get storage."""
        return self.padding_rows + self.spare_rows
