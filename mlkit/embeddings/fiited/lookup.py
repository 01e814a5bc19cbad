"""The op `mlkit::fiited_lookup`: a lookup through a store, with its backward.

The op takes the store's handle instead of its tensors: its backward changes headers and pool, which
no graph could express, and `torch.compile` sees one opaque call. What autograd holds on to is the
pool (unfused), or an anchor that gets a gradient of zeros (fused).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.embeddings.fiited.store import DynamicEmbeddingStore, store_of
from mlkit_kernels.dynamic_embedding import op as kernels

__all__ = ["lookup"]

ALL_TABLES = -1

_library = torch.library.Library("mlkit", "FRAGMENT")
_library.define(
    "fiited_lookup(Tensor root, Tensor indices, Tensor? offsets, Tensor? weights, int handle, "
    "int table, int bag_size, str mode) -> Tensor"
)
_library.define(
    "fiited_lookup_backward(Tensor grad, Tensor root, Tensor indices, Tensor? offsets, "
    "Tensor? weights, int handle, int table, int bag_size, str mode) -> Tensor"
)


def _forward(
    root: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    table: int,
    bag_size: int,
    mode: str,
) -> Tensor:
    store = store_of(handle)
    metadata = store.tables.metadata(None if table == ALL_TABLES else table)
    return kernels.forward(
        store.header, store.pool.detach(), metadata, store.layout, store.config.num_chunks,
        indices, offsets, bag_size, weights, mode,
    )  # fmt: skip


def _fake(
    root: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    table: int,
    bag_size: int,
    mode: str,
) -> Tensor:
    store = store_of(handle)
    num_tables = len(store.tables.specs) if table == ALL_TABLES else 1
    bags = indices.shape[0] // bag_size if offsets is None else offsets.shape[0] - 1
    dtype = torch.float64 if store.pool.dtype == torch.float64 else torch.float32
    shape = (bags // num_tables, num_tables * store.embedding_dim)
    return root.new_empty(shape, dtype=dtype)


def _backward_op(
    grad: Tensor,
    root: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    table: int,
    bag_size: int,
    mode: str,
) -> Tensor:
    number = None if table == ALL_TABLES else table
    found = store_of(handle).backward(number, indices, offsets, bag_size, weights, grad, mode)
    return torch.zeros_like(root) if found is None else found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    root, indices, offsets, weights, *ctx.rest = inputs
    ctx.save_for_backward(root, indices, offsets, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.mlkit.fiited_lookup_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return found, None, None, None, None, None, None, None


_library.impl("fiited_lookup", _forward, "CompositeExplicitAutograd")
_library.impl("fiited_lookup_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("mlkit::fiited_lookup", _fake, lib=_library)
torch.library.register_fake(
    "mlkit::fiited_lookup_backward", lambda grad, root, *rest: torch.empty_like(root), lib=_library
)
torch.library.register_autograd(
    "mlkit::fiited_lookup", _backward, setup_context=_setup_context, lib=_library
)


def lookup(
    store: DynamicEmbeddingStore,
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None = None,
    weights: Float[Tensor, " n"] | None = None,
    *,
    table: int | None = None,
    bag_size: int = 1,
    mode: str = "sum",
) -> Float[Tensor, "batch tables_times_dim"]:
    """Look rows up and pool them by bag; gradients update the store.

    Args:
        store: Where the rows are.
        indices: Rows within their tables; int64 or int32.
        offsets: Beginnings of the bags and the end, ordered by table; None for equal sizes.
        weights: A factor for each index; it gets no gradient.
        table: One table of the store; None for all of them.
        bag_size: Indices of each bag where there are no offsets.
        mode: "sum" or "mean".

    Raises:
        IndexOutOfRange: For an index outside its table, by number of the table in this call.
    """
    root = store.pool if store.config.optimizer is None else store.anchor
    number = ALL_TABLES if table is None else table
    return torch.ops.mlkit.fiited_lookup(
        root, indices, offsets, weights, store.handle, number, bag_size, mode
    )
