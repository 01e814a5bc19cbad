"""What the backward pass of a lookup does to a store: utilities, and the update of the chunks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlkit.embeddings.fiited.distributed import gather_gradients
from mlkit.embeddings.fiited.ids import table_of
from mlkit_kernels.dynamic_embedding import RowGradients, Update
from mlkit_kernels.dynamic_embedding import op as kernels

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["take_gradient", "waiting_rows"]


@torch.no_grad()
def take_gradient(
    store: DynamicEmbeddingStore,
    tables: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    grad: Tensor,
    mode: str,
    *,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Take the gradient of a lookup: utilities, and the fused update or the pool's gradient.

    Args:
        store: Where the rows are.
        tables: Numbers of the tables that were read.
        indices: As in the lookup, and so on.
        offsets: See the kernels.
        bag_size: See the kernels.
        weights: See the kernels.
        grad: Of the lookup's output.
        mode: "sum" or "mean".
        scale_grad_by_freq: Divide the gradient of a row by how often it was read.
        sparse: Whether the gradient of the pool is.

    Returns:
        The gradient of the pool, dense or sparse; None in fused mode.
    """
    per_row = store.config.num_chunks
    metadata, grad = store.tables.metadata(tuple(tables)), grad.contiguous()
    if any(after <= before for before, after in itertools.pairwise(tables)):
        metadata, indices, grad = _as_one_table(store, metadata, indices, offsets, bag_size, grad)
    update, group = store.update(), store.group()
    fused = store.config.optimizer is not None
    waiting = waiting_rows(store, tables) if fused else None
    local = None
    is_plain = store.grad_scale == 1 and not scale_grad_by_freq
    if fused and group is None and waiting is None and is_plain:
        touched = kernels.backward(
            store.header, store.pool.detach(), store.states, metadata, store.layout, per_row,
            indices, offsets, bag_size, weights, grad, mode, update,
        )  # fmt: skip
    else:
        local = kernels.reduce(metadata, indices, offsets, bag_size, weights, grad, mode)
        if scale_grad_by_freq:
            counts = local.counts.to(local.grads.dtype)
            local = local._replace(grads=local.grads / counts.unsqueeze(1))
        gradients = _shared(store, local, update, group)
        touched = kernels.apply(
            store.header, store.pool.detach(), store.states, store.layout, per_row, gradients,
            update,
        )  # fmt: skip
        if waiting is not None:
            # Rows of an earlier lookup in this step have earned utility, but no place yet.
            late = torch.isin(gradients.rows, waiting)
            late &= ~torch.isin(gradients.rows, touched.new.rows)
            if bool(late.any()):
                store.pending.append((tables, RowGradients(*(x[late] for x in gradients))))
    store.num_nonfinite += touched.num_nonfinite
    store.has_earned = store.has_earned or update.utility != "none"
    new = _without_spare(store, touched.new)
    if not fused:
        new = new._replace(grads=new.grads[:, :0].clone())  # the optimizer has them
        store.warn_without_steps()
    if len(new.rows):
        store.pending.append((tables, new))
    return None if fused or local is None else _pool_gradient(store, local, sparse)


def waiting_rows(store: DynamicEmbeddingStore, tables: Sequence[int]) -> Tensor | None:
    """Return rows of these tables that an earlier backward pass of this step found new."""
    found = [p.rows for t, p in store.pending if not set(t).isdisjoint(tables)]
    return torch.cat(found) if found else None


def _shared(
    store: DynamicEmbeddingStore, local: RowGradients, update: Update, group: Any
) -> RowGradients:
    """Gradients of all ranks, and without the factor of a loss scale."""
    if store.grad_scale != 1:
        local = local._replace(grads=local.grads / store.grad_scale)
    is_used = store.config.optimizer is not None or update.utility != "none" or update.keep_new
    return local if group is None or not is_used else gather_gradients(local, group)


def _without_spare(store: DynamicEmbeddingStore, new: RowGradients) -> RowGradients:
    """Let the spare rows forget what lookups of unknown ids left there."""
    if not store.tables.spare_rows:
        return new
    spare = torch.tensor(store.tables.spare_rows, device=store.header.device)
    store.forget(spare)
    keep = ~torch.isin(new.rows, spare)
    return RowGradients(*(x[keep] for x in new))


def _as_one_table(
    store: DynamicEmbeddingStore,
    metadata: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a batch that reads a table twice into one of the whole header.

    The kernels sum gradients by table, so a table may occur only once among theirs.
    """
    place = table_of(len(indices), len(metadata), offsets, indices.device)
    first, _, pad = metadata.to(indices.device).unbind(1)
    padding = next(iter(store.tables.padding_rows), -1)
    rows = torch.where(indices == pad[place], padding, indices + first[place])
    whole = torch.tensor([[0, store.tables.num_rows, padding]], device="cpu")
    by_bag = grad.unflatten(1, (len(metadata), -1)).transpose(0, 1).flatten(0, 1)
    return whole, rows, by_bag.contiguous()


def _pool_gradient(store: DynamicEmbeddingStore, gradients: RowGradients, sparse: bool) -> Tensor:
    slots = store.placement.slots(gradients.rows)
    resident = slots >= 0
    width = store.pool.shape[1]
    chunks = gradients.grads.view(len(slots), store.config.num_chunks, width)[resident]
    at, values = slots[resident], chunks.to(store.pool.dtype)
    if sparse:
        return torch.sparse_coo_tensor(
            at.unsqueeze(0), values, store.pool.shape, check_invariants=False
        )
    return torch.zeros_like(store.pool).index_copy_(0, at, values)
