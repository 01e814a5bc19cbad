"""The kernels by name, and the ops that `torch.compile` sees in their place.

Each function takes the arguments of its definition in `reference.py` or `selection.py`, and a
`backend`: "cpp" (CPU; float32 and bfloat16 pools), "triton" (CUDA), "reference" (anything), or
"auto", the fastest that takes these tensors. Nothing here is differentiable: an autograd function
calls these.

`torch.compile` sees the ops `mlkit::dynamic_embedding_*`. Otherwise the functions call the compiled
kernels themselves: an op written in Python costs some 15 microseconds more for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._compile import _disable_dynamo

from mlkit_kernels.dynamic_embedding.dispatch import (
    as_touched,
    run_apply,
    run_backward,
    run_candidates,
    run_forward,
    run_histogram,
    run_reduce,
)
from mlkit_kernels.dynamic_embedding.header import HeaderLayout
from mlkit_kernels.dynamic_embedding.reference import RowGradients, Touched, Update
from mlkit_kernels.dynamic_embedding.selection import BINS, Candidates

__all__ = [
    "apply",
    "backward",
    "candidates",
    "forward",
    "histogram",
    "reduce",
]

_PLAIN = (Tensor, torch.nn.Parameter)

_LAYOUT = "int[4] layout, int num_chunks"
_BATCH = "Tensor indices, Tensor? offsets, int bag_size, Tensor? weights"
_UPDATE = (
    "str optimizer, float lr, float eps, float beta1, float beta2, str utility, float scale, "
    "int exponent, int seed, bool keep_new, str backend"
)
# An argument `mode` of an op that writes clashes with one of PyTorch's own.
_SCHEMAS = (
    f"forward(Tensor header, Tensor pool, Tensor tables, {_LAYOUT}, {_BATCH}, str pooling, "
    "str backend) -> Tensor",
    "backward(Tensor(a!) header, Tensor(b!) pool, Tensor(c!)[] states, Tensor tables, "
    f"{_LAYOUT}, {_BATCH}, Tensor grad, str pooling, {_UPDATE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    f"reduce(Tensor tables, {_BATCH}, Tensor grad, str pooling, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    f"apply(Tensor(a!) header, Tensor(b!) pool, Tensor(c!)[] states, {_LAYOUT}, Tensor rows, "
    f"Tensor counts, Tensor grads, {_UPDATE}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"histogram(Tensor header, Tensor tables, {_LAYOUT}, Tensor inverse, int exponent, "
    "bool prefix, bool resident_only, int within, str backend) -> Tensor",
    f"candidates(Tensor header, Tensor tables, {_LAYOUT}, Tensor inverse, float low, float high, "
    "int exponent, bool prefix, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)

_library = torch.library.Library("mlkit", "FRAGMENT")


def _is_eager(header: Tensor) -> bool:
    return type(header) in _PLAIN and not torch.compiler.is_compiling()


def forward(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None = None,
    bag_size: int = 1,
    weights: Float[Tensor, " n"] | None = None,
    mode: str = "sum",
    backend: str = "auto",
) -> Float[Tensor, "batch tables_times_dim"]:
    """Pool the rows of each bag: `reference.forward_reference`, on any backend.

    Raises:
        IndexOutOfRange: For an index outside its table.
        InvalidValueError: For offsets that do not fit, or an unknown name.
        InvalidTypeError: For types that the backend does not take.
        RunError: If the backend that was asked for cannot run here; the message says why.
    """
    if not _is_eager(header):
        return torch.ops.mlkit.dynamic_embedding_forward(
            header,
            pool,
            tables,
            list(layout),
            num_chunks,
            indices,
            offsets,
            bag_size,
            weights,
            mode,
            backend,
        )
    return run_forward(
        header, pool, tables, layout, num_chunks, indices, offsets, bag_size, weights, mode, backend
    )


def backward(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    states: list[Tensor],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None,
    bag_size: int,
    weights: Float[Tensor, " n"] | None,
    grad: Float[Tensor, "batch tables_times_dim"],
    mode: str,
    update: Update,
    backend: str = "auto",
) -> Touched:
    """Update header, pool and states in place: `reference.backward_reference`, on any backend.

    Raises:
        IndexOutOfRange: For an index outside its table; nothing has been written then.
        InvalidValueError: See `forward`, as for the rest.
    """
    if not _is_eager(header):
        return as_touched(
            torch.ops.mlkit.dynamic_embedding_backward(
                header,
                pool,
                states,
                tables,
                list(layout),
                num_chunks,
                indices,
                offsets,
                bag_size,
                weights,
                grad,
                mode,
                *update,
                backend,
            )
        )
    return run_backward(
        header,
        pool,
        states,
        tables,
        layout,
        num_chunks,
        indices,
        offsets,
        bag_size,
        weights,
        grad,
        mode,
        update,
        backend,
    )


def reduce(
    tables: Int[Tensor, "tables 3"],
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None,
    bag_size: int,
    weights: Float[Tensor, " n"] | None,
    grad: Float[Tensor, "batch tables_times_dim"],
    mode: str,
    backend: str = "auto",
) -> RowGradients:
    """Sum the gradient of each distinct row: `reference.reduce_gradients`, on any backend."""
    if not _is_eager(grad):
        return RowGradients(
            *torch.ops.mlkit.dynamic_embedding_reduce(
                tables, indices, offsets, bag_size, weights, grad, mode, backend
            )
        )
    return run_reduce(tables, indices, offsets, bag_size, weights, grad, mode, backend)


def apply(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    states: list[Tensor],
    layout: HeaderLayout,
    num_chunks: int,
    gradients: RowGradients,
    update: Update,
    backend: str = "auto",
) -> Touched:
    """Update distinct, ascending rows in place: `reference.apply_gradients`, on any backend."""
    if not _is_eager(header):
        return as_touched(
            torch.ops.mlkit.dynamic_embedding_apply(
                header,
                pool,
                states,
                list(layout),
                num_chunks,
                *gradients,
                *update,
                backend,
            )
        )
    return run_apply(header, pool, states, layout, num_chunks, gradients, update, backend)


def histogram(
    header: Int[Tensor, "rows words"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Float[Tensor, " tables"],
    exponent: int = 0,
    prefix: bool = False,
    resident_only: bool = False,
    within: int = -1,
    backend: str = "auto",
) -> Int[Tensor, "tables 65536"]:
    """Count positive scores: `selection.histogram_reference`, on any backend."""
    options = (exponent, prefix, resident_only, within)
    if not _is_eager(header):
        return torch.ops.mlkit.dynamic_embedding_histogram(
            header, tables, list(layout), num_chunks, inverse, *options, backend
        )
    return run_histogram(
        header,
        tables,
        layout,
        num_chunks,
        inverse,
        exponent,
        prefix,
        resident_only,
        within,
        backend,
    )


def candidates(
    header: Int[Tensor, "rows words"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Float[Tensor, " tables"],
    low: float,
    high: float,
    exponent: int = 0,
    prefix: bool = False,
    backend: str = "auto",
) -> Candidates:
    """Find the chunks that may change sides: `selection.candidates_reference`, on any backend."""
    if not _is_eager(header):
        return Candidates(
            *torch.ops.mlkit.dynamic_embedding_candidates(
                header,
                tables,
                list(layout),
                num_chunks,
                inverse,
                low,
                high,
                exponent,
                prefix,
                backend,
            )
        )
    return run_candidates(
        header, tables, layout, num_chunks, inverse, low, high, exponent, prefix, backend
    )


def _forward_op(
    header: Tensor, pool: Tensor, tables: Tensor, layout: list[int], *rest: Any
) -> Tensor:
    return run_forward(header, pool, tables, HeaderLayout(*layout), *rest)


def _parts(found: Touched) -> tuple[Tensor, ...]:
    return *found.new, torch.tensor(found.num_nonfinite)


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    header, pool, states, tables, layout, *batch = arguments[:12]
    *update, backend = arguments[12:]
    storage = (header, pool, states, tables, HeaderLayout(*layout))
    everything: list[Any] = [*storage, *batch, Update(*update), backend]
    return _parts(run_backward(*everything))


def _reduce_op(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(run_reduce(*arguments))


def _apply_op(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    layout: list[int],
    num_chunks: int,
    rows: Tensor,
    counts: Tensor,
    grads: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *update, backend = rest
    gradients = RowGradients(rows, counts, grads)
    found = run_apply(
        header,
        pool,
        states,
        HeaderLayout(*layout),
        num_chunks,
        gradients,
        Update(*update),
        backend,
    )
    return _parts(found)


def _histogram_op(header: Tensor, tables: Tensor, layout: list[int], *rest: Any) -> Tensor:
    return run_histogram(header, tables, HeaderLayout(*layout), *rest)


def _candidates_op(
    header: Tensor, tables: Tensor, layout: list[int], *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(run_candidates(header, tables, HeaderLayout(*layout), *rest))


def _forward_fake(
    header: Tensor,
    pool: Tensor,
    tables: Tensor,
    layout: list[int],
    num_chunks: int,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    *_: Any,
) -> Tensor:
    bags = indices.shape[0] // bag_size if offsets is None else offsets.shape[0] - 1
    dtype = torch.float64 if pool.dtype == torch.float64 else torch.float32
    width = tables.shape[0] * num_chunks * pool.shape[1]
    return pool.new_empty(bags // tables.shape[0], width, dtype=dtype)


def _some_rows(like: Tensor, dim: int, any_rows: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return fake row gradients: none, or as many as only the data can tell."""
    size = torch.library.get_ctx().new_dynamic_size() if any_rows else 0
    rows = like.new_empty(size, dtype=torch.int64)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return rows, torch.empty_like(rows), like.new_empty(size, dim, dtype=dtype)


def _backward_fake(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    tables: Tensor,
    layout: list[int],
    num_chunks: int,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    grad: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return *_some_rows(grad, num_chunks * pool.shape[1], rest[-2]), torch.empty(
        (), dtype=torch.int64
    )


def _reduce_fake(
    tables: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    grad: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return _some_rows(grad, grad.shape[1] // tables.shape[0])


def _apply_fake(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    layout: list[int],
    num_chunks: int,
    rows: Tensor,
    counts: Tensor,
    grads: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return *_some_rows(grads, grads.shape[1], rest[-2]), torch.empty((), dtype=torch.int64)


def _histogram_fake(header: Tensor, tables: Tensor, *_: Any) -> Tensor:
    return header.new_empty(tables.shape[0], BINS, dtype=torch.int64)


def _candidates_fake(header: Tensor, *_: Any) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for _side in range(2):
        size = torch.library.get_ctx().new_dynamic_size()
        found.append(header.new_empty(size, dtype=torch.int64))
        found.append(header.new_empty(size, dtype=torch.float32))
    return tuple(found)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (_forward_op, _forward_fake),
    "backward": (_backward_op, _backward_fake),
    "reduce": (_reduce_op, _reduce_fake),
    "apply": (_apply_op, _apply_fake),
    "histogram": (_histogram_op, _histogram_fake),
    "candidates": (_candidates_op, _candidates_fake),
}
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _run, _fake = _IMPLEMENTATIONS[_name]
    _library.define(f"dynamic_embedding_{_schema}")
    # Where a graph breaks at an op, its implementation must not be traced in its place.
    _library.impl(f"dynamic_embedding_{_name}", _disable_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mlkit::dynamic_embedding_{_name}", _fake, lib=_library)
