"""Ranks that decide alike: gradients, new rows and utilities, put together in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlkit.errors import InvalidTypeError
from mlkit_kernels.dynamic_embedding import RowGradients

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["average", "gather_gradients", "gather_new_rows", "resolve_group"]


def resolve_group(group: Any) -> Any:
    """Return the group to talk to: of "auto", all ranks if there are several; None for none.

    Raises:
        InvalidTypeError: For something else.
    """
    if group is None:
        return None
    if isinstance(group, str):
        if group != "auto":
            raise InvalidTypeError(f"process_group must be 'auto', None or a group, got {group!r}")
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return dist.group.WORLD
    return group


def gather_gradients(mine: RowGradients, group: Any) -> RowGradients:
    """Sum counts and average gradients over ranks, as DDP does with losses that are means."""
    size = dist.get_world_size(group)
    rows = torch.cat(_gather(mine.rows, group))
    counts = torch.cat(_gather(mine.counts, group))
    grads = torch.cat(_gather(mine.grads, group)) / size
    return _merged(RowGradients(rows, counts, grads))


def gather_new_rows(
    pending: Sequence[RowGradients], group: Any, fused: bool, store: DynamicEmbeddingStore
) -> RowGradients | None:
    """Put the rows that were seen for the first time in this step together; None if none were.

    A fused backward has gathered its gradients already, so that all ranks hold the same.
    """
    width = store.embedding_dim
    if group is None or fused:
        return _merged(_cat(pending)) if pending else None
    device = store.header.device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    empty = RowGradients(none, none, store.pool.new_zeros(0, width))
    found = gather_gradients(_cat([empty, *pending]), group)
    return found if len(found.rows) else None


def average(store: DynamicEmbeddingStore, group: Any) -> None:
    """Replace the utilities by their mean over ranks, a block of rows at a time."""
    size = dist.get_world_size(group)
    per_block = 1 << 18
    for start in range(0, store.tables.num_rows, per_block):
        rows = slice(start, min(start + per_block, store.tables.num_rows))
        values = store.utilities(rows).contiguous()
        dist.all_reduce(values, group=group)
        number = torch.arange(rows.start, rows.stop, device=values.device)
        store.put_utilities(number, values / size)


def _cat(parts: Sequence[RowGradients]) -> RowGradients:
    return RowGradients(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _merged(gradients: RowGradients) -> RowGradients:
    rows, place = torch.unique(gradients.rows, return_inverse=True)
    counts = gradients.counts.new_zeros(len(rows)).index_add_(0, place, gradients.counts)
    grads = gradients.grads.new_zeros(len(rows), gradients.grads.shape[1])
    return RowGradients(rows, counts, grads.index_add_(0, place, gradients.grads))


def _gather(mine: Tensor, group: Any) -> list[Tensor]:
    """Gather tensors whose lengths differ."""
    size = dist.get_world_size(group)
    length = torch.tensor([len(mine)], device=mine.device)
    lengths = [torch.zeros_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    most = int(torch.stack(lengths).max())
    padded = mine.new_zeros(most, *mine.shape[1:])
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(found, padded, group=group)
    return [part[: int(n)] for part, n in zip(found, lengths, strict=True)]
