"""Equal budgets over score strata: the sampling half of CCS, as a plan that can be drawn again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer

from mlkit.coresets.candidates import classes
from mlkit.coresets.counts import class_quotas, water_fill
from mlkit.coresets.keyed import draw, populations
from mlkit.coresets.selection import Pool, Selector, as_integer
from mlkit.coresets.strata import Binning, score_range, stratify
from mlkit.errors import InvalidValueError

__all__ = ["StrataPlan", "Stratified"]


@dataclass(frozen=True, eq=False)
class StrataPlan:
    """Strata and budgets, decided once; `draw` samples them, as often as wanted.

    Args:
        positions: Data-set position of each row below; None means the rows are the positions.
        strata: Stratum of each row, across all classes; `len(budgets)` where in none.
        budgets: How many to draw of each stratum.
        ids: Identity of each row; None means the row number.
        report: JSON-ready account of the decision.
    """

    positions: Int[np.ndarray, " c"] | None
    strata: Integer[np.ndarray, " c"]
    budgets: Int[np.ndarray, " k"]
    ids: Integer[np.ndarray, " c"] | None
    report: dict[str, Any]

    def draw(self, seed: int) -> Int[np.ndarray, " m"]:
        """Positions of one sample, ascending."""
        rows = draw(self.strata, self.budgets, seed, self.ids)
        return rows if self.positions is None else self.positions[rows]


@dataclass(kw_only=True)
class Stratified(Selector):
    """Cut the score range into strata of equal width and give each the same budget.

    A stratum smaller than its budget is taken whole and its surplus goes to larger ones; inside a
    stratum the choice is uniform. Equal width, not equal population, is the point: with equal
    population this would be plain random sampling. Source: CCS (arXiv 2210.15809), Algorithm 1.

    Args:
        num_strata: k, at least 1. 50 is the paper's, which found the result insensitive to it.
        class_balanced: Run inside each class, with quotas in proportion to the classes (CCS-CP,
            arXiv 2507.10904).
        binning: "equal-width", or "quantile-clipped" to fold 0.1 % of each tail into the outermost
            strata first (our decision; for heavy-tailed scores).
    """

    num_strata: int = 50
    class_balanced: bool = False
    binning: Binning = "equal-width"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_strata = as_integer("num_strata", self.num_strata)
        if self.num_strata < 1:
            raise InvalidValueError(f"num_strata must be at least 1, got {self.num_strata!r}")
        if self.binning not in ("equal-width", "quantile-clipped"):
            raise InvalidValueError(
                f"binning must be 'equal-width' or 'quantile-clipped', got {self.binning!r}"
            )

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        plan = self.plan(pool)
        return plan.draw(self.seed), plan.report

    def plan(self, pool: Pool) -> StrataPlan:
        """Decide strata and budgets for the candidates of `pool`."""
        values = pool.of(pool.needs("scores", self).values)
        return self._plan(pool, np.zeros(len(values), dtype=bool), {})

    def _plan(
        self, pool: Pool, dropped: Bool[np.ndarray, " c"], report: dict[str, Any]
    ) -> StrataPlan:
        """Plan for the rows of the candidates that are not `dropped`."""
        values = pool.of(pool.needs("scores", self).values)
        budget = self.budget(pool)
        left = len(values) - int(np.count_nonzero(dropped))
        if budget > left:
            raise InvalidValueError(
                f"prune_rate={self.prune_rate} asks for {budget} examples and only {left} are left "
                "after the cutoff; lower the cutoff"
            )
        pieces = (
            [_Piece(None, slice(None), budget)]
            if not self.class_balanced
            else list(_classes(pool, dropped, budget, self))
        )
        k = self.num_strata
        codes = k * len(pieces)
        dtype = np.uint8 if codes < 256 else np.int32
        strata = np.full(len(values), codes, dtype=dtype) if self.class_balanced else None
        budgets = np.zeros(codes, dtype=np.int64)
        rows: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            part, low, high = self._stratify(values[piece.rows], dropped[piece.rows])
            population = populations(part, k)
            budgets[number * k : (number + 1) * k] = water_fill(population, piece.quota)
            rows += _strata_report(low, high, population, budgets[number * k :], piece.label)
            if strata is None:
                strata = part
            else:
                inside = part < k
                strata[piece.rows[inside]] = part[inside].astype(np.int32) + number * k
        assert strata is not None
        report |= {
            "seed": self.seed,
            "binning": self.binning,
            "effective_num_strata": len(rows),
            "strata": rows,
        }
        _warn_if_degenerate(rows, k)
        return StrataPlan(pool.candidates, strata, budgets, pool.candidate_ids(), report)

    def _stratify(
        self, values: np.ndarray, dropped: np.ndarray
    ) -> tuple[Integer[np.ndarray, " n"], float, float]:
        low, high = score_range(values, dropped, self.binning)
        return stratify(values, dropped, self.num_strata, low, high), low, high


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows stratified together: everything, or one class."""

    label: int | None
    rows: Any
    quota: int


def _classes(pool: Pool, dropped: np.ndarray, budget: int, asker: Stratified) -> Iterator[_Piece]:
    split = classes(pool, asker)
    sizes = np.array([size for _, _, size in split])
    available = np.array([np.count_nonzero(~dropped[rows]) for _, rows, _ in split])
    for (label, rows, _), quota in zip(split, class_quotas(sizes, available, budget), strict=True):
        yield _Piece(label, rows, int(quota))


def _strata_report(
    low: float, high: float, population: np.ndarray, budgets: np.ndarray, label: int | None
) -> list[dict[str, Any]]:
    """One row per non-empty stratum, from the lowest scores to the highest."""
    edges = np.linspace(low, high, len(population) + 1)
    rows = []
    for b in np.flatnonzero(population):
        row = {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "population": int(population[b]),
            "budget": int(budgets[b]),
        }
        rows.append(row if label is None else {"class": label, **row})
    return rows


def _warn_if_degenerate(rows: list[dict[str, Any]], num_strata: int) -> None:
    populations = [r["population"] for r in rows]
    if num_strata > 1 and len(rows) > 1 and max(populations) > 0.9 * sum(populations):
        warnings.warn(
            f"{max(populations) / sum(populations):.0%} of the examples share one of the "
            f"{len(rows)} non-empty strata: this is close to random sampling. A heavy-tailed score "
            "may want binning='quantile-clipped'",
            stacklevel=4,
        )
