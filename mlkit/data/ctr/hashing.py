"""Text cells to ids by a keyed 64-bit mix: the same on every machine, whatever the chunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from mlkit.errors import InvalidValueError

__all__ = ["hash_cells", "mix64", "sizes_of"]


def mix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_cells(cells: np.ndarray, table_sizes: Sequence[int]) -> Int64[np.ndarray, "n tables"]:
    """Ids of text cells, each column with a key of its own.

    Equal cells of a column share an id, and so do cells that collide: about n² / 2 rows pairs of n
    different ones. An empty cell is a value like any other.

    Args:
        cells: (n, tables) of a bytes dtype, without NUL bytes.
        table_sizes: Rows of each table.
    """
    num, width = cells.shape
    num_words = -(-cells.itemsize // 8)
    padded = np.ascontiguousarray(cells.astype(f"S{8 * num_words}"))
    words = padded.view("<u8").reshape(num, width, num_words)
    keys = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = np.broadcast_to(mix64(keys), (num, width))
    for number in range(num_words):
        word = words[:, :, number]
        # words beyond the end of a cell change nothing, so neighbours may be longer
        state = np.where(word == 0, state, mix64(state ^ word))
    return (mix64(state) % np.asarray(table_sizes, dtype=np.uint64)).astype(np.int64)


def sizes_of(table_sizes: int | Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    """Rows of each table from one number for all, or one for each.

    Raises:
        InvalidValueError: If there are not as many as tables, or one is below 1.
    """
    sizes = [table_sizes] * len(names) if isinstance(table_sizes, int) else list(table_sizes)
    if len(sizes) != len(names) or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise InvalidValueError(
            f"table_sizes must be one integer of at least 1, or {len(names)} of them (for "
            f"{', '.join(names)}), got {table_sizes!r}"
        )
    return tuple(sizes)
