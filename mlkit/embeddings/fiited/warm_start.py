"""Utilities of chunks that were taken from a dense table, at the first round after it.

They have earned nothing yet, and would lose their storage to any chunk that was read once. A chunk
that was not read since counts as if it had earned what its table's residents have, in proportion to
its norm (our decision): those with large values stay, and what is read a lot still beats them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["seed_utilities"]

_BLOCK = 1 << 16


@torch.no_grad()
def seed_utilities(store: DynamicEmbeddingStore) -> None:
    """Give resident chunks without utility that of others of their norm, table by table."""
    for table in range(len(store.tables.specs)):
        earned = length = 0.0
        for _, norm, utility in _residents(store, table):
            earned += float(utility[norm > 0].sum())
            length += float(norm.sum())
        rate = earned / length if earned > 0 and length > 0 else 1.0
        for rows, norm, utility in _residents(store, table):
            idle = ((norm > 0) & (utility == 0)).any(1)
            seeded = torch.where(utility == 0, rate * norm, utility)  # others have no norm
            store.put_utilities(rows[idle], seeded[idle])


def _residents(store: DynamicEmbeddingStore, table: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows, norms of their chunks (0 without storage), and utilities, some rows at a time."""
    place, device = store.tables.rows_of(table), store.header.device
    for start in range(place.start, place.stop, _BLOCK):
        part = slice(start, min(start + _BLOCK, place.stop))
        rows = torch.arange(part.start, part.stop, device=device)
        values = store.read(rows).float().nan_to_num(0, 0, 0)
        chunks = values.unflatten(1, (store.config.num_chunks, -1))
        norm = torch.linalg.vector_norm(chunks, dim=2)
        yield rows, norm, store.utilities(part)
