"""The ops by name: registration, the choice of the backend, and errors in the caller's terms.

Each function takes the arguments of its definition in `reference.py` or `selection.py`, and a
`backend`: "cpp" (CPU; float32 and bfloat16 pools), "triton" (CUDA), "reference" (anything), or
"auto", the fastest that takes these tensors. Nothing here is differentiable: an autograd function
calls these.

`torch.compile` sees the ops `mlkit::dynamic_embedding_*`. Otherwise the functions call the compiled
kernels themselves: an op written in Python costs some 15 microseconds more for each call.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.errors import InvalidValueError, nearest
from mlkit_kernels.dynamic_embedding.backends import cpp_ops, resolve, triton_kernels
from mlkit_kernels.dynamic_embedding.header import HeaderLayout, decode
from mlkit_kernels.dynamic_embedding.reference import (
    MODES,
    OPTIMIZERS,
    UTILITIES,
    RowGradients,
    Touched,
    Update,
    apply_gradients,
    backward_reference,
    check_indices,
    forward_reference,
    reduce_gradients,
)
from mlkit_kernels.dynamic_embedding.selection import (
    BINS,
    Candidates,
    candidates_reference,
    histogram_reference,
)

__all__ = [
    "apply",
    "backward",
    "candidates",
    "forward",
    "histogram",
    "reduce",
]

_PLAIN = (Tensor, torch.nn.Parameter)
_UPDATE_FIELDS = len(Update._fields)
_OPTIMIZER_CODES = {name: code for code, name in enumerate(OPTIMIZERS)}
_UTILITY_CODES = {name: code for code, name in enumerate(UTILITIES)}

_LAYOUT = "int[4] layout, int num_chunks"
_BATCH = "Tensor indices, Tensor? offsets, int bag_size, Tensor? weights"
_UPDATE = (
    "str optimizer, float lr, float eps, float beta1, float beta2, str utility, float scale, "
    "int exponent, int seed, bool keep_new, str backend"
)
_SCHEMAS = (
    f"forward(Tensor header, Tensor pool, Tensor tables, {_LAYOUT}, {_BATCH}, str mode, "
    "str backend) -> Tensor",
    "backward(Tensor(a!) header, Tensor(b!) pool, Tensor(c!)[] states, Tensor tables, "
    f"{_LAYOUT}, {_BATCH}, Tensor grad, str mode, {_UPDATE}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"reduce(Tensor tables, {_BATCH}, Tensor grad, str mode, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    f"apply(Tensor(a!) header, Tensor(b!) pool, Tensor(c!)[] states, {_LAYOUT}, Tensor rows, "
    f"Tensor counts, Tensor grads, {_UPDATE}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"histogram(Tensor header, Tensor tables, {_LAYOUT}, Tensor inverse, int exponent, "
    "bool prefix, bool resident_only, int within, str backend) -> Tensor",
    f"candidates(Tensor header, Tensor tables, {_LAYOUT}, Tensor inverse, float low, float high, "
    "int exponent, bool prefix, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)

_library = torch.library.Library("mlkit", "FRAGMENT")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> int:
    if value in allowed:
        return allowed.index(value)
    raise InvalidValueError(
        f"{name} must be one of {', '.join(allowed)}, got {value!r}; {nearest(value, allowed)}"
    )


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor as the compiled kernels read it."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _optional(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _as(tensor, dtype)


@functools.lru_cache(maxsize=16)
def _code_values(exponent: int) -> Tensor:
    return decode(torch.arange(256, dtype=torch.uint8), exponent)


def _values(layout: HeaderLayout, exponent: int) -> Tensor | None:
    return None if layout.utility_bytes == 4 else _code_values(exponent)


def _explain(
    error: RuntimeError, tables: Tensor, indices: Tensor, offsets: Tensor | None, bag_size: int
) -> NoReturn:
    """Raise what the reference would raise for these arguments, else what the kernel said."""
    message = str(error).split("\n", 1)[0]
    if "index out of range" in message:
        check_indices(tables, indices, offsets, bag_size)
    raise InvalidValueError(message) from error


def _is_eager(header: Tensor) -> bool:
    return type(header) in _PLAIN and not torch.compiler.is_compiling()


def _flat_update(update: Update) -> tuple[Any, ...]:
    return (
        _OPTIMIZER_CODES[update.optimizer],
        _UTILITY_CODES[update.utility],
        update.lr,
        update.eps,
        update.beta1,
        update.beta2,
        update.scale,
        update.exponent,
        update.seed,
        update.keep_new,
    )


def _three(states: list[Tensor]) -> list[Tensor | None]:
    return [*states, *[None] * (3 - len(states))]


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
    mean = _choice("mode", mode, MODES)
    chosen = resolve(backend, header, num_chunks, pool)
    if chosen == "cpp":
        try:
            return cpp_ops().dynamic_embedding_forward_cpu.default(
                header,
                pool,
                tables,
                *layout,
                num_chunks,
                _as(indices, torch.int64),
                _optional(offsets, torch.int64),
                bag_size,
                _optional(weights, torch.float32),
                mean,
            )
        except RuntimeError as error:
            _explain(error, tables, indices, offsets, bag_size)
    run = triton_kernels().forward_triton if chosen == "triton" else forward_reference
    found: Tensor = run(
        header, pool, tables, layout, num_chunks, indices, offsets, bag_size, weights, mode
    )
    return found


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
        return _touched(
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
    mean = _choice("mode", mode, MODES)
    _check_update(update)
    chosen = resolve(backend, header, num_chunks, pool, *states)
    if chosen == "cpp":
        try:
            return _touched(
                cpp_ops().dynamic_embedding_backward_cpu.default(
                    header,
                    pool,
                    *_three(states),
                    tables,
                    *layout,
                    num_chunks,
                    _as(indices, torch.int64),
                    _optional(offsets, torch.int64),
                    bag_size,
                    _optional(weights, torch.float32),
                    _as(grad, torch.float32),
                    mean,
                    *_flat_update(update),
                    _values(layout, update.exponent),
                )
            )
        except RuntimeError as error:
            _explain(error, tables, indices, offsets, bag_size)
    run = triton_kernels().backward_triton if chosen == "triton" else backward_reference
    found: Touched = run(
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
    )
    return found


def _check_update(update: Update) -> None:
    if update.optimizer not in _OPTIMIZER_CODES:
        _choice("optimizer", update.optimizer, OPTIMIZERS)
    if update.utility not in _UTILITY_CODES:
        _choice("utility", update.utility, UTILITIES)


def _touched(found: tuple[Any, ...]) -> Touched:
    rows, counts, grads, num_nonfinite = found
    return Touched(RowGradients(rows, counts, grads), int(num_nonfinite))


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
    mean = _choice("mode", mode, MODES)
    small = backend == "auto" and grad.dtype == torch.float64  # the reference sums in float64
    if not small and resolve(backend, grad, 1) == "cpp":
        try:
            found = cpp_ops().dynamic_embedding_reduce_cpu.default(
                tables,
                _as(indices, torch.int64),
                _optional(offsets, torch.int64),
                bag_size,
                _optional(weights, torch.float32),
                _as(grad, torch.float32),
                mean,
            )
            return RowGradients(*found)
        except RuntimeError as error:
            _explain(error, tables, indices, offsets, bag_size)
    return reduce_gradients(tables, indices, offsets, bag_size, weights, grad, mode)


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
        return _touched(
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
    _check_update(update)
    if resolve(backend, header, num_chunks, pool, *states) == "cpp":
        try:
            return _touched(
                cpp_ops().dynamic_embedding_apply_cpu.default(
                    header,
                    pool,
                    *_three(states),
                    *layout,
                    num_chunks,
                    _as(gradients.rows, torch.int64),
                    _as(gradients.counts, torch.int64),
                    _as(gradients.grads, torch.float32),
                    *_flat_update(update),
                    _values(layout, update.exponent),
                )
            )
        except RuntimeError as error:
            raise InvalidValueError(str(error).split("\n", 1)[0]) from error
    return apply_gradients(header, pool, states, layout, num_chunks, gradients, update)


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
    chosen = resolve(backend, header, num_chunks)
    if chosen == "cpp":
        try:
            return cpp_ops().dynamic_embedding_histogram_cpu.default(
                header,
                tables,
                *layout,
                num_chunks,
                _as(inverse, torch.float32),
                prefix,
                resident_only,
                within,
                _values(layout, exponent),
            )
        except RuntimeError as error:
            raise InvalidValueError(str(error).split("\n", 1)[0]) from error
    run = triton_kernels().histogram_triton if chosen == "triton" else histogram_reference
    found: Tensor = run(header, tables, layout, num_chunks, inverse, *options)
    return found


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
    chosen = resolve(backend, header, num_chunks)
    if chosen == "cpp":
        try:
            found = cpp_ops().dynamic_embedding_candidates_cpu.default(
                header,
                tables,
                *layout,
                num_chunks,
                _as(inverse, torch.float32),
                low,
                high,
                prefix,
                _values(layout, exponent),
            )
            return Candidates(*found)
        except RuntimeError as error:
            raise InvalidValueError(str(error).split("\n", 1)[0]) from error
    run = triton_kernels().candidates_triton if chosen == "triton" else candidates_reference
    chunks: Candidates = run(
        header, tables, layout, num_chunks, inverse, low, high, exponent, prefix
    )
    return chunks


def _forward_op(
    header: Tensor, pool: Tensor, tables: Tensor, layout: list[int], *rest: Any
) -> Tensor:
    return forward(header, pool, tables, HeaderLayout(*layout), *rest)


def _parts(found: Touched) -> tuple[Tensor, ...]:
    return *found.new, torch.tensor(found.num_nonfinite)


def _backward_op(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    tables: Tensor,
    layout: list[int],
    *rest: Any,
) -> tuple[Tensor, ...]:
    *batch, backend = rest
    update = Update(*batch[-_UPDATE_FIELDS:])
    arguments = batch[:-_UPDATE_FIELDS]
    found = backward(
        header, pool, states, tables, HeaderLayout(*layout), *arguments, update, backend
    )
    return _parts(found)


def _reduce_op(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(reduce(*arguments))


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
    found = apply(
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
    return histogram(header, tables, HeaderLayout(*layout), *rest)


def _candidates_op(
    header: Tensor, tables: Tensor, layout: list[int], *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(candidates(header, tables, HeaderLayout(*layout), *rest))


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


def _some_rows(like: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return fake row gradients, of which only the data tell how many there are."""
    size = torch.library.get_ctx().new_dynamic_size()
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
    *_: Any,
) -> tuple[Tensor, ...]:
    return *_some_rows(grad, num_chunks * pool.shape[1]), torch.empty((), dtype=torch.int64)


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
    *_: Any,
) -> tuple[Tensor, ...]:
    return *_some_rows(grads, grads.shape[1]), torch.empty((), dtype=torch.int64)


def _histogram_fake(header: Tensor, tables: Tensor, *_: Any) -> Tensor:
    return header.new_empty(tables.shape[0], BINS, dtype=torch.int64)


def _candidates_fake(header: Tensor, *_: Any) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for _side in range(2):
        size = torch.library.get_ctx().new_dynamic_size()
        found.append(header.new_empty(size, dtype=torch.int64))
        found.append(header.new_empty(size, dtype=torch.float32))
    return tuple(found)


_IMPLEMENTATIONS = {
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
    _library.impl(f"dynamic_embedding_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mlkit::dynamic_embedding_{_name}", _fake, lib=_library)
