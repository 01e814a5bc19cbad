# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""The header of a dynamic embedding in Triton: addresses, utilities, random bits; see `header.py`.

Words are read as int32, since a row may begin at any word: a 64-bit address is two loads. The
float32 of a word is its bits; one-byte utilities are read through a uint8 view of the header.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlkit_kernels.dynamic_embedding.header import _mix, decode

__all__ = [
    "address_word",
    "is_finite",
    "levels",
    "lower_word",
    "random_bits",
    "read_utility",
    "resident_bits",
    "seed_bits",
    "slots_of",
]


@functools.lru_cache(maxsize=64)
def levels(exponent: int, device: torch.device) -> Tensor:
    """Utilities of the 256 codes: a look-up gives the reference's very numbers, `exp2` need not."""
    return decode(torch.arange(256, dtype=torch.uint8, device=device), exponent)


def seed_bits(seed: int) -> int:
    """Hash of a seed as a signed 32-bit number, one type for the compiler whatever its value."""
    bits = int(_mix(torch.tensor(seed & 0xFFFFFFFF)))
    return bits - (bits >> 31 << 32)


@triton.jit
def random_bits(number, seed):
    """`uniform_bits`; `seed` comes from `seed_bits`."""
    x = number.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def is_finite(x):
    """False for NaN and the infinities."""
    return tl.abs(x) < float("inf")


@triton.jit
def lower_word(word):
    """The word as an unsigned number, int64."""
    return word.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def address_word(words, which, here, absent: tl.constexpr, WIDE: tl.constexpr):
    """Address number `which` of the rows at `words`, int64, with the sign of its last word."""
    if WIDE:
        low = tl.load(words + 2 * which, mask=here, other=absent)
        high = tl.load(words + 2 * which + 1, mask=here, other=absent)
        address = (high.to(tl.int64) << 32) | lower_word(low)
    else:
        address = tl.load(words + which, mask=here, other=absent).to(tl.int64)
    return address


@triton.jit
def resident_bits(words, here, k, SLAB: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr):
    """1 where chunk k [1, K] of the row at `words` [R, 1] has storage.

    And its address for `slab`, its slot for `chunk`, int64.
    """
    if SLAB:
        address = address_word(words, 0, here, 0, WIDE)
        if not WIDE:
            address = address & 0xFFFFFFFF
        bits = tl.where(here & (k < CHUNKS), (address >> k) & 1, 0)
    else:
        address = address_word(words, k, here & (k < CHUNKS), -1, WIDE)
        bits = (address >= 0).to(tl.int64)
    return bits, address


@triton.jit
def slots_of(words, here, k, SLAB: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr):
    """Slots [R, K], int64; -1 where a chunk is not resident, and outside of `here` and of K."""
    bits, slots = resident_bits(words, here, k, SLAB, WIDE, CHUNKS)
    if SLAB:
        slots = tl.where(bits != 0, (slots >> CHUNKS) + tl.cumsum(bits, 1) - 1, -1)
    return slots


@triton.jit
def read_utility(
    header,
    header_bytes,
    code_values,
    row_start,
    k,
    here,
    FIRST: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Utilities, float32, and 0 outside of `here`.

    Args:
        header: Its words.
        header_bytes: The same memory as bytes.
        code_values: See `levels`.
        row_start: First word of each row, int64.
        k: The chunk.
        here: Mask.
        FIRST: The word of a row in which its utilities begin.
        BYTES: 4 or 1.
    """
    if BYTES == 4:
        word = tl.load(header + row_start + FIRST + k, mask=here, other=0)
        utility = word.to(tl.float32, bitcast=True)
    else:
        code = tl.load(header_bytes + (row_start + FIRST) * 4 + k, mask=here, other=0)
        utility = tl.load(code_values + code.to(tl.int32), mask=here, other=0.0)
    return utility
