# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""What a program does with its rows in the backward pass: sum their gradients, then update them.

A program has BLOCK_R distinct rows and thus every chunk of theirs to itself: no atomics but for one
count. It sums the reads of a row BLOCK_P at a time, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlkit_kernels.dynamic_embedding.header import LARGEST, STEPS_PER_OCTAVE
from mlkit_kernels.dynamic_embedding.reference import OPTIMIZERS, UTILITIES
from mlkit_kernels.dynamic_embedding.triton_header import (
    is_finite,
    random_bits,
    read_utility,
    slots_of,
)

__all__ = ["reduce_kernel", "update_kernel"]

_LARGEST = tl.constexpr(LARGEST)
_STEPS = tl.constexpr(STEPS_PER_OCTAVE)
_NO_OPTIMIZER = tl.constexpr(OPTIMIZERS.index("none"))
_SGD = tl.constexpr(OPTIMIZERS.index("sgd"))
_ROWWISE_ADAGRAD = tl.constexpr(OPTIMIZERS.index("rowwise_adagrad"))
_ADAGRAD = tl.constexpr(OPTIMIZERS.index("adagrad"))
_ADAM = tl.constexpr(OPTIMIZERS.index("adam"))
_FREQ = tl.constexpr(UTILITIES.index("freq"))
_GRAD = tl.constexpr(UTILITIES.index("grad"))
_NO_UTILITY = tl.constexpr(UTILITIES.index("none"))


@triton.jit
def _sums(
    starts,
    order,
    bags,
    factors,
    grad,
    num_rows,
    batch,
    grad_stride,
    FACTORS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of this program's rows, float32 [R, K, C]."""
    q = tl.arange(0, BLOCK_R * BLOCK_P)
    r = tl.program_id(0) * BLOCK_R + q // BLOCK_P
    start = tl.load(starts + r, mask=r < num_rows, other=0)
    end = tl.load(starts + r + 1, mask=r < num_rows, other=0)
    d = tl.arange(0, BLOCK_K * BLOCK_C)[None, :]
    column = (d // BLOCK_C) * WIDTH + d % BLOCK_C
    inside = (d // BLOCK_C < CHUNKS) & (d % BLOCK_C < WIDTH)
    total = tl.zeros([BLOCK_R, BLOCK_K * BLOCK_C], tl.float32)
    for done in range(0, tl.max(end - start, 0).to(tl.int32), BLOCK_P):
        at = start + done + q % BLOCK_P
        here = at < end
        source = tl.load(order + at, mask=here, other=0)
        bag = tl.load(bags + source, mask=here, other=0)
        line = (bag % batch).to(tl.int64) * grad_stride + (bag // batch) * (CHUNKS * WIDTH)
        g = tl.load(grad + line[:, None] + column, mask=here[:, None] & inside, other=0.0)
        g = g.to(tl.float32)
        if FACTORS:
            g *= tl.load(factors + source, mask=here, other=0.0)[:, None]
        total += tl.sum(g.reshape([BLOCK_R, BLOCK_P, BLOCK_K * BLOCK_C]), 1)
    return total.reshape([BLOCK_R, BLOCK_K, BLOCK_C])


@triton.jit(do_not_specialize=["num_rows", "batch"])
def reduce_kernel(
    starts,
    order,
    bags,
    factors,
    grad,
    sums,
    num_rows,
    batch,
    grad_stride,
    FACTORS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store the gradient of each row; see `_sums`."""
    total = _sums(
        starts,
        order,
        bags,
        factors,
        grad,
        num_rows,
        batch,
        grad_stride,
        FACTORS,
        CHUNKS,
        WIDTH,
        BLOCK_R,
        BLOCK_P,
        BLOCK_K,
        BLOCK_C,
    )
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None, None]
    k = tl.arange(0, BLOCK_K)[None, :, None]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    place = r.to(tl.int64) * (CHUNKS * WIDTH) + k * WIDTH + c
    tl.store(sums + place, total, mask=(r < num_rows) & (k < CHUNKS) & (c < WIDTH))


@triton.jit
def _encode(utility, number, seed, lowest):
    """`encode`, as int32; `lowest` = 2^exponent, so that to divide by it is exact."""
    uniform = (random_bits(number, seed) >> 8).to(tl.float32) * (2.0**-24)
    code = 1.0 + _STEPS * tl.log2(tl.div_rn(tl.maximum(utility, lowest), lowest))
    code = tl.where(utility < lowest, tl.div_rn(utility, lowest), code)
    return tl.minimum(tl.maximum(tl.floor(code + uniform), 0.0), 255.0).to(tl.int32)


@triton.jit
def _without_bias(rest, count):
    """1 - beta^count for rest = 1 - beta; in float64, since little is left of it."""
    base = 1.0 - tl.full([1, 1], rest, tl.float32).to(tl.float64)
    power = tl.exp2(count.to(tl.float64) * tl.log2(base))
    return (1.0 - power).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "batch", "seed"])
def update_kernel(
    header,
    header_bytes,
    code_values,
    pool,
    first,
    second,
    steps,
    rows,
    counts,
    starts,
    order,
    bags,
    factors,
    grad,
    new,
    new_grads,
    nonfinite,
    num_rows,
    batch,
    grad_stride,
    row_words,
    seed,
    lr,
    eps,
    beta1,
    beta2,
    rest1,
    rest2,
    scale,
    lowest,
    GATHER: tl.constexpr,
    FACTORS: tl.constexpr,
    KEEP_NEW: tl.constexpr,
    KIND: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
    UTILITY: tl.constexpr,
    BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`apply_gradients` for BLOCK_R rows.

    With GATHER, `grad` is that of the output, and the gradients are summed here; without, it is
    [rows, D]. `first` is the state of Adagrad and the first of Adam's. STATE and UTILITY are words
    of a row. `rest1` is 1 - beta1.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)[None, :]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    here = r < num_rows
    row = tl.load(rows + r, mask=here, other=0).to(tl.int64)
    start = row[:, None] * row_words
    inside = here[:, None] & (k < CHUNKS)
    element = inside[:, :, None] & (c < WIDTH)
    own = r.to(tl.int64)[:, None, None] * (CHUNKS * WIDTH) + k[:, :, None] * WIDTH + c
    if GATHER:
        g = _sums(
            starts,
            order,
            bags,
            factors,
            grad,
            num_rows,
            batch,
            grad_stride,
            FACTORS,
            CHUNKS,
            WIDTH,
            BLOCK_R,
            BLOCK_P,
            BLOCK_K,
            BLOCK_C,
        )
    else:
        g = tl.load(grad + own, mask=element, other=0.0).to(tl.float32)
    bad = tl.max(tl.max((is_finite(g) == 0).to(tl.int32), 2), 1)
    num_bad = tl.sum(bad, 0)
    tl.atomic_add(nonfinite, num_bad, mask=num_bad > 0, sem="relaxed")

    slots = slots_of(header + start, here[:, None], k, SLAB, WIDE, CHUNKS)
    utility = read_utility(header, header_bytes, code_values, start, k, inside, UTILITY, BYTES)
    resident = element & (slots >= 0)[:, :, None]
    at = slots[:, :, None] * WIDTH + c
    state = header + row * row_words + STATE
    if OPTIMIZER != _NO_OPTIMIZER:
        value = tl.load(pool + at, mask=resident, other=0.0).to(tl.float32)
    if OPTIMIZER == _ROWWISE_ADAGRAD:
        row_sum = tl.load(state, mask=here, other=0).to(tl.float32, bitcast=True)
    elif OPTIMIZER == _ADAGRAD:
        total = tl.load(first + at, mask=resident, other=1.0)
    elif OPTIMIZER == _ADAM:
        step = tl.load(steps + slots, mask=slots >= 0, other=0.0)
        m = tl.load(first + at, mask=resident, other=0.0)
        v = tl.load(second + at, mask=resident, other=0.0)
    # several threads may hold the same word: all have read it before one of them writes it
    tl.debug_barrier()

    squares = tl.sum(g * g, 2)
    if KEEP_NEW:
        known = tl.max(((slots >= 0) | (utility != 0.0)).to(tl.int32), 1)
        is_new = here & (known == 0)
        tl.store(new + r, is_new.to(tl.uint8), mask=here)
        if GATHER:
            tl.store(new_grads + own, g, mask=element & is_new[:, None, None])
    if KIND != _NO_UTILITY:
        if KIND == _GRAD:
            gain = tl.sqrt_rn(squares)
        else:
            if GATHER:
                count = tl.load(starts + r + 1, mask=here, other=0)
                count -= tl.load(starts + r, mask=here, other=0)
            else:
                count = tl.load(counts + r, mask=here, other=0)
            gain = tl.zeros([BLOCK_R, BLOCK_K], tl.float32) + count.to(tl.float32)[:, None]
            if KIND != _FREQ:
                gain *= tl.sqrt_rn(squares)
        utility = tl.minimum(utility + gain * scale, _LARGEST)
        earns = inside & (bad == 0)[:, None]
        if BYTES == 4:
            place = header + start + UTILITY + k
            tl.store(place, utility.to(tl.int32, bitcast=True), mask=earns)
        else:
            code = _encode(utility, row[:, None] * CHUNKS + k, seed, lowest)
            place = header_bytes + (start + UTILITY) * 4 + k
            tl.store(place, code.to(tl.uint8), mask=earns)

    if OPTIMIZER != _NO_OPTIMIZER:
        if OPTIMIZER == _SGD:
            value -= lr * g
        elif OPTIMIZER == _ROWWISE_ADAGRAD:
            row_sum += tl.sum(squares, 1) / (CHUNKS * WIDTH)
            tl.store(state, row_sum.to(tl.int32, bitcast=True), mask=here)
            value -= tl.div_rn(lr * g, (tl.sqrt_rn(row_sum) + eps)[:, None, None])
        elif OPTIMIZER == _ADAGRAD:
            total += g * g
            tl.store(first + at, total, mask=resident)
            value -= tl.div_rn(lr * g, tl.sqrt_rn(total) + eps)
        elif OPTIMIZER == _ADAM:
            step += 1.0
            m = beta1 * m + rest1 * g
            v = beta2 * v + rest2 * (g * g)
            tl.store(steps + slots, step, mask=slots >= 0)
            tl.store(first + at, m, mask=resident)
            tl.store(second + at, v, mask=resident)
            m = m / _without_bias(rest1, step)[:, :, None]
            v = v / _without_bias(rest2, step)[:, :, None]
            value -= tl.div_rn(lr * m, tl.sqrt_rn(v) + eps)
        if pool.dtype.element_ty == tl.bfloat16:
            noise = random_bits(at, seed) >> 16
            bits = tl.add(value.to(tl.uint32, bitcast=True), noise, sanitize_overflow=False)
            rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
            value = tl.where(is_finite(value), rounded, value)
        tl.store(pool + at, value.to(pool.dtype.element_ty), mask=resident)
