# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""Sparse expert MLP for decode on GPUs, 1 to 8 tokens: three launches, no wait for the host.

    router   bits[e] = bit m is set if token m runs expert e; programs over groups of experts
    gate_up  h[m, e, j] = act(gate . x) * (up . x) for the experts with a bit, programs over
             (expert, tile of neurons); a program without a bit leaves after one load. One further
             program lists the experts with a bit, in order, for the next launch: `selected`
    down     partial sums over (tile of channels, split of `selected`); the last program to arrive
             at a tile adds the splits in their order, so that the result does not depend on which
             one that is

The number of selected experts never leaves the device and every grid depends on shapes alone, so a
decode step can be captured in a CUDA graph. All sums are fp32. Bytes read are those of the union of
the tokens' experts, once for all tokens (tokens are columns in registers; `tl.dot` would need 16).

The spec's compaction in the router's launch needs a hand-over between programs there; as one more
program of the second launch it costs no launch and no atomics. Block sizes are chosen for about
4096 accumulators a program and have not been tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkit_kernels.sparse_mlp.reference import ACTIVATIONS

__all__ = ["MAX_EXPERTS", "sparse_mlp_triton"]

MAX_EXPERTS = 65536
"""The list of selected experts is made by one program."""

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_ACCUMULATORS = 4096


@triton.jit
def _activate(a, kind: tl.constexpr):
    if kind == 0:
        h = a / (1.0 + tl.exp(-a))
    elif kind == 1:
        h = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif kind == 2:
        # tanh(z) = 1 - 2 / (exp(2 z) + 1), which is right at both ends of exp's range
        z = 0.7978845608028654 * (a + 0.044715 * a * a * a)
        h = 0.5 * a * (2.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))
    elif kind == 3:
        h = a / (1.0 + tl.exp(-1.702 * a))
    elif kind == 4:
        h = tl.where(a < 0.0, 0.0, a)
    elif kind == 5:
        h = tl.where(a < 0.0, 0.0, a * a)
    elif kind == 6:
        h = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    else:
        h = 1.0 / (1.0 + tl.exp(-a))
    return h


@triton.jit
def _router_kernel(
    x,
    weight,
    bias,
    bits,
    threshold,
    tokens,
    experts,
    hidden,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    h = tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_H], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        c = start + h
        x_mh = tl.load(
            x + m[:, None] * hidden + c[None, :],
            mask=(m[:, None] < tokens) & (c[None, :] < hidden),
            other=0.0,
            eviction_policy="evict_last",
        ).to(tl.float32)
        w_eh = tl.load(
            weight + e[:, None].to(tl.int64) * hidden + c[None, :],
            mask=(e[:, None] < experts) & (c[None, :] < hidden),
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        acc += x_mh[:, None, :] * w_eh[None, :, :]
    logit = tl.sum(acc, 2)
    if BIAS:
        logit += tl.load(bias + e, mask=e < experts, other=0.0).to(tl.float32)[None, :]
    on = (logit > threshold) & (m[:, None] < tokens)  # false for NaN
    tl.store(bits + e, tl.sum(on.to(tl.int32) << m[:, None], 0), mask=e < experts)


@triton.jit
def _mask_kernel(
    mask,
    bits,
    tokens,
    experts,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (m[:, None] < tokens) & (e[None, :] < experts)
    on = tl.load(mask + m[:, None] * experts + e[None, :], mask=inside, other=0) != 0
    tl.store(bits + e, tl.sum(on.to(tl.int32) << m[:, None], 0), mask=e < experts)


@triton.jit
def _gate_up_kernel(
    x,
    weight,
    bias,
    bits,
    h_out,
    selected,
    count,
    arrived,
    tokens,
    experts,
    size,
    hidden,
    tiles,
    down_tiles,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if tl.program_id(0) == 0:  # list the selected experts; zero the counters of the next launch
        n = tl.arange(0, BLOCK_N)
        found = 0
        for start in range(0, experts, BLOCK_N):
            e = start + n
            on = (tl.load(bits + e, mask=e < experts, other=0) != 0).to(tl.int32)
            tl.store(selected + found + tl.cumsum(on, 0) - 1, e, mask=on != 0)
            found += tl.sum(on, 0)
        tl.store(count, found)
        d = tl.arange(0, BLOCK_D)
        tl.store(arrived + d, tl.zeros([BLOCK_D], tl.int32), mask=d < down_tiles)
    else:
        item = tl.program_id(0) - 1
        expert = item // tiles
        mask_bits = tl.load(bits + expert)
        if mask_bits != 0:
            m = tl.arange(0, BLOCK_M)
            j = (item % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
            c0 = tl.arange(0, BLOCK_H)
            rows = size * 2 if GATED else size
            first = expert.to(tl.int64) * rows
            acc = tl.zeros([BLOCK_M, BLOCK_R, BLOCK_H], tl.float32)
            acc_up = tl.zeros([BLOCK_M, BLOCK_R, BLOCK_H], tl.float32)
            for start in range(0, hidden, BLOCK_H):
                c = start + c0
                x_mh = tl.load(
                    x + m[:, None] * hidden + c[None, :],
                    mask=(m[:, None] < tokens) & (c[None, :] < hidden),
                    other=0.0,
                    eviction_policy="evict_last",
                ).to(tl.float32)
                inside = (j[:, None] < size) & (c[None, :] < hidden)
                w_rh = tl.load(
                    weight + (first + j[:, None]) * hidden + c[None, :],
                    mask=inside,
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)
                acc += x_mh[:, None, :] * w_rh[None, :, :]
                if GATED:
                    u_rh = tl.load(
                        weight + (first + size + j[:, None]) * hidden + c[None, :],
                        mask=inside,
                        other=0.0,
                        eviction_policy="evict_first",
                    ).to(tl.float32)
                    acc_up += x_mh[:, None, :] * u_rh[None, :, :]
            a = tl.sum(acc, 2)
            if BIAS:
                a += tl.load(bias + first + j, mask=j < size, other=0.0).to(tl.float32)[None, :]
            h = _activate(a, KIND)
            if GATED:
                u = tl.sum(acc_up, 2)
                if BIAS:
                    b = tl.load(bias + first + size + j, mask=j < size, other=0.0)
                    u += b.to(tl.float32)[None, :]
                h *= u
            on = ((mask_bits >> m) & 1)[:, None] != 0
            place = (m[:, None] * experts + expert) * size + j[None, :]
            tl.store(
                h_out + place,
                tl.where(on, h, 0.0),
                mask=(m[:, None] < tokens) & (j[None, :] < size),
            )


@triton.jit
def _down_kernel(
    h_in,
    weight,
    bias,
    selected,
    count,
    arrived,
    partial,
    y,
    tokens,
    experts,
    size,
    hidden,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    num = tl.load(count)
    acc = tl.zeros([BLOCK_M, BLOCK_S, BLOCK_C], tl.float32)
    for slot in range(split, num, SPLITS):
        expert = tl.load(selected + slot)
        for start in range(0, size, BLOCK_S):
            j = start + s
            h_ms = tl.load(
                h_in + (m[:, None] * experts + expert) * size + j[None, :],
                mask=(m[:, None] < tokens) & (j[None, :] < size),
                other=0.0,
            )
            d_sc = tl.load(
                weight + (expert.to(tl.int64) * size + j[:, None]) * hidden + c[None, :],
                mask=(j[:, None] < size) & (c[None, :] < hidden),
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            acc += h_ms[:, :, None] * d_sc[None, :, :]
    out = m[:, None] * hidden + c[None, :]
    inside = (m[:, None] < tokens) & (c[None, :] < hidden)
    tl.store(partial + split * tokens * hidden + out, tl.sum(acc, 1), mask=inside)
    tl.debug_barrier()  # all threads have stored before one of them says so
    before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
    if before == SPLITS - 1:
        tl.debug_barrier()
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for k in range(SPLITS):
            total += tl.load(
                partial + k * tokens * hidden + out, mask=inside, other=0.0, cache_modifier=".cg"
            )
        if BIAS:
            total += tl.load(bias + c, mask=c < hidden, other=0.0).to(tl.float32)[None, :]
        tl.store(y + out, total.to(y.dtype.element_ty), mask=inside)


def _block(accumulators: int, limit: int) -> int:
    """Return the power of two that covers `limit`, at least 16 and at most `accumulators`."""
    return max(16, min(accumulators, triton.next_power_of_2(limit)))


def sparse_mlp_triton(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gate_up: Tensor,
    down_t: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    mask: Tensor | None,
    threshold: float,
    activation: str,
) -> Tensor:
    """Run the three launches; the arguments are those of `sparse_mlp_reference`, checked before.

    Args:
        x: Tokens [M, H], M at most 8.
        router_weight: [N, H], N at most `MAX_EXPERTS`.
        router_bias: [N] or None.
        gate_up: [N, 2 S, H] with a gate, [N, S, H] without.
        down_t: [N, S, H].
        gate_up_bias: One number for each row of `gate_up`, or None.
        down_bias: [H] or None.
        mask: Experts of each token [M, N], instead of the router.
        threshold: A logit.
        activation: A key of `ACTIVATIONS`.
    """
    tokens, hidden = x.shape
    experts, size, _ = down_t.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if tokens == 0:
        return y
    gated = gate_up.shape[1] != size
    x, gate_up, down_t = (t.contiguous() for t in (x, gate_up, down_t))
    biases = [x if b is None else b.contiguous() for b in (router_bias, gate_up_bias, down_bias)]
    block_m = triton.next_power_of_2(tokens)
    lanes = _ACCUMULATORS // block_m
    block_e, block_r = 4, min(8, triton.next_power_of_2(size))
    block_c = _block(256, hidden)
    block_s = min(triton.next_power_of_2(size), max(1, 2 * lanes // block_c))
    tiles, down_tiles = triton.cdiv(size, block_r), triton.cdiv(hidden, block_c)
    processors = 132  # of an H100; a fixed number keeps the sums the same on every GPU
    splits = max(1, min(32, experts, 2 * processors // down_tiles))

    ints = torch.empty(2 * experts + 1 + down_tiles, dtype=torch.int32, device=x.device)
    bits, selected, count, arrived = ints.split([experts, experts, 1, down_tiles])
    h = torch.empty(tokens, experts, size, dtype=torch.float32, device=x.device)
    partial = torch.empty(splits, tokens, hidden, dtype=torch.float32, device=x.device)

    if mask is not None:
        _mask_kernel[(triton.cdiv(experts, 256),)](
            mask.contiguous().view(torch.uint8),
            bits,
            tokens,
            experts,
            BLOCK_M=block_m,
            BLOCK_E=256,
        )
    else:
        assert router_weight is not None, "router_weight or mask"
        _router_kernel[(triton.cdiv(experts, block_e),)](
            x,
            router_weight.contiguous(),
            biases[0],
            bits,
            float(threshold),
            tokens,
            experts,
            hidden,
            BIAS=router_bias is not None,
            BLOCK_M=block_m,
            BLOCK_E=block_e,
            BLOCK_H=_block(lanes // block_e, hidden),
        )
    _gate_up_kernel[(1 + experts * tiles,)](
        x,
        gate_up,
        biases[1],
        bits,
        h,
        selected,
        count,
        arrived,
        tokens,
        experts,
        size,
        hidden,
        tiles,
        down_tiles,
        GATED=gated,
        BIAS=gate_up_bias is not None,
        KIND=_CODES[activation],
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_H=_block(lanes // block_r, hidden),
        BLOCK_N=min(1024, triton.next_power_of_2(experts)),
        BLOCK_D=triton.next_power_of_2(down_tiles),
    )
    _down_kernel[(down_tiles, splits)](
        h,
        down_t,
        biases[2],
        selected,
        count,
        arrived,
        partial,
        y,
        tokens,
        experts,
        size,
        hidden,
        BIAS=down_bias is not None,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return y
