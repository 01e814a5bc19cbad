# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""Which rows a call reads: checks of the indices, and the indices in the order of their rows.

Keys are sorted by PyTorch; all that the host waits for is one pair of numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkit_kernels.dynamic_embedding.reference import IndexOutOfRange

__all__ = [
    "READS",
    "Reads",
    "bag_bounds",
    "check_range",
    "count_bags",
    "locate_kernel",
    "reads_at_once",
    "rows_of",
    "sort_reads",
    "table_of",
]

READS = 8
"""Reads of a row that a program sums at once."""


@triton.jit
def table_of(tables, table, here):
    """First row, number of rows, and padding of each table."""
    first = tl.load(tables + table * 3, mask=here, other=0)
    size = tl.load(tables + table * 3 + 1, mask=here, other=0)
    padding = tl.load(tables + table * 3 + 2, mask=here, other=0)
    return first, size, padding


@triton.jit
def rows_of(indices, first, size, padding, first_wrong, at, here):
    """Row of the header and whether it counts, for the indices at `at`; wrong ones are reported."""
    index = tl.load(indices + at, mask=here, other=0).to(tl.int64)
    wrong = here & ((index < 0) | (index >= size))
    place = tl.min(tl.where(wrong, at, 0x7FFFFFFFFFFFFFFF), 0)
    tl.atomic_min(first_wrong, place, mask=tl.max(wrong.to(tl.int32), 0) != 0, sem="relaxed")
    return first + index, here & (wrong == 0) & (index != padding)


@triton.jit
def bag_bounds(offsets, bag, bags, bag_size, OFFSETS: tl.constexpr):
    """First index of each bag, and the end; equal for bags that are not there."""
    if OFFSETS:
        start = tl.load(offsets + bag, mask=bag < bags, other=0).to(tl.int64)
        end = tl.load(offsets + bag + 1, mask=bag < bags, other=0).to(tl.int64)
    else:
        start = bag.to(tl.int64) * bag_size
        end = tl.where(bag < bags, start + bag_size, start)
    return start, end


@triton.jit(do_not_specialize=["bags", "batch"])
def locate_kernel(
    tables,
    indices,
    offsets,
    weights,
    keys,
    bag_of,
    factors,
    first_wrong,
    bags,
    batch,
    bag_size,
    nowhere,
    OFFSETS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Row of each index (`nowhere` for padding and wrong ones), its bag, and its factor, if any."""
    bag = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    start, end = bag_bounds(offsets, bag, bags, bag_size, OFFSETS)
    p = tl.arange(0, BLOCK_P)[None, :]
    longest = tl.max(end - start, 0).to(tl.int32)
    q = tl.zeros([BLOCK_B, BLOCK_P], tl.int32)
    bag_q = (bag[:, None] + q).reshape([BLOCK_B * BLOCK_P])
    first, size, padding = table_of(tables, bag_q // batch, bag_q < bags)
    length = tl.zeros([BLOCK_B], tl.int32)
    for done in range(0, longest, BLOCK_P):
        at = start[:, None] + done + p
        here = (at < end[:, None]).reshape([BLOCK_B * BLOCK_P])
        at = at.reshape([BLOCK_B * BLOCK_P])
        row, counts = rows_of(indices, first, size, padding, first_wrong, at, here)
        tl.store(keys + at, tl.where(counts, row, nowhere).to(keys.dtype.element_ty), mask=here)
        tl.store(bag_of + at, bag_q, mask=here)
        if MEAN:
            length += tl.sum(counts.to(tl.int32).reshape([BLOCK_B, BLOCK_P]), 1)
    if WEIGHTS or MEAN:
        share = tl.full([BLOCK_B], 1.0, tl.float32)
        if MEAN:
            share = tl.div_rn(share, tl.maximum(length, 1).to(tl.float32))
        for done in range(0, longest, BLOCK_P):
            at = start[:, None] + done + p
            factor = share[:, None] + q.to(tl.float32)
            if WEIGHTS:
                factor *= tl.load(weights + at, mask=at < end[:, None], other=0.0).to(tl.float32)
            tl.store(factors + at, factor, mask=at < end[:, None])


class Reads(NamedTuple):
    """The indices of a call in the order of their rows.

    `order[starts[i] : starts[i + 1]]` are the positions that read `rows[i]`.
    """

    rows: Tensor
    starts: Tensor
    order: Tensor
    bags: Tensor
    factors: Tensor | None
    batch: int


def count_bags(indices: Tensor, offsets: Tensor | None, bag_size: int) -> int:
    """Return the number of bags of all tables."""
    return indices.numel() // bag_size if offsets is None else offsets.numel() - 1


def check_range(
    position: int,
    tables: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    batch: int,
) -> None:
    """Raise for the index at `position`, the first one outside its table, if there is one."""
    if position >= indices.numel():
        return
    if offsets is None:
        bag = position // bag_size
    else:
        bag = int(torch.searchsorted(offsets.cpu(), position, right=True)) - 1
    table = bag // batch
    raise IndexOutOfRange(table, int(indices[position]), int(tables[table, 1]))


def sort_reads(
    tables: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bag_size: int,
    weights: Tensor | None,
    mode: str,
) -> Reads:
    """Find the distinct rows of a call; one wait for the host."""
    device, num = indices.device, indices.numel()
    bags = count_bags(indices, offsets, bag_size)
    batch = max(bags // len(tables), 1)
    nowhere = int((tables[:, 0] + tables[:, 1]).max())
    key_type = torch.int32 if nowhere < 1 << 31 else torch.int64
    keys = torch.empty(num, dtype=key_type, device=device)
    bag_of = torch.empty(num, dtype=torch.int32, device=device)
    has_factors = weights is not None or mode == "mean"
    factors = torch.empty(num, dtype=torch.float32, device=device) if has_factors else None
    if num == 0:
        none = keys.long()
        return Reads(none, none.new_zeros(1), none, bag_of, factors, batch)
    first_wrong = torch.full((1,), num, dtype=torch.int64, device=device)
    block_p = reads_at_once(num, bags)
    block_b = 512 // block_p
    locate_kernel[(triton.cdiv(bags, block_b),)](
        tables.to(device),
        indices.contiguous(),
        offsets,
        None if weights is None else weights.contiguous(),
        keys,
        bag_of,
        factors,
        first_wrong,
        bags,
        batch,
        bag_size,
        nowhere,
        OFFSETS=offsets is not None,
        WEIGHTS=weights is not None,
        MEAN=mode == "mean",
        BLOCK_B=block_b,
        BLOCK_P=block_p,
    )
    keys, order = keys.sort(stable=True)
    segment = torch.zeros(num, dtype=torch.int64, device=device)
    torch.cumsum(keys[1:] != keys[:-1], 0, out=segment[1:])
    distinct = segment[-1:] + (keys[-1:] != nowhere)
    position, found = torch.cat([first_wrong, distinct]).tolist()
    check_range(position, tables, indices, offsets, bag_size, batch)
    starts = torch.searchsorted(segment, torch.arange(found + 1, device=device))
    return Reads(keys[starts[:-1]].long(), starts, order, bag_of, factors, batch)


def reads_at_once(num: int, groups: int) -> int:
    """Return the power of two that covers the mean size of a group, at most `READS`."""
    return min(triton.next_power_of_2(max(triton.cdiv(num, max(groups, 1)), 1)), READS)
