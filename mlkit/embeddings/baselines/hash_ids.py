"""A keyed hash of ids to a smaller range, in torch."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from mlkit.errors import InvalidValueError

__all__ = ["hash_ids"]

_BITS = 64


def _signed(word: int) -> int:
    """The int64 with these 64 bits."""
    word &= (1 << _BITS) - 1
    return word - (1 << _BITS) if word >> (_BITS - 1) else word


def _mix_int(x: int) -> int:
    mask = (1 << _BITS) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31


def _shifted(x: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (x >> count) & ((1 << (_BITS - count)) - 1)


def hash_ids(ids: Int[Tensor, "*shape"], seed: int, buckets: int) -> Int[Tensor, "*shape"]:
    """Map ids to 0 .. buckets - 1 by splitmix64 of (id xor splitmix64(seed)).

    The mixer is the output function of splitmix64 (Steele, Lea and Flood 2014). Its top bit is left
    out, and the remainder has a bias of at most buckets / 2^63.

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
    x = ids.long() ^ _signed(_mix_int(seed & ((1 << _BITS) - 1)))
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return (x & ((1 << (_BITS - 1)) - 1)) % buckets
