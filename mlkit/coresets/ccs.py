"""Coverage-centric coreset selection: drop the hardest, then cover the difficulty range evenly.

Zheng, Liu, Lai, Prakash: "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023,
arXiv 2210.15809, Algorithm 1; official code: haizhongzheng/Coverage-centric-coreset-selection.
Departures (our decision): exact counts, keyed randomness, closed last stratum, a cutoff by the
score itself unless another is given, a correct class-balanced form. `preset="official"` gives the
official code's cutoff score and strata instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Integer

from mlkit.coresets.candidates import classes
from mlkit.coresets.counts import check_fraction, num_cut
from mlkit.coresets.mislabel import auto_cutoff
from mlkit.coresets.scores import ArrayScore
from mlkit.coresets.selection import Pool
from mlkit.coresets.strata import cut_hardest, official_strata
from mlkit.coresets.stratified import StrataPlan, Stratified
from mlkit.errors import InvalidValueError

__all__ = ["CCS"]


@dataclass(kw_only=True)
class CCS(Stratified):
    """Drop the floor(cutoff * N) hardest examples, then sample equal-width score strata evenly.

    Args:
        prune_rate: alpha in [0, 1): the coreset has floor((1 - alpha) * N) examples.
        cutoff: beta in [0, alpha], or "auto". The parameter that matters: near 0 at low pruning
            rates, 0.1 to 0.5 at high ones (`search_cutoff` finds it). "auto" is a heuristic of
            ours, see `auto_cutoff`.
        num_strata: k; 50 in the paper.
        class_balanced: Cut and stratify inside each class, quotas in proportion (CCS-CP).
        preset: "paper", or "official" to reproduce the official code: the cutoff ranks by AUM
            (pass `cutoff_scores=table["aum"]`) and strata end at maximum * 1.0001.
        binning: See `Stratified`.
        seed: Key of the draw.

    Example:
        >>> scores = np.linspace(-1, 1, 1000, dtype=np.float32)
        >>> coreset = CCS(prune_rate=0.9, cutoff=0.3).select(scores, hard="low")
        >>> len(coreset), coreset.report["cut"]
        (100, 300)
    """

    cutoff: float | Literal["auto"] = 0.0
    preset: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in ("paper", "official"):
            raise InvalidValueError(f"preset must be 'paper' or 'official', got {self.preset!r}")
        if self.preset == "official" and (self.class_balanced or self.binning != "equal-width"):
            raise InvalidValueError(
                "preset='official' is neither class balanced nor clipped; use preset='paper'"
            )
        if self.cutoff == "auto":
            return
        if isinstance(self.cutoff, str):
            raise InvalidValueError(f"cutoff must be a number or 'auto', got {self.cutoff!r}")
        check_fraction("cutoff", self.cutoff)
        if self.cutoff > self.prune_rate:
            raise InvalidValueError(
                f"cutoff must be at most prune_rate, got cutoff={self.cutoff}, "
                f"prune_rate={self.prune_rate}: more would be cut than may be left out"
            )

    def plan(self, pool: Pool) -> StrataPlan:
        """Decide the cut, the strata and their budgets."""
        score = pool.needs("scores", self)
        by = pool.cutoff_scores or score
        if self.preset == "official" and by.name != "aum":
            raise InvalidValueError(
                "preset='official' cuts by AUM whatever the strata's score is: pass "
                f"cutoff_scores=table['aum'] (got {by.name!r})"
            )
        cutoff, why = self.cutoff, "given"
        if cutoff == "auto":
            cutoff, why = auto_cutoff(self.prune_rate, by)
        dropped, report = self._cut(pool, by, float(cutoff))
        return self._plan(pool, dropped, {"cutoff": cutoff, "cutoff_because": why, **report})

    def _cut(
        self, pool: Pool, by: ArrayScore, cutoff: float
    ) -> tuple[Bool[np.ndarray, " c"], dict[str, Any]]:
        """Mark the hardest rows of the candidates."""
        values, ids = pool.of(by.values), pool.candidate_ids()
        if not self.class_balanced:
            count = num_cut(pool.num_samples, cutoff)
            _check_cut(count, len(values), cutoff)
            dropped, boundary = cut_hardest(values, by.hard, count, self.seed, ids)
            return dropped, {"cut": count, "cut_by": by.name, "cutoff_score": boundary}
        dropped = np.zeros(len(values), dtype=bool)
        boundaries: dict[str, float | None] = {}
        for label, rows, size in classes(pool, self):
            count = num_cut(size, cutoff)
            _check_cut(count, len(rows), cutoff, f" of class {label}")
            mine = rows if ids is None else ids[rows]
            dropped[rows], boundaries[str(label)] = cut_hardest(
                values[rows], by.hard, count, self.seed, mine
            )
        cut = int(np.count_nonzero(dropped))
        return dropped, {"cut": cut, "cut_by": by.name, "cutoff_score": boundaries}

    def _stratify(
        self, values: np.ndarray, dropped: np.ndarray
    ) -> tuple[Integer[np.ndarray, " n"], float, float]:
        if self.preset == "paper":
            return super()._stratify(values, dropped)
        kept = values[~dropped]
        if not np.isfinite(kept).all() or kept.max() <= 0 or kept.min() == kept.max():
            raise InvalidValueError(
                "preset='official' loses examples when the highest score is not positive, when all "
                "scores are equal or when one is infinite; use preset='paper'"
            )
        return official_strata(values, dropped, self.num_strata)


def _check_cut(count: int, available: int, cutoff: float, where: str = "") -> None:
    if count > available:
        raise InvalidValueError(
            f"cutoff={cutoff} removes {count} examples{where} and only {available} are left; "
            "lower it or filter less"
        )
