"""Splits by whole documents: keyed by content where they are ours, never inside a document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

__all__ = ["hold_out", "keyed_fraction", "keyed_order"]


def keyed_fraction(key: str, salt: str = "") -> float:
    """Return a number in [0, 1) that depends on the key alone, the same on every machine.

    Args:
        key: What identifies the document.
        salt: Names the split, so that two splits of the same keys are independent.
    """
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def keyed_order(keys: Iterable[str], salt: str = "") -> list[int]:
    """Return the positions of the keys in the order of their `keyed_fraction`."""
    fractions = [keyed_fraction(key, salt) for key in keys]
    return sorted(range(len(fractions)), key=lambda i: (fractions[i], i))


def hold_out(sizes: Sequence[int], fraction: float, order: Iterable[int]) -> list[int]:
    """Choose whole documents that make up a share of all, and never more than it.

    Documents are taken in the given order; one that would go over the share is passed over.

    Args:
        sizes: Size of each document, in any unit.
        fraction: The share, in [0, 1].
        order: Positions in `sizes`.

    Returns:
        The chosen positions, ascending.

    Example:
        >>> hold_out([4, 30, 6, 60], 0.1, order=[1, 2, 0, 3])
        [0, 2]
    """
    left = fraction * sum(sizes)
    chosen = []
    for position in order:
        if sizes[position] <= left:
            left -= sizes[position]
            chosen.append(position)
    return sorted(chosen)
