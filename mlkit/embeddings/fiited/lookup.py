"""The op `mlkit::fiited_lookup`: a lookup through a store, with its backward.

The op takes the store's handle instead of its tensors: its backward changes headers and pool, which
no graph could express, and `torch.compile` sees one opaque call. What autograd holds on to is the
pool (unfused), or an anchor that gets a gradient of zeros (fused). Eager code calls the same
functions without the op, which costs some 80 microseconds for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.embeddings.fiited.first_read import add_first_reads, has_first_reads
from mlkit.embeddings.fiited.gradients import take_gradient
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore, store_of
from mlkit.errors import InvalidTypeError, InvalidValueError
from mlkit_kernels.dynamic_embedding import IndexOutOfRange
from mlkit_kernels.dynamic_embedding import op as kernels

__all__ = ["check_offsets", "lookup"]

_library = torch.library.Library("mlkit", "FRAGMENT")
_BATCH = (
    "Tensor indices, Tensor? offsets, Tensor? weights, int handle, int[] tables, int bag_size, "
    "str mode"
)
_library.define(
    f"fiited_lookup(Tensor root, {_BATCH}, float? max_norm, float norm_type, "
    "bool scale_grad_by_freq, bool sparse) -> Tensor"
)
_library.define(
    "fiited_rows(Tensor ids, Tensor? offsets, int handle, int[] tables, bool collect) -> Tensor"
)
_library.define(
    f"fiited_lookup_backward(Tensor grad, {_BATCH}, bool scale_grad_by_freq, bool sparse) -> Tensor"
)


def _rows(
    ids: Tensor, offsets: Tensor | None, handle: int, tables: Sequence[int], collect: bool
) -> Tensor:
    return store_of(handle).map_ids(ids, tables, offsets, collect=collect)


def _forward(
    root: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    tables: Sequence[int],
    bag_size: int,
    mode: str,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    store = store_of(handle)
    if max_norm is not None:
        for table in tables:
            store.renormalise(table, indices, max_norm, norm_type)
    metadata = store.tables.metadata(tuple(tables))
    try:
        out = kernels.forward(
            store.header, store.pool.detach(), metadata, store.layout, store.config.num_chunks,
            indices, offsets, bag_size, weights, mode,
        )  # fmt: skip
    except IndexOutOfRange as error:
        name = store.tables.specs[tables[int(error.table)]].name
        raise IndexOutOfRange(repr(name), error.index, error.rows) from None
    except (RuntimeError, ValueError):
        names = ", ".join(store.tables.specs[t].name for t in tables)
        check_offsets(names, offsets, len(indices))
        raise
    if store.training and has_first_reads(store):
        out = add_first_reads(store, out, tables, indices, offsets, bag_size, weights, mode)
    return out


def check_offsets(names: str, offsets: Tensor | None, num_indices: int) -> None:
    """Raise if offsets do not begin with 0, decrease, or do not end with the number of indices."""
    if offsets is None or not len(offsets):
        return
    if int(offsets[0]) != 0:
        raise InvalidValueError(f"offsets must begin with 0, got {int(offsets[0])} (table {names})")
    falls = (offsets.diff() < 0).nonzero()
    if len(falls) and (at := int(falls[0])) < len(offsets) - 2:
        raise InvalidValueError(
            f"offsets must not decrease, got {int(offsets[at])} before {int(offsets[at + 1])} at "
            f"position {at} (table {names})"
        )
    last = int(offsets[-2] if len(falls) else offsets[-1])
    if len(falls) or last != num_indices:
        raise InvalidValueError(
            f"offsets must not pass the {num_indices} indices, and with include_last_offset end "
            f"with their number; the last is {last} (table {names})"
        )


def _fake(
    root: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    tables: Sequence[int],
    bag_size: int,
    mode: str,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    store = store_of(handle)
    bags = indices.shape[0] // bag_size if offsets is None else offsets.shape[0] - 1
    dtype = torch.float64 if store.pool.dtype == torch.float64 else torch.float32
    shape = (bags // len(tables), len(tables) * store.embedding_dim)
    return root.new_empty(shape, dtype=dtype)


def _backward_op(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    tables: Sequence[int],
    bag_size: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    store = store_of(handle)
    found = take_gradient(
        store, tables, indices, offsets, bag_size, weights, grad, mode,
        scale_grad_by_freq=scale_grad_by_freq, sparse=sparse,
    )  # fmt: skip
    return torch.zeros_like(store.root) if found is None else found


def _backward_fake(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    handle: int,
    *rest: Any,
) -> Tensor:
    root = store_of(handle).root
    return grad.new_empty(root.shape, dtype=root.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The root is not saved: what another lookup or a round changes in it is no concern of ours.
    _, indices, offsets, weights, *rest = inputs
    handle, tables, bag_size, mode, _, _, scale_grad_by_freq, sparse = rest
    ctx.save_for_backward(indices, offsets, weights)
    ctx.rest = (handle, tables, bag_size, mode, scale_grad_by_freq, sparse)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.mlkit.fiited_lookup_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (found, *[None] * 11)


_library.impl("fiited_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mlkit::fiited_rows", lambda ids, *rest: torch.empty_like(ids, dtype=torch.int64), lib=_library
)
_library.impl("fiited_lookup", _forward, "CompositeExplicitAutograd")
_library.impl("fiited_lookup_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("mlkit::fiited_lookup", _fake, lib=_library)
torch.library.register_fake("mlkit::fiited_lookup_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "mlkit::fiited_lookup", _backward, setup_context=_setup_context, lib=_library
)


class _Lookup(torch.autograd.Function):
    """The op's forward and backward for eager code."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup_context(ctx, inputs, inputs[0])
        return _forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (_backward_op(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 11)


def lookup(
    store: DynamicEmbeddingStore,
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None = None,
    weights: Float[Tensor, " n"] | None = None,
    *,
    tables: Sequence[int] | None = None,
    bag_size: int = 1,
    mode: str = "sum",
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> Float[Tensor, "batch tables_times_dim"]:
    """Look ids up and pool their rows by bag; gradients update the store.

    Args:
        store: Where the rows are.
        indices: Ids, int64 or int32: rows within their tables where `id_map` is "identity".
        offsets: Beginnings of the bags and the end, ordered by table; None for equal sizes.
        weights: A factor for each index; it gets no gradient.
        tables: Numbers of the tables that are read, one after the other; the same may come twice.
            None for all of them.
        bag_size: Indices of each bag where there are no offsets.
        mode: "sum" or "mean".
        max_norm: Rows that are read and are longer are shortened to this length, in place.
        norm_type: The p of that length's p-norm.
        scale_grad_by_freq: Divide the gradient of a row by how often it was read.

    Returns:
        Float32 (float64 for a pool of float64). Compiled code gives the pool dense gradients, even
        where the store says `sparse`.

    Raises:
        IndexOutOfRange: For an index outside its table, with both names.
        InvalidTypeError: For indices that are not int64 or int32.
        InvalidValueError: For offsets that do not begin with 0, decrease, or do not end with the
            number of indices.
    """
    if tables is None:
        tables = range(len(store.tables.specs))
    tables = list(tables)
    if indices.dtype not in (torch.int64, torch.int32):
        names = ", ".join(repr(store.tables.specs[t].name) for t in tables[:3])
        raise InvalidTypeError(f"ids of {names} must be int64 or int32, got {indices.dtype}")
    if store.config.id_map != "identity":
        collect = store.training and torch.is_grad_enabled()
        indices = torch.ops.mlkit.fiited_rows(indices, offsets, store.handle, tables, collect)
    is_eager = type(indices) is Tensor and not torch.compiler.is_compiling()
    run = _Lookup.apply if is_eager else torch.ops.mlkit.fiited_lookup
    return run(
        store.root, indices, offsets, weights, store.handle, tables, bag_size, mode, max_norm,
        norm_type, scale_grad_by_freq, store.sparse and is_eager,
    )  # fmt: skip
