"""From ids to rows: `id_map` "hash" folds any integer into a table."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mlkit.embeddings.fiited.tables import TableSpec

__all__ = ["hashed"]

_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # as signed 64-bit numbers
_SHIFTS = (30, 27, 31)


def hashed(ids: Int[Tensor, "*shape"], spec: TableSpec, seed: int) -> Int[Tensor, "*shape"]:
    """Return the row of each id, int64; `padding_idx` keeps its row, which no other id gets.

    The mixing function is the finaliser of splitmix64 (Steele, Lea and Flood, 2014).
    """
    mixed = ids.long() + (2 * seed + 1) * 0x1E3779B97F4A7C15
    for shift, factor in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        high = mixed >> shift & (1 << (64 - shift)) - 1  # without the sign
        mixed = (mixed ^ high) * factor
    if spec.padding_idx is None:
        return mixed.remainder(spec.num_embeddings)
    row = mixed.remainder(max(spec.num_embeddings - 1, 1))
    row = row + (row >= spec.padding_idx)
    return torch.where(ids == spec.padding_idx, spec.padding_idx, row)
