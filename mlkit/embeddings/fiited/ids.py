"""From ids to rows: hashed, or exact with a table of keys.

"hash" mixes an id's 64 bits and takes them modulo the rows: no memory, and collisions share a row.
"exact" gives every id a row of its own. Its keys lie in an open-addressing table whose places *are*
the rows, 8 bytes each: id x tries the rows h(x) + i s(x) modulo the rows, i = 0, 1, ..., with a
step s(x) that has no divisor in common with the rows, so that it visits all of them; only the first
`PROBES` are tried (our decision), so that a large table turns ids away when it is nearly full.

Ids that an exact table does not hold read as zeros. In training they are collected and get their
rows after the step, in sorted order and on all ranks alike. A lookup sends them to the *spare* row
behind the table's rows, which never gets storage and earns no utility.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mlkit.embeddings.fiited.tables import Tables
from mlkit.embeddings.id_hash import mix

__all__ = ["PROBES", "ExactIds", "hash_rows", "table_of"]

PROBES: Final = 128
_BLOCKS: Final = ((0, 4), (4, 32), (32, PROBES))  # probes that are made at once
_STEPS: Final = 64  # different steps of a table
_LOWEST: Final = -(1 << 63)
_FREE, _DELETED = 0, 1  # keys are ids with the highest bit turned; these two are of no id


def table_of(
    num_ids: int, num_tables: int, offsets: Tensor | None, device: torch.device
) -> Int[Tensor, " n"]:
    """Return the table of each id of a lookup in all tables, whose bags are ordered by table."""
    tables = torch.arange(num_tables, device=device)
    if offsets is None:
        return tables.repeat_interleave(num_ids // num_tables)
    ends = offsets[:: (len(offsets) - 1) // num_tables] if len(offsets) > 1 else offsets
    return tables[: len(ends) - 1].repeat_interleave(ends.diff(), output_size=num_ids)


class _Columns:
    """What is known of the table of each id, as tensors that broadcast with the ids."""

    def __init__(self, tables: Tables, number: int | Tensor, device: torch.device) -> None:
        self.first, self.size, self.padding = tables.columns(device)[:, number].unbind()


def hash_rows(
    tables: Tables, ids: Int[Tensor, " n"], number: int | Int[Tensor, " n"], seed: int
) -> Int[Tensor, " n"]:
    """Rows within their tables for any ids; the row of the padding is left to the padding.

    Args:
        tables: Whose rows.
        ids: Any 64-bit integers.
        number: Number of the table, one for all ids or one each.
        seed: Another seed, other collisions.
    """
    ids = ids.long()
    of = _Columns(tables, number, ids.device)
    padded = of.padding >= 0
    rows = mix(ids, seed) % (of.size - padded.long()).clamp_min(1)
    rows = rows + (padded & (rows >= of.padding)).long()
    return torch.where(padded & (ids == of.padding), of.padding, rows)


class ExactIds:
    """The table of keys of `id_map="exact"`.

    Args:
        tables: With a spare row behind each table.
        keys: int64, one for each row of the header; changed in place.
        seed: Of the hashing.
    """

    def __init__(self, tables: Tables, keys: Int[Tensor, " rows"], seed: int) -> None:
        self._tables, self.keys, self._seed = tables, keys, seed
        steps = [_coprime(s.num_embeddings) for s in tables.specs]
        self._steps = torch.tensor(steps, device=keys.device)

    def clear(self) -> None:
        """Forget all ids."""
        self.keys.zero_()
        for first, spec in zip(self._tables.first, self._tables.specs, strict=True):
            if spec.padding_idx is not None:
                self.keys[first + spec.padding_idx] = spec.padding_idx ^ _LOWEST

    def find(self, ids: Int[Tensor, " n"], number: int | Tensor) -> Int[Tensor, " n"]:
        """Return the row of each id within its table; of an unknown id, the spare row."""
        ids = ids.long()
        of = _Columns(self._tables, number, ids.device)
        rows = of.size.expand_as(ids).clone()
        open_ = torch.arange(len(ids), device=ids.device)
        for start, stop in _BLOCKS:
            places = self._places(ids, number, start, stop, open_)
            found = self.keys[places]
            hit = found == (ids[open_] ^ _LOWEST).unsqueeze(1)
            hit &= (found != _FREE) & (found != _DELETED)
            is_hit = hit.any(1)
            at = places.gather(1, hit.long().argmax(1, keepdim=True)).squeeze(1)
            first = of.first.expand_as(ids)[open_]
            rows[open_[is_hit]] = (at - first)[is_hit]
            open_ = open_[~is_hit & ~(found == _FREE).any(1)]
            if not len(open_):
                break
        return torch.where((of.padding >= 0) & (ids == of.padding), of.padding, rows)

    def insert(
        self, ids: Int[Tensor, " n"], number: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, " m"], Bool[Tensor, " n"]]:
        """Give rows to ids that have none, earlier ones first.

        Args:
            ids: Distinct within their tables.
            number: Their tables.

        Returns:
            The header's rows of those that got one, and which ids got none.
        """
        left = torch.arange(len(ids), device=ids.device)
        # Two ids turned to the marks of empty places cannot be stored.
        left = left[((ids ^ _LOWEST) != _FREE) & ((ids ^ _LOWEST) != _DELETED)]
        given = torch.full_like(ids, -1)
        while len(left):
            places = self._places(ids, number, 0, PROBES, left)
            found = self.keys[places]
            vacant = (found == _FREE) | (found == _DELETED)
            has_place = vacant.any(1)
            at = places.gather(1, vacant.long().argmax(1, keepdim=True)).squeeze(1)
            left, at = left[has_place], at[has_place]
            distinct, group = torch.unique(at, return_inverse=True)
            winner = torch.full_like(distinct, len(ids)).scatter_reduce_(0, group, left, "amin")
            self.keys[distinct] = ids[winner] ^ _LOWEST
            given[winner] = distinct
            left = left[winner[group] != left]
        return given[given >= 0], given < 0

    def remove(self, rows: Int[Tensor, " rows"]) -> None:
        """Take the ids of rows of the header away."""
        self.keys[rows] = _DELETED

    def is_used(self, rows: slice) -> Bool[Tensor, " rows"]:
        """Say which of these rows of the header an id has."""
        keys = self.keys[rows]
        return (keys != _FREE) & (keys != _DELETED)

    def _places(
        self, ids: Tensor, number: int | Tensor, start: int, stop: int, chosen: Tensor
    ) -> Int[Tensor, "n probes"]:
        """Return the header's rows that ids try, from one probe to another."""
        mixed = mix(ids[chosen], self._seed)
        number = number if isinstance(number, int) else number[chosen]
        of = _Columns(self._tables, number, ids.device)
        step = self._steps[number].expand(len(mixed), -1).gather(1, (mixed % _STEPS).unsqueeze(1))
        probe = torch.arange(start, stop, device=ids.device)
        size = of.size.unsqueeze(-1)
        home = (mixed // _STEPS).unsqueeze(1) % size
        return of.first.unsqueeze(-1) + (home + probe * step) % size


@functools.lru_cache(maxsize=4096)
def _coprime(size: int) -> Sequence[int]:
    """Return `_STEPS` steps without a divisor in common with `size`, spread over its range."""
    found = []
    for part in range(_STEPS):
        step = (2 * part + 1) * size // (2 * _STEPS) or 1
        while math.gcd(step, size) > 1:
            step += 1
        found.append(step)
    return found
