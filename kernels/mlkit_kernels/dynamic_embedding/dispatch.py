"""Each kernel on the backend that takes its tensors, with errors in the caller's terms."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
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
    Candidates,
    candidates_reference,
    histogram_reference,
)

__all__ = [
    "as_touched",
    "run_apply",
    "run_backward",
    "run_candidates",
    "run_forward",
    "run_histogram",
    "run_reduce",
]

_OPTIMIZER_CODES = {name: code for code, name in enumerate(OPTIMIZERS)}
_UTILITY_CODES = {name: code for code, name in enumerate(UTILITIES)}


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
    if "index out of range" in _reason(error):
        check_indices(tables, indices, offsets, bag_size)
    raise InvalidValueError(_reason(error)) from error


def _reason(error: RuntimeError) -> str:
    """Return what the kernel said, without the place in its source."""
    return str(error).split("\n", 1)[0].rpartition("dynamic_embedding_cpu: ")[2]


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


def as_touched(found: tuple[Any, ...]) -> Touched:
    """Name the parts of what an op returned."""
    rows, counts, grads, num_nonfinite = found
    return Touched(RowGradients(rows, counts, grads), int(num_nonfinite))


def run_forward(
    header: Tensor,
    pool: Tensor,
    tables: Tensor,
    layout: HeaderLayout,
    num_chunks: int,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    mode: str,
    backend: str,
) -> Tensor:
    """`forward_reference` on the backend that takes these tensors."""
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


def run_backward(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    tables: Tensor,
    layout: HeaderLayout,
    num_chunks: int,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    grad: Tensor,
    mode: str,
    update: Update,
    backend: str,
) -> Touched:
    """`backward_reference` on the backend that takes these tensors."""
    mean = _choice("mode", mode, MODES)
    _check_update(update)
    chosen = resolve(backend, header, num_chunks, pool, *states)
    if chosen == "cpp":
        try:
            return as_touched(
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


def run_reduce(
    tables: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    grad: Tensor,
    mode: str,
    backend: str,
) -> RowGradients:
    """`reduce_gradients` on the backend that takes these tensors."""
    mean = _choice("mode", mode, MODES)
    wide = backend == "auto" and grad.dtype == torch.float64  # the reference sums in float64
    chosen = "reference" if wide else resolve(backend, grad, 1)
    if chosen == "cpp":
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
    run = triton_kernels().reduce_triton if chosen == "triton" else reduce_gradients
    sums: RowGradients = run(tables, indices, offsets, bag_size, weights, grad, mode)
    return sums


def run_apply(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    layout: HeaderLayout,
    num_chunks: int,
    gradients: RowGradients,
    update: Update,
    backend: str,
) -> Touched:
    """`apply_gradients` on the backend that takes these tensors."""
    _check_update(update)
    chosen = resolve(backend, header, num_chunks, pool, *states)
    if chosen == "cpp":
        try:
            return as_touched(
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
            raise InvalidValueError(_reason(error)) from error
    run = triton_kernels().apply_triton if chosen == "triton" else apply_gradients
    found: Touched = run(header, pool, states, layout, num_chunks, gradients, update)
    return found


def run_histogram(
    header: Tensor,
    tables: Tensor,
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Tensor,
    exponent: int,
    prefix: bool,
    resident_only: bool,
    within: int,
    backend: str,
) -> Tensor:
    """`histogram_reference` on the backend that takes these tensors."""
    options = (exponent, prefix, resident_only, within)
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
            raise InvalidValueError(_reason(error)) from error
    run = triton_kernels().histogram_triton if chosen == "triton" else histogram_reference
    found: Tensor = run(header, tables, layout, num_chunks, inverse, *options)
    return found


def run_candidates(
    header: Tensor,
    tables: Tensor,
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Tensor,
    low: float,
    high: float,
    exponent: int,
    prefix: bool,
    backend: str,
) -> Candidates:
    """`candidates_reference` on the backend that takes these tensors."""
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
            raise InvalidValueError(_reason(error)) from error
    run = triton_kernels().candidates_triton if chosen == "triton" else candidates_reference
    chunks: Candidates = run(
        header, tables, layout, num_chunks, inverse, low, high, exponent, prefix
    )
    return chunks
