"""The header of a dynamic embedding: what each virtual row knows, in 32-bit words.

    word 0 .. A-1   where the row's chunks are (the layout decides, see below)
    word A          state of a row-wise optimizer, float32 (only where there is one)
    then            the utilities of its K chunks: float32 each, or one byte each, four to a word

Layout `chunk`: one physical index for each chunk, -1 where it has none; A = K. Layout `slab`: one
address `base << K | mask`, whose mask has a bit for each resident chunk, and these lie one after
the other in the pool from slot `base` on; A = 1. Addresses are 32 bits wide (those of `slab` are
unsigned), or 64 (A doubles) where a pool has more slots than 32 bits can name. All of a row lies
together since a lookup reads all of it: one line of the cache, not four.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LARGEST", "STEPS_PER_OCTAVE", "HeaderLayout", "decode", "encode", "uniform_bits"]

LARGEST = torch.finfo(torch.float32).max
"""Of a utility: a finite gradient may have a norm beyond it, and infinities have no order."""
STEPS_PER_OCTAVE = 8
"""Codes between a utility and its double, where a utility is one byte: 9 % from code to code."""

_U32 = 0xFFFFFFFF


class HeaderLayout(NamedTuple):
    """How a header's words are read; the ops take its fields as four integers.

    Args:
        slab: 1 for layout `slab`, 0 for layout `chunk`.
        wide: 1 for 64-bit addresses.
        row_state: Words of a row-wise optimizer's state: 0 or 1.
        utility_bytes: 4 (float32) or 1 (logarithmic).
    """

    slab: int
    wide: int
    row_state: int
    utility_bytes: int

    @classmethod
    def of(
        cls,
        layout: Literal["slab", "chunk"],
        *,
        num_chunks: int,
        num_slots: int,
        row_state: bool,
        utility_bytes: int,
    ) -> HeaderLayout:
        """Choose the narrowest addresses for a pool of `num_slots` slots."""
        limit = 1 << (32 - num_chunks) if layout == "slab" else 1 << 31
        return cls(int(layout == "slab"), int(num_slots > limit), int(row_state), utility_bytes)

    def address_words(self, num_chunks: int) -> int:
        """Words that say where the chunks are."""
        return (1 if self.slab else num_chunks) * (1 + self.wide)

    def words(self, num_chunks: int) -> int:
        """Words of a row, four bytes each; an even number where addresses have 64 bits."""
        utilities = num_chunks if self.utility_bytes == 4 else -(-num_chunks // 4)
        found = self.address_words(num_chunks) + self.row_state + utilities
        return found + (found % 2 if self.wide else 0)

    def addresses(self, header: Int[Tensor, "rows words"], num_chunks: int) -> Tensor:
        """View of the addresses, int32 or int64: [rows, 1] in `slab`, [rows, K] in `chunk`."""
        words = header[:, : self.address_words(num_chunks)]
        return words.view(torch.int64) if self.wide else words

    def state(self, header: Int[Tensor, "rows words"], num_chunks: int) -> Float[Tensor, " rows"]:
        """View of the row-wise optimizer's state."""
        return header.view(torch.float32)[:, self.address_words(num_chunks)]

    def utilities(self, header: Int[Tensor, "rows words"], num_chunks: int) -> Tensor:
        """View of the utilities as they are stored, [rows, K]: float32, or uint8 codes."""
        start = self.address_words(num_chunks) + self.row_state
        if self.utility_bytes == 4:
            return header.view(torch.float32)[:, start : start + num_chunks]
        return header.view(torch.uint8)[:, 4 * start : 4 * start + num_chunks]

    def slots(self, addresses: Int[Tensor, "rows words"], num_chunks: int) -> Tensor:
        """Slots of the chunks from some rows' addresses, int64 [rows, K]; -1: not resident."""
        if not self.slab:
            return addresses.long()
        address = addresses.long() if self.wide else addresses.long() & _U32
        bits = torch.arange(num_chunks, device=addresses.device)
        resident = address >> bits & 1
        slots = (address >> num_chunks) + resident.cumsum(1) - 1
        return torch.where(resident.bool(), slots, -1)

    def unpack(self, addresses: Int[Tensor, " rows"], num_chunks: int) -> tuple[Tensor, Tensor]:
        """Return first slots and masks (int64) of the one column of addresses of `slab`."""
        address = addresses.long() if self.wide else addresses.long() & _U32
        return address >> num_chunks, address & (1 << num_chunks) - 1

    def pack(
        self, base: Int[Tensor, " rows"], mask: Int[Tensor, " rows"], num_chunks: int
    ) -> Tensor:
        """Addresses of `slab`, [rows, 1], from the first slot and the mask of each row (int64)."""
        address = (base << num_chunks | mask).unsqueeze(1)
        return address if self.wide else (address - (address >> 31 << 32)).int()


def uniform_bits(number: Int[Tensor, "*shape"], seed: int) -> Int[Tensor, "*shape"]:
    """A random 32-bit number for each (number, seed), the same on every machine.

    The integer hash is Wellons' `lowbias32` (public domain), of the number xor the seed's hash.

    Args:
        number: Any integers; their low 32 bits count.
        seed: Its low 32 bits count.

    """
    start = torch.full((), seed & _U32, dtype=torch.int64, device=number.device)
    return _mix(number & _U32 ^ _mix(start))


def _mix(x: Tensor) -> Tensor:
    x = x ^ x >> 16
    x = x * 0x7FEB352D & _U32
    x = x ^ x >> 15
    x = x * 0x846CA68B & _U32
    return x ^ x >> 16


def encode(
    utility: Float[Tensor, "rows chunks"],
    number: Int[Tensor, "rows chunks"],
    seed: int,
    exponent: int,
) -> Tensor:
    """One-byte codes of utilities: 0 for zero, else 1 + 8 log2(u / 2^exponent), up to 255.

    The fraction is rounded up with its own probability, so that increments far below a code's step
    still count on average. A utility below the first code becomes 1 or 0, in proportion.

    Args:
        utility: Not negative, finite.
        number: Identifies each chunk to the random rounding.
        seed: Changes from step to step.
        exponent: The utility of code 1 is 2^exponent.
    """
    # 24 bits, so that float32 holds the fraction and it is below 1: zero stays zero.
    uniform = (uniform_bits(number, seed) >> 8).float() * 2.0**-24
    lowest = 2.0**exponent
    code = 1 + STEPS_PER_OCTAVE * torch.log2(utility.clamp_min(lowest) / lowest)
    code = torch.where(utility < lowest, utility / lowest, code)
    return torch.floor(code + uniform).clamp(0, 255).to(torch.uint8)


def decode(code: Tensor, exponent: int) -> Float[Tensor, "rows chunks"]:
    """Utilities of one-byte codes, the inverse of `encode` without its rounding."""
    codes = torch.arange(256, dtype=torch.float32, device=code.device)
    value = torch.where(codes == 0, 0.0, torch.exp2((codes - 1) / STEPS_PER_OCTAVE + exponent))
    return value[code.long()]  # so that a code has one value, wherever it stands
