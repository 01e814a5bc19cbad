"""Ranks that decide alike: gradients by row, and new ids, of all ranks in rank order.

Every rank applies the same gradients to its header, so that headers, rounds and addresses stay
equal bit by bit, whoever saw a row. A step costs two collectives for each lookup.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlkit.errors import InvalidTypeError
from mlkit_kernels.dynamic_embedding import RowGradients

__all__ = ["exclude_from_broadcast", "gather", "gather_gradients", "resolve_group"]


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


def exclude_from_broadcast(model: nn.Module) -> None:
    """Keep DDP from sending the buffers of a model's stores before each forward pass.

    They are equal on all ranks as it is. Call it before `DistributedDataParallel(model)`.
    """
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicEmbeddingStore):
            ignored += [f"{name}.{n}" if name else n for n, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def gather_gradients(mine: RowGradients, group: Any) -> RowGradients:
    """Sum counts and average gradients over ranks, as DDP does with losses that are means."""
    parts = [mine.rows.unsqueeze(1), mine.counts.unsqueeze(1), mine.grads]
    words = [part.contiguous().view(torch.int32) for part in parts]
    found = gather(torch.cat(words, dim=1), group)
    width = [part.shape[1] for part in words]
    columns = [part.contiguous() for part in found.split(width, dim=1)]
    rows, counts = (column.view(torch.int64).squeeze(1) for column in columns[:2])
    grads = columns[2].view(mine.grads.dtype) / dist.get_world_size(group)
    distinct, place = torch.unique(rows, return_inverse=True)
    return RowGradients(
        distinct,
        counts.new_zeros(len(distinct)).index_add_(0, place, counts),
        grads.new_zeros(len(distinct), grads.shape[1]).index_add_(0, place, grads),
    )


def gather(mine: Int[Tensor, "rows words"], group: Any) -> Int[Tensor, "all_rows words"]:
    """Put matrices of different lengths one below the other, in the order of the ranks."""
    size = dist.get_world_size(group)
    length = torch.tensor([len(mine)], device=mine.device)
    lengths = [torch.zeros_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    most = int(torch.stack(lengths).max())
    padded = mine.new_zeros(most, *mine.shape[1:])
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in range(size)]
    if most:
        dist.all_gather(found, padded, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(found, lengths, strict=True)])
