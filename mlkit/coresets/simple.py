"""The baselines every coreset method is measured against: by rank, and at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from mlkit.coresets.candidates import group_quotas, groups
from mlkit.coresets.counts import check_fraction, num_cut
from mlkit.coresets.selection import Pool, Selector
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
        hardness = pool.needs("scores", self).hardness()
        competing = groups(pool, self.seed, self.class_balanced, self)
        cuts = np.array([min(num_cut(g.size, self.cutoff), len(g.positions)) for g in competing])
        chosen = []
        for group, cut, quota in zip(
            competing, cuts, group_quotas(competing, self.budget(pool), cuts), strict=True
        ):
            ranked = group.positions[np.argsort(-hardness[group.positions], kind="stable")]
            start = cut if self.which == "hardest" else len(ranked) - quota
            chosen.append(ranked[start : start + quota])
        return np.sort(np.concatenate(chosen)), {"seed": self.seed, "cut": int(cuts.sum())}


@dataclass(kw_only=True)
class RandomSelector(Selector):
    """Keep a uniformly random subset.

    Args:
        class_balanced: Draw inside each class, quotas in proportion to the classes.
    """

    class_balanced: bool = False

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        competing = groups(pool, self.seed, self.class_balanced, self)
        quotas = group_quotas(competing, self.budget(pool))
        chosen = [g.positions[:quota] for g, quota in zip(competing, quotas, strict=True)]
        return np.sort(np.concatenate(chosen)), {"seed": self.seed}
