"""Random choice without replacement whose outcome hangs on (seed, id) alone.

Every example owns the number `keyed_hash(id, seed)`; a draw of `b` from a stratum takes the `b`
smallest. So the result does not depend on the order of the data, on chunks, threads or the library
that holds the array, and it can be made in passes over chunks. Source: our decision.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Integer, UInt64

__all__ = ["CHUNK", "draw", "keyed_hash", "populations", "uniform"]

CHUNK = 1 << 17
"""Rows handled at once: temporaries of 1 MB stay in the cache and bound the memory."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _splitmix64(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Output function of splitmix64 (Steele, Lea, Flood 2014); a bijection, works in place."""
    x += np.uint64(_GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keyed_hash(ids: Integer[np.ndarray, " n"], seed: int) -> UInt64[np.ndarray, " n"]:
    """Return splitmix64(id XOR splitmix64(seed)): distinct for distinct ids of one seed."""
    key = _splitmix64(np.array([int(seed) & _MASK], dtype=np.uint64))
    return _splitmix64(ids.astype(np.uint64) ^ key)


def uniform(ids: Integer[np.ndarray, " n"], seed: int) -> Float[np.ndarray, " n"]:
    """Return one number of the open interval (0, 1) per id, from the same hash."""
    return ((keyed_hash(ids, seed) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _ids(ids: Integer[np.ndarray, " n"] | None, start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.int64) if ids is None else ids[start:stop]


def _smallest(
    positions: np.ndarray, hashes: UInt64[np.ndarray, " c"], count: int
) -> Int[np.ndarray, " b"]:
    """Positions of the `count` smallest hashes; equal hashes (equal ids) by position."""
    return positions[np.lexsort((positions, hashes))[:count]]


def populations(strata: Integer[np.ndarray, " n"], num_strata: int) -> Int[np.ndarray, " k"]:
    """Members of each stratum 0 .. num_strata - 1; higher codes are in none."""
    counts = np.zeros(num_strata, dtype=np.int64)
    for start in range(0, len(strata), CHUNK):
        counts += np.bincount(strata[start : start + CHUNK], minlength=num_strata)[:num_strata]
    return counts


def draw(
    strata: Integer[np.ndarray, " n"],
    budgets: Int[np.ndarray, " k"],
    seed: int,
    ids: Integer[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " m"]:
    """Draw `budgets[b]` members of every stratum `b`, uniformly and without replacement.

    One pass over the hashes: a member is taken at once when its hash lies safely below the
    budget's share of the hash range, left at once when safely above, and only the few in between
    are kept to be ranked exactly. (Six standard deviations of slack; a stratum that falls outside
    is ranked whole.)

    Args:
        strata: Stratum of each example; `len(budgets)` and above mean "in none".
        budgets: How many to take of each stratum, at most its population.
        seed: Any integer.
        ids: Identity of each example, its index unless given. Equal ids draw equal numbers.

    Returns:
        Positions, ascending, int64.
    """
    num_strata, num_samples = len(budgets), len(strata)
    population = populations(strata, num_strata)

    share = budgets / np.maximum(population, 1)
    slack = 6 * np.sqrt(share * (1 - share) / np.maximum(population, 1)) + 4 / np.maximum(
        population, 1
    )
    whole, empty = budgets >= population, budgets == 0
    codes = max(num_strata, int(strata.max(initial=0)) + 1)
    below = np.zeros(codes, dtype=np.uint64)
    above = below.copy()
    below[:num_strata] = _quantile(share - slack, whole, empty)
    above[:num_strata] = _quantile(share + slack, whole, empty)

    taken = np.zeros(num_samples, dtype=bool)
    missing = budgets.astype(np.int64).copy()
    undecided: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for start in range(0, num_samples, CHUNK):
        stop = min(start + CHUNK, num_samples)
        code = strata[start:stop]
        value = keyed_hash(_ids(ids, start, stop), seed)
        near = np.flatnonzero(value < above[code])
        value, code = value[near], code[near]
        is_sure = value < below[code]
        taken[start + near[is_sure]] = True
        missing -= np.bincount(code[is_sure], minlength=num_strata)[:num_strata]
        undecided.append(start + near[~is_sure])
        hashes.append(value[~is_sure])

    positions = np.concatenate(undecided) if undecided else np.zeros(0, dtype=np.int64)
    values = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)
    order = np.argsort(strata[positions], kind="stable")
    edges = np.searchsorted(strata[positions][order], np.arange(num_strata + 1))
    for b in range(num_strata):
        members = order[edges[b] : edges[b + 1]]
        if 0 <= missing[b] <= len(members):
            taken[_smallest(positions[members], values[members], int(missing[b]))] = True
        else:
            stratum = np.flatnonzero(strata == b)
            everyone = keyed_hash(stratum if ids is None else ids[stratum], seed)
            taken[stratum] = False
            taken[_smallest(stratum, everyone, int(budgets[b]))] = True
    return np.flatnonzero(taken)


def _quantile(
    share: Float[np.ndarray, " k"], whole: np.ndarray, empty: np.ndarray
) -> UInt64[np.ndarray, " k"]:
    """The hash below which a `share` of all hashes lies."""
    # 2**64 itself does not fit; the nearest float below it leaves the last 2,048 hashes undecided.
    bound = (np.clip(share, 0.0, 1.0 - 2.0**-53) * 2.0**64).astype(np.uint64)
    bound[share >= 1.0] = _MASK
    bound[whole] = _MASK
    bound[empty] = 0
    return bound
