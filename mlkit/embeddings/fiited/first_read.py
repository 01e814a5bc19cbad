"""The first read of a row in training: its initial values, before it has storage.

A row gets storage after the step that read it first. Until then a lookup would find zeros, and
training would begin as if all tables were zero; so, as long as there is room for new rows, those
that no earlier step touched read as what they will begin with. A table with room for every row that
is read trains exactly as a dense one (our decision; `first_read="zeros"` leaves it out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlkit.embeddings.fiited.gradients import waiting_rows
from mlkit.embeddings.fiited.ids import table_of
from mlkit.embeddings.fiited.initial import initial_values

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["add_first_reads", "has_first_reads"]


def has_first_reads(store: DynamicEmbeddingStore) -> bool:
    """Say whether a lookup in training may meet rows that will get storage after this step."""
    return (
        store.config.first_read == "init"
        and store.config.init != "zeros"
        and store.num_resident < store.target
    )


@torch.no_grad()
def add_first_reads(
    store: DynamicEmbeddingStore,
    out: Tensor,
    numbers: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    mode: str,
) -> Tensor:
    """Add the initial values of rows without chunks and utility to a lookup's output.

    Args:
        store: Where the rows are.
        out: What the kernel returned, [batch, tables * D].
        numbers: Of the tables that are read.
        indices: As in the lookup, and so on.
        offsets: See the kernels.
        bag_size: See the kernels.
        weights: See the kernels.
        mode: "sum" or "mean".
    """
    tables = store.tables.metadata(tuple(numbers))
    per_row, device = store.config.num_chunks, indices.device
    first, _, padding = tables.to(device).unbind(1)
    table = table_of(len(indices), len(tables), offsets, device)
    counted = indices != padding[table]
    rows = first[table] + indices
    header = store.header[rows]
    new = counted & (store.layout.utilities(header, per_row) == 0).all(1)
    waiting = waiting_rows(store, numbers)
    if waiting is not None:  # rows that a backward pass of this step has met already
        new |= counted & torch.isin(rows, waiting)
    new &= (store.layout.slots(store.layout.addresses(header, per_row), per_row) < 0).all(1)
    if store.tables.spare_rows:
        spare = torch.tensor(store.tables.spare_rows, device=device)
        new &= ~torch.isin(rows, spare)
    at = new.nonzero().squeeze(1)
    if not len(at):
        return out
    values = initial_values(store.config, store.tables, rows[at], store.embedding_dim)
    if weights is not None:
        values = values * weights[at].unsqueeze(1)
    if offsets is None:
        bag = torch.arange(len(indices), device=device) // bag_size
        num_bags = len(indices) // bag_size
    else:
        num_bags = len(offsets) - 1
        bag = torch.arange(num_bags, device=device).repeat_interleave(
            offsets.diff(), output_size=len(indices)
        )
    if mode == "mean":
        lengths = torch.zeros(num_bags, device=device).index_add_(0, bag, counted.float())
        values = values / lengths[bag[at]].unsqueeze(1)
    by_bag = out.unflatten(1, (len(tables), -1)).transpose(0, 1).flatten(0, 1)
    by_bag = by_bag.index_add(0, bag[at], values.to(out.dtype))
    return by_bag.unflatten(0, (len(tables), -1)).transpose(0, 1).flatten(1)
