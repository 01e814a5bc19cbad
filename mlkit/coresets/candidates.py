"""The candidates in an order of their own, split into the groups that compete for places.

Selectors that compare features walk the candidates in ascending keyed hash. Sums, ties and starting
points then depend on (seed, id) alone, never on how the data happen to be ordered. Source: our
decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.counts import class_quotas
from mlkit.coresets.keyed import keyed_hash
from mlkit.coresets.selection import Pool
from mlkit.errors import InvalidValueError

__all__ = [
    "Group",
    "classes",
    "features_of",
    "group_quotas",
    "groups",
    "hardness_of",
    "in_hash_order",
]


@dataclass(frozen=True, eq=False)
class Group:
    """Candidates that compete with each other: all of them, or those of one class.

    Args:
        label: The class; None where the group is everyone.
        positions: Data-set positions of the members still in play, in ascending keyed hash.
        size: How many members the full data set has.
    """

    label: int | None
    positions: Int[np.ndarray, " g"]
    size: int


def in_hash_order(pool: Pool, seed: int) -> Int[np.ndarray, " c"]:
    """Positions of the candidates by ascending keyed hash, equal ids by position."""
    ids, positions = pool.candidate_ids(), pool.positions()
    return positions[np.argsort(keyed_hash(positions if ids is None else ids, seed), kind="stable")]


def groups(pool: Pool, seed: int, class_balanced: bool, asker: object) -> list[Group]:
    """Split the candidates by class, or not at all.

    Raises:
        InvalidValueError: If there are no labels to split by.
    """
    if not class_balanced:
        return [Group(None, in_hash_order(pool, seed), pool.num_samples)]
    return [
        Group(label, in_hash_order(pool.restrict(pool.positions()[rows]), seed), size)
        for label, rows, size in classes(pool, asker)
    ]


def classes(pool: Pool, asker: object) -> list[tuple[int, Int[np.ndarray, " r"], int]]:
    """Label, rows among the candidates and full size of every class of the data set.

    Raises:
        InvalidValueError: If there are no labels.
    """
    labels = pool.needs("labels", asker)
    everyone, sizes = np.unique(labels, return_counts=True)
    own = pool.of(labels)
    order = np.argsort(own, kind="stable")
    members = np.split(order, np.searchsorted(own[order], everyone[1:]))
    return [(int(c), m, int(n)) for c, m, n in zip(everyone, members, sizes, strict=True)]


def group_quotas(
    members: list[Group], total: int, cuts: Int[np.ndarray, " k"] | None = None
) -> Int[np.ndarray, " k"]:
    """Places of each group, in proportion to its size in the full data set; see `class_quotas`.

    Args:
        members: The groups.
        total: Places to share out.
        cuts: How many members of each group may not be taken.
    """
    sizes = np.array([group.size for group in members])
    available = np.array([len(group.positions) for group in members])
    return class_quotas(sizes, available if cuts is None else available - cuts, total)


def features_of(
    pool: Pool, positions: Int[np.ndarray, " g"], asker: object
) -> Float[np.ndarray, "g d"]:
    """Features at `positions`, in that order.

    Raises:
        InvalidValueError: If there are none, or one is NaN or infinite.
    """
    rows = pool.needs("features", asker)[positions]
    wrong = ~np.isfinite(rows).all(axis=1)
    if wrong.any():
        raise InvalidValueError(
            f"features of {int(wrong.sum())} examples are NaN or infinite (first index "
            f"{int(positions[wrong].min())}); leave these examples out"
        )
    return rows


def hardness_of(
    pool: Pool, positions: Int[np.ndarray, " g"], asker: object
) -> Float[np.ndarray, " n"]:
    """Hardness of every example, shifted so that its least at `positions` is 0 if negative.

    Raises:
        InvalidValueError: If there are no scores, or one at `positions` is infinite.
    """
    hardness = pool.needs("scores", asker).hardness().astype(np.float64)
    own = hardness[positions]
    infinite = np.isinf(own)
    if infinite.any():
        raise InvalidValueError(
            f"{int(infinite.sum())} scores are infinite (first index "
            f"{int(positions[infinite].min())}) and {type(asker).__name__} computes with their "
            "values; clip them"
        )
    return hardness - own.min(initial=0.0)
