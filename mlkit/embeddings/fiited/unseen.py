"""Ids that an exact table of keys does not hold yet: collected, given rows, and taken out again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mlkit.embeddings.fiited.distributed import gather

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["collect_unseen", "evict_ids", "insert_unseen"]

logger = logging.getLogger(__name__)

_SHARE = 10  # at most a tenth of a table's ids leave in a round


def collect_unseen(
    store: DynamicEmbeddingStore, ids: Tensor, number: int | Tensor, rows: Int[Tensor, " n"]
) -> None:
    """Remember the ids whose row is the spare one, until the step ends."""
    sizes = torch.tensor([s.num_embeddings for s in store.tables.specs], device=rows.device)
    unknown = rows == sizes[number]
    found = ids[unknown].long()
    if len(found):
        of = torch.as_tensor(number, device=ids.device).expand_as(ids)[unknown]
        store.unseen.append(torch.stack([of, found], dim=1).unique(dim=0))


def insert_unseen(store: DynamicEmbeddingStore) -> Int[Tensor, " rows"]:
    """Give the ids of all ranks that were collected in this step their rows, lower ids first.

    Ids that find no place are counted in `num_dropped`, once for each step.

    Returns:
        The header's rows that were given.
    """
    device = store.header.device
    none = torch.zeros(0, 2, dtype=torch.int64, device=device)
    pairs = torch.cat([none, *store.unseen])
    store.unseen = []
    group = store.group()
    if group is not None:
        pairs = gather(pairs, group)
    if not len(pairs):
        return none[:, 0]
    number, ids = pairs.unique(dim=0).unbind(1)
    assert store.exact_ids is not None
    rows, dropped = store.exact_ids.insert(ids, number)
    if bool(dropped.any()):
        if not store.num_dropped:
            table = store.tables.specs[int(number[dropped][0])]
            logger.warning(
                "table %s (%d rows) has no row for a new id: such ids read as zeros and are "
                "counted in num_dropped; more rows, or id_map='hash', would hold them",
                table.name, table.num_embeddings,
            )  # fmt: skip
        lost = torch.bincount(number[dropped], minlength=len(store.tables.specs)).cpu()
        store.dropped += lost
        store.num_dropped += int(lost.sum())
    return rows


def evict_ids(store: DynamicEmbeddingStore) -> int:
    """Make place in tables that turned ids away since the last round.

    The ids whose rows have no chunk leave, lowest utility first: as many as were turned away, at
    most a tenth of the table. An id that is seen again in the meantime gains utility and stays.

    Returns:
        How many left.
    """
    assert store.exact_ids is not None
    count = 0
    for table in store.dropped.nonzero().squeeze(1).tolist():
        rows = store.tables.rows_of(table)
        size = rows.stop - rows.start
        utility = store.utilities(rows).amax(1)
        idle = store.exact_ids.is_used(rows) & ~store.resident(rows).any(1)
        padding = store.tables.specs[table].padding_idx
        if padding is not None:
            idle[padding] = False
        candidates = idle.nonzero().squeeze(1)
        most = min(int(store.dropped[table]), -(-size // _SHARE))
        order = torch.sort(utility[candidates], stable=True).indices[:most]
        leaving = candidates[order] + rows.start
        store.exact_ids.remove(leaving)
        store.forget(leaving)
        count += len(leaving)
    store.dropped.zero_()
    return count
