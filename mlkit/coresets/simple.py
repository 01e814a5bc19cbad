"""The baselines every coreset method is measured against: by rank, and at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from mlkit.coresets.counts import check_fraction, class_quotas, num_cut
from mlkit.coresets.keyed import draw
from mlkit.coresets.selection import Pool, Selector
from mlkit.coresets.strata import cut_hardest
from mlkit.errors import InvalidValueError

__all__ = ["RandomSelector", "TopK"]


@dataclass(kw_only=True)
class TopK(Selector):
    """Keep the hardest examples, the easiest, or the hardest after a cutoff.

    `which="hardest"` with `cutoff` is ELFS's "budget" rule: drop the floor(cutoff * N) hardest,
    then the easiest until the size is reached. Equal scores are ordered by keyed hash.

    Args:
        which: "hardest" or "easiest".
        cutoff: Share of the full data set to drop from the hard end first, in [0, prune_rate].
        class_balanced: Rank inside each class, quotas in proportion to the classes.
    """

    which: Literal["hardest", "easiest"] = "hardest"
    cutoff: float = 0.0
    class_balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.which not in ("hardest", "easiest"):
            raise InvalidValueError(f"which must be 'hardest' or 'easiest', got {self.which!r}")
        check_fraction("cutoff", self.cutoff)
        if self.cutoff > self.prune_rate:
            raise InvalidValueError(
                f"cutoff must be at most prune_rate, got cutoff={self.cutoff}, "
                f"prune_rate={self.prune_rate}"
            )

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        score = pool.needs("scores", self)
        values, positions, ids = pool.of(score.values), pool.positions(), pool.candidate_ids()
        groups = _groups(pool, self.class_balanced, self)
        budgets = _budgets(pool, groups, self.budget(pool), self.cutoff)
        chosen = np.zeros(len(values), dtype=bool)
        total_cut = 0
        for (rows, size), budget in zip(groups, budgets, strict=True):
            part, mine = (values, ids) if rows is None else (values[rows], _of(ids, rows))
            cut = num_cut(size, self.cutoff)
            skipped = cut if self.which == "hardest" else len(part) - int(budget)
            inner, _ = cut_hardest(part, score.hard, skipped, self.seed, mine)
            outer, _ = cut_hardest(part, score.hard, skipped + int(budget), self.seed, mine)
            chosen[slice(None) if rows is None else rows] = outer & ~inner
            total_cut += cut
        return positions[chosen], {"seed": self.seed, "cut": total_cut}


def _of(ids: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    return rows if ids is None else ids[rows]


@dataclass(kw_only=True)
class RandomSelector(Selector):
    """Keep a uniformly random subset.

    Args:
        class_balanced: Draw inside each class, quotas in proportion to the classes.
    """

    class_balanced: bool = False

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        positions = pool.positions()
        strata = np.zeros(len(positions), dtype=np.uint8)
        budgets = np.array([self.budget(pool)])
        if self.class_balanced:
            groups = _groups(pool, True, self)
            strata = np.empty(len(positions), dtype=np.int32)
            for number, (rows, _) in enumerate(groups):
                strata[rows] = number
            budgets = _budgets(pool, groups, self.budget(pool), 0.0)
        rows = draw(strata, budgets, self.seed, pool.candidate_ids())
        return positions[rows], {"seed": self.seed}


def _groups(
    pool: Pool, class_balanced: bool, asker: Selector
) -> list[tuple[Int[np.ndarray, " r"] | None, int]]:
    """Rows of the candidates that compete with each other, and the size of their full group."""
    if not class_balanced:
        return [(None, pool.num_samples)]
    labels = pool.needs("labels", asker)
    own = pool.of(labels)
    return [
        (np.flatnonzero(own == c), int(np.count_nonzero(labels == c))) for c in np.unique(labels)
    ]


def _budgets(
    pool: Pool, groups: list[tuple[Any, int]], total: int, cutoff: float
) -> Int[np.ndarray, " g"]:
    sizes = np.array([size for _, size in groups])
    left = np.array(
        [
            (len(pool.positions()) if rows is None else len(rows)) - num_cut(size, cutoff)
            for rows, size in groups
        ]
    )
    return class_quotas(sizes, np.maximum(left, 0), total)
