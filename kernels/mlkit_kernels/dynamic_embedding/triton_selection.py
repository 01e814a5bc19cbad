# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""Selection on GPUs: the histogram of the scores, and the chunks that may change sides.

    histogram    programs over (block of rows, table), one atomic increment for each counted score
    candidates   the same grid twice: how many chunks of a block are chosen; then, after a prefix
                 sum over the blocks, their numbers and scores, in order. One wait for the host
                 between them, for the two totals. Scores are made twice, so that nothing as long as
                 the header is stored

Not measured on a GPU yet, block sizes not tuned. One-byte utilities give few different scores, so
that many increments meet in few bins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from mlkit_kernels.dynamic_embedding.header import HeaderLayout
from mlkit_kernels.dynamic_embedding.selection import BINS, Candidates
from mlkit_kernels.dynamic_embedding.triton_header import levels, read_utility, resident_bits

__all__ = ["candidates_triton", "histogram_triton"]

_TILE = 1024
"""Chunks of a program."""


@triton.jit
def _scores(
    header,
    header_bytes,
    code_values,
    tables,
    inverse,
    row_words,
    SLAB: tl.constexpr,
    WIDE: tl.constexpr,
    UTILITY: tl.constexpr,
    BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Number, score, residence and existence of the chunks of this program, each [R, K]."""
    table = tl.program_id(1)
    first = tl.load(tables + table * 3)
    size = tl.load(tables + table * 3 + 1)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    exists = r < size
    start = (first + r) * row_words
    inside = exists & (k < CHUNKS)
    if PREFIX:
        utility = tl.full([BLOCK_R, BLOCK_K], float("inf"), tl.float32)
        for earlier in tl.static_range(CHUNKS):
            one = read_utility(
                header, header_bytes, code_values, start, earlier, exists, UTILITY, BYTES
            )
            utility = tl.where(k >= earlier, tl.minimum(utility, one), utility)
    else:
        utility = read_utility(header, header_bytes, code_values, start, k, inside, UTILITY, BYTES)
    score = utility * tl.load(inverse + table)
    bits, _ = resident_bits(header + start, exists, k, SLAB, WIDE, CHUNKS)
    return (first + r) * CHUNKS + k, score, bits != 0, inside


@triton.jit
def _histogram_kernel(
    header,
    header_bytes,
    code_values,
    tables,
    inverse,
    counts,
    row_words,
    within,
    SLAB: tl.constexpr,
    WIDE: tl.constexpr,
    UTILITY: tl.constexpr,
    BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
    PREFIX: tl.constexpr,
    RESIDENT: tl.constexpr,
    WITHIN: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    _, score, resident, counted = _scores(
        header,
        header_bytes,
        code_values,
        tables,
        inverse,
        row_words,
        SLAB,
        WIDE,
        UTILITY,
        BYTES,
        CHUNKS,
        PREFIX,
        BLOCK_R,
        BLOCK_K,
    )
    counted &= score > 0
    if RESIDENT:
        counted &= resident
    bits = score.to(tl.int32, bitcast=True)
    place = bits >> 16
    if WITHIN:
        counted &= place == within
        place = bits & 0xFFFF
    row = counts + tl.program_id(1).to(tl.int64) * NUM_BINS
    one = tl.full([BLOCK_R, BLOCK_K], 1, tl.int64)
    tl.atomic_add(row + place, one, mask=counted, sem="relaxed")


@triton.jit
def _candidates_kernel(
    header,
    header_bytes,
    code_values,
    tables,
    inverse,
    found,
    evict,
    evict_scores,
    admit,
    admit_scores,
    row_words,
    low,
    high,
    SLAB: tl.constexpr,
    WIDE: tl.constexpr,
    UTILITY: tl.constexpr,
    BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
    PREFIX: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write how many are chosen to `found` [2, tables, blocks], or find there where they go."""
    number, score, resident, inside = _scores(
        header,
        header_bytes,
        code_values,
        tables,
        inverse,
        row_words,
        SLAB,
        WIDE,
        UTILITY,
        BYTES,
        CHUNKS,
        PREFIX,
        BLOCK_R,
        BLOCK_K,
    )
    leave = (inside & resident & (score < low)).reshape([BLOCK_R * BLOCK_K])
    come = (inside & (resident == 0) & (score > high)).reshape([BLOCK_R * BLOCK_K])
    blocks = tl.num_programs(0).to(tl.int64)
    block = found + tl.program_id(1) * blocks + tl.program_id(0)
    other = block + tl.num_programs(1) * blocks
    if STORE:
        number = number.reshape([BLOCK_R * BLOCK_K])
        score = score.reshape([BLOCK_R * BLOCK_K])
        place = tl.load(block) + tl.cumsum(leave.to(tl.int32), 0) - 1
        tl.store(evict + place, number, mask=leave)
        tl.store(evict_scores + place, score, mask=leave)
        place = tl.load(other) + tl.cumsum(come.to(tl.int32), 0) - 1
        tl.store(admit + place, number, mask=come)
        tl.store(admit_scores + place, score, mask=come)
    else:
        tl.store(block, tl.sum(leave.to(tl.int32), 0).to(tl.int64))
        tl.store(other, tl.sum(come.to(tl.int32), 0).to(tl.int64))


def _constants(
    header: Tensor, layout: HeaderLayout, num_chunks: int, prefix: bool
) -> dict[str, int | bool]:
    block_k = triton.next_power_of_2(num_chunks)
    return {
        "SLAB": bool(layout.slab),
        "WIDE": bool(layout.wide),
        "UTILITY": layout.address_words(num_chunks) + layout.row_state,
        "BYTES": layout.utility_bytes,
        "CHUNKS": num_chunks,
        "PREFIX": prefix,
        "BLOCK_R": max(_TILE // block_k, 1),
        "BLOCK_K": block_k,
    }


def histogram_triton(
    header: Int[Tensor, "rows words"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Float[Tensor, " tables"],
    exponent: int = 0,
    prefix: bool = False,
    resident_only: bool = False,
    within: int = -1,
) -> Int[Tensor, "tables 65536"]:
    """Count positive scores as `histogram_reference` does; no wait for the host."""
    device = header.device
    counts = torch.zeros(len(tables), BINS, dtype=torch.int64, device=device)
    constants = _constants(header, layout, num_chunks, prefix)
    blocks = triton.cdiv(_largest(tables), int(constants["BLOCK_R"]))
    if blocks:
        _histogram_kernel[(blocks, len(tables))](
            header,
            header.view(torch.uint8),
            levels(exponent, device),
            tables.to(device),
            inverse.to(device, torch.float32),
            counts,
            header.stride(0),
            within,
            **constants,
            RESIDENT=resident_only,
            WITHIN=within >= 0,
            NUM_BINS=BINS,
        )
    return counts


def candidates_triton(
    header: Int[Tensor, "rows words"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Float[Tensor, " tables"],
    low: float,
    high: float,
    exponent: int = 0,
    prefix: bool = False,
) -> Candidates:
    """Find chunks that may change sides as `candidates_reference` does."""
    device = header.device
    constants = _constants(header, layout, num_chunks, prefix)
    blocks = triton.cdiv(_largest(tables), int(constants["BLOCK_R"]))
    found = torch.zeros(2, len(tables) * blocks, dtype=torch.int64, device=device)

    def launch(place: Tensor, *chosen: Tensor | None) -> None:
        _candidates_kernel[(blocks, len(tables))](
            header,
            header.view(torch.uint8),
            levels(exponent, device),
            tables.to(device),
            inverse.to(device, torch.float32),
            place,
            *chosen,
            header.stride(0),
            low,
            high,
            **constants,
            STORE=chosen[0] is not None,
        )

    if blocks:
        launch(found, None, None, None, None)
    ends = found.cumsum(1)
    num_evict, num_admit = found.sum(1).tolist()
    chosen = Candidates(
        header.new_empty(num_evict, dtype=torch.int64),
        header.new_empty(num_evict, dtype=torch.float32),
        header.new_empty(num_admit, dtype=torch.int64),
        header.new_empty(num_admit, dtype=torch.float32),
    )
    if num_evict or num_admit:
        launch(ends - found, *chosen)
    return chosen


def _largest(tables: Tensor) -> int:
    """Rows of the largest table; `tables` is on the CPU."""
    return int(tables[:, 1].max()) if len(tables) else 0
