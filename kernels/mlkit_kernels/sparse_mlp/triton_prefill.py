# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""Sparse expert MLP for prompts on GPUs, more than 8 tokens: no wait for the host, no atomics.

    route    mask[m, e] = router . x > threshold, programs over (tile of tokens, tile of experts)
    group    for each expert its tokens, for each tile of tokens its experts, in order; one program
             for each list
    gate_up  h[m, e, j] of the selected pairs: programs over (expert, block of its tokens, tile of
             neurons); one beyond the end of the list leaves after one load
    down     y of a tile of tokens and of channels: a loop over the tile's experts

Work in `gate_up` is that of the selected pairs, rounded up to blocks of tokens. In `down` it is
that of the union of a tile's experts, which for many independent tokens is nearly all of them: past
`TILED_DOWN_TOKENS` a dense GEMM on the masked values takes its place, which is as deterministic.
All sums are fp32, h is rounded to the weights' type. Block sizes have not been tuned.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkit_kernels.sparse_mlp.reference import ACTIVATIONS
from mlkit_kernels.sparse_mlp.triton import _activate

__all__ = ["TILED_DOWN_TOKENS", "sparse_mlp_prefill"]

TILED_DOWN_TOKENS = 128
"""Tokens up to which the down projection skips experts; not measured on a GPU yet."""

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


@triton.jit
def _product(a, b, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _route_kernel(
    x,
    weight,
    bias,
    mask,
    threshold,
    tokens,
    experts,
    hidden,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    h = tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        c = start + h
        x_mh = tl.load(
            x + m[:, None].to(tl.int64) * hidden + c[None, :],
            mask=(m[:, None] < tokens) & (c[None, :] < hidden),
            other=0.0,
        )
        w_he = tl.load(
            weight + e[None, :].to(tl.int64) * hidden + c[:, None],
            mask=(e[None, :] < experts) & (c[:, None] < hidden),
            other=0.0,
        )
        acc += _product(x_mh, w_he, WIDEN)
    if BIAS:
        acc += tl.load(bias + e, mask=e < experts, other=0.0).to(tl.float32)[None, :]
    on = acc > threshold  # false for NaN
    inside = (m[:, None] < tokens) & (e[None, :] < experts)
    tl.store(mask + m[:, None] * experts + e[None, :], on.to(tl.uint8), mask=inside)


@triton.jit
def _group_kernel(
    mask,
    token_list,
    token_count,
    expert_list,
    expert_count,
    tokens,
    experts,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    found = 0
    if row < experts:  # the tokens of an expert
        for start in range(0, tokens, BLOCK):
            m = start + n
            on = tl.load(mask + m * experts + row, mask=m < tokens, other=0).to(tl.int32)
            place = token_list + row.to(tl.int64) * tokens + found + tl.cumsum(on, 0) - 1
            tl.store(place, m, mask=on != 0)
            found += tl.sum(on, 0)
        tl.store(token_count + row, found)
    else:  # the experts of a tile of tokens
        tile = row - experts
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        for start in range(0, experts, BLOCK):
            e = start + n
            inside = (m[:, None] < tokens) & (e[None, :] < experts)
            bits = tl.load(mask + m[:, None] * experts + e[None, :], mask=inside, other=0)
            on = tl.max(bits.to(tl.int32), 0)
            place = expert_list + tile * experts + found + tl.cumsum(on, 0) - 1
            tl.store(place, e, mask=on != 0)
            found += tl.sum(on, 0)
        tl.store(expert_count + tile, found)


@triton.jit
def _gate_up_kernel(
    x,
    weight,
    bias,
    token_list,
    token_count,
    h_out,
    tokens,
    experts,
    size,
    hidden,
    tiles,
    blocks,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    item = tl.program_id(0) // blocks  # the blocks of an expert follow one another
    expert = item // tiles
    first_slot = (tl.program_id(0) % blocks) * BLOCK_M
    count = tl.load(token_count + expert)
    if first_slot < count:
        slot = first_slot + tl.arange(0, BLOCK_M)
        here = slot < count
        m = tl.load(token_list + expert.to(tl.int64) * tokens + slot, mask=here, other=0)
        m = m.to(tl.int64)
        j = (item % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
        c0 = tl.arange(0, BLOCK_H)
        rows = size * 2 if GATED else size
        first = expert.to(tl.int64) * rows
        acc = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        acc_up = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        for start in range(0, hidden, BLOCK_H):
            c = start + c0
            x_mh = tl.load(
                x + m[:, None] * hidden + c[None, :],
                mask=here[:, None] & (c[None, :] < hidden),
                other=0.0,
            )
            inside = (j[None, :] < size) & (c[:, None] < hidden)
            w_hs = tl.load(
                weight + (first + j[None, :]) * hidden + c[:, None], mask=inside, other=0.0
            )
            x_mh = x_mh.to(w_hs.dtype)
            acc += _product(x_mh, w_hs, WIDEN)
            if GATED:
                u_hs = tl.load(
                    weight + (first + size + j[None, :]) * hidden + c[:, None],
                    mask=inside,
                    other=0.0,
                )
                acc_up += _product(x_mh, u_hs, WIDEN)
        if BIAS:
            acc += tl.load(bias + first + j, mask=j < size, other=0.0).to(tl.float32)[None, :]
        h = _activate(acc, KIND)
        if GATED:
            if BIAS:
                b = tl.load(bias + first + size + j, mask=j < size, other=0.0)
                acc_up += b.to(tl.float32)[None, :]
            h *= acc_up
        out = (m[:, None] * experts + expert) * size + j[None, :]
        tl.store(
            h_out + out, h.to(h_out.dtype.element_ty), mask=here[:, None] & (j[None, :] < size)
        )


@triton.jit
def _down_kernel(
    h_in,
    weight,
    bias,
    mask,
    expert_list,
    expert_count,
    y,
    tokens,
    experts,
    size,
    hidden,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = m < tokens
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    num = tl.load(expert_count + tile)
    for slot in range(num):
        expert = tl.load(expert_list + tile * experts + slot)
        on = tl.load(mask + m * experts + expert, mask=here, other=0) != 0
        for start in range(0, size, BLOCK_S):
            j = start + s
            h_ms = tl.load(
                h_in + (m[:, None].to(tl.int64) * experts + expert) * size + j[None, :],
                mask=on[:, None] & (j[None, :] < size),
                other=0.0,
            )
            d_sc = tl.load(
                weight + (expert.to(tl.int64) * size + j[:, None]) * hidden + c[None, :],
                mask=(j[:, None] < size) & (c[None, :] < hidden),
                other=0.0,
            )
            acc += _product(h_ms, d_sc, WIDEN)
    if BIAS:
        acc += tl.load(bias + c, mask=c < hidden, other=0.0).to(tl.float32)[None, :]
    out = m[:, None].to(tl.int64) * hidden + c[None, :]
    tl.store(y + out, acc.to(y.dtype.element_ty), mask=here[:, None] & (c[None, :] < hidden))


def _tile(limit: int, most: int) -> int:
    """Return the power of two that covers `limit`, at most `most`; `tl.dot` needs 16."""
    return max(16, min(most, triton.next_power_of_2(limit)))


def sparse_mlp_prefill(
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
    """Run the launches; the arguments are those of `sparse_mlp_reference`, checked before.

    Memory besides: M N bytes for the mask, 4 M N for the lists, and h [M, N, S] in the weights'
    type, which a dense layer has, too.

    Args:
        x: Tokens [M, H].
        router_weight: [N, H], or None if there is a mask.
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
    device = x.device
    x, gate_up, down_t = (t.contiguous() for t in (x, gate_up, down_t))
    biases = [x if b is None else b.contiguous() for b in (router_bias, gate_up_bias, down_bias)]
    # which multiplies the bits of bf16 as integers
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    block_m = _tile(tokens, 64)
    block_h = _tile(hidden, 64)
    token_tile = 16  # the fewer tokens, the fewer experts in their union
    token_tiles = triton.cdiv(tokens, token_tile)
    if mask is not None:
        chosen = mask.contiguous().view(torch.uint8)
    else:
        assert router_weight is not None, "router_weight or mask"
        chosen = torch.empty(tokens, experts, dtype=torch.uint8, device=device)
        block_e = _tile(experts, 64)
        _route_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(experts, block_e))](
            x,
            router_weight.contiguous(),
            biases[0],
            chosen,
            float(threshold),
            tokens,
            experts,
            hidden,
            BIAS=router_bias is not None,
            BLOCK_M=block_m,
            BLOCK_E=block_e,
            BLOCK_H=block_h,
            WIDEN=is_interpreted or router_weight.dtype != x.dtype,
        )
    token_list = torch.empty(experts, tokens, dtype=torch.int32, device=device)
    expert_list = torch.empty(token_tiles, experts, dtype=torch.int32, device=device)
    counts = torch.empty(experts + token_tiles, dtype=torch.int32, device=device)
    token_count, expert_count = counts.split([experts, token_tiles])
    is_tiled = tokens <= TILED_DOWN_TOKENS
    _group_kernel[(experts + (token_tiles if is_tiled else 0),)](
        chosen,
        token_list,
        token_count,
        expert_list,
        expert_count,
        tokens,
        experts,
        BLOCK=256,
        BLOCK_M=token_tile,
    )
    make = torch.empty if is_tiled else torch.zeros  # a GEMM reads all of it
    h = make(tokens, experts, size, dtype=gate_up.dtype, device=device)
    block_s = _tile(size, 32)
    tiles = triton.cdiv(size, block_s)
    blocks = triton.cdiv(tokens, block_m)
    _gate_up_kernel[(experts * tiles * blocks,)](
        x,
        gate_up,
        biases[1],
        token_list,
        token_count,
        h,
        tokens,
        experts,
        size,
        hidden,
        tiles,
        blocks,
        GATED=gate_up.shape[1] != size,
        BIAS=gate_up_bias is not None,
        KIND=_CODES[activation],
        BLOCK_M=block_m,
        BLOCK_S=block_s,
        BLOCK_H=block_h,
        WIDEN=is_interpreted,
    )
    if not is_tiled:
        y = h.flatten(1) @ down_t.flatten(0, 1)
        return (y if down_bias is None else y + down_bias).to(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_c = _tile(hidden, 128)
    _down_kernel[(token_tiles, triton.cdiv(hidden, block_c))](
        h,
        down_t,
        biases[2],
        chosen,
        expert_list,
        expert_count,
        y,
        tokens,
        experts,
        size,
        hidden,
        BIAS=down_bias is not None,
        BLOCK_M=token_tile,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        WIDEN=is_interpreted,
    )
    return y
