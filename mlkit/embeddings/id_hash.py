"""Hashing of ids, for every table that maps them to fewer rows."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from mlkit.errors import InvalidValueError

__all__ = ["hash_ids", "mix"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(word: int) -> int:
    """The int64 with these 64 bits."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _mix_seed(seed: int) -> int:
    x = (seed + _GOLDEN) & _MASK
    for shift, factor in _ROUNDS:
        x = (x ^ x >> shift) * factor & _MASK
    return x ^ x >> 31


def _shifted(x: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return x >> count & ((1 << (64 - count)) - 1)


def mix(ids: Int[Tensor, "*shape"], seed: int) -> Int[Tensor, "*shape"]:
    """63 well mixed bits of each 64-bit id, int64 and not negative: a bijection but for one bit.

    splitmix64(id xor splitmix64(seed)) without its top bit; the mixer is the output function of
    splitmix64 (Steele, Lea and Flood 2014; public domain).
    """
    x = (ids.long() ^ _signed(_mix_seed(seed & _MASK))) + _signed(_GOLDEN)
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return (x ^ _shifted(x, 31)) & (_MASK >> 1)


def hash_ids(ids: Int[Tensor, "*shape"], seed: int, buckets: int) -> Int[Tensor, "*shape"]:
    """Map ids to 0 .. buckets - 1 by `mix`; the bias is at most buckets / 2^63.

    Args:
        ids: Any integers; equal ones share a bucket.
        seed: Another seed, another hash.
        buckets: At least 1.

    Returns:
        int64.

    Raises:
        InvalidValueError: For less than one bucket.
    """
    if buckets < 1:
        raise InvalidValueError(f"buckets must be at least 1, got {buckets}")
    return mix(ids, seed) % buckets
