"""Selectors in a row: filters narrow the pool, the last stage chooses from what is left."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from mlkit.coresets.counts import check_fraction, num_cut
from mlkit.coresets.selection import Pool, Selector
from mlkit.coresets.strata import cut_hardest
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["Filter", "HardCutoff", "Pipeline"]


@dataclass(kw_only=True)
class Filter(ABC):
    """A stage that removes examples without a size to reach.

    Args:
        seed: Key of every random choice.
    """

    seed: int = 0

    @abstractmethod
    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        """Return the positions that stay, ascending, and what the report should say."""

    def state_dict(self) -> dict[str, Any]:
        """The settings, JSON-ready."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class HardCutoff(Filter):
    """Remove the floor(cutoff * N) hardest examples, by `cutoff_scores` if given, else `scores`.

    N is the full data set. Among equal scores at the boundary the keyed hash decides. Source: CCS
    (arXiv 2210.15809): the hardest are mostly mislabelled or outliers.

    Args:
        cutoff: Fraction to remove, in [0, 1].
        seed: Key of the order among equal scores.
    """

    cutoff: float = field(kw_only=False)

    def __post_init__(self) -> None:
        check_fraction("cutoff", self.cutoff)

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        score = pool.cutoff_scores or pool.needs("scores", self)
        count = num_cut(pool.num_samples, self.cutoff)
        if count > len(pool.of(score.values)):
            raise InvalidValueError(
                f"cutoff={self.cutoff} removes {count} examples and only "
                f"{len(pool.of(score.values))} are left; lower it"
            )
        removed, boundary = cut_hardest(
            pool.of(score.values), score.hard, count, self.seed, pool.candidate_ids()
        )
        kept = pool.positions()[~removed]
        return kept, {"cut": count, "cutoff_score": boundary, "cut_by": score.name}


@dataclass(kw_only=True)
class Pipeline(Selector):
    """Run filters in order, then a selector on what they leave.

    The pruning rate is the selector's and refers to the full data set.

    Args:
        stages: Filters (`SemDeDup`, `HardCutoff`), then one selector, or a class or partial of one
            that is still to be given `prune_rate` and `seed`.
        prune_rate: For a last stage that is still to be built.
        seed: For a last stage that is still to be built.

    Example:
        >>> from mlkit.coresets.stratified import Stratified
        >>> pipeline = Pipeline([HardCutoff(cutoff=0.2), Stratified], prune_rate=0.5)
        >>> len(pipeline.select(np.arange(10.0), hard="high"))
        5
    """

    stages: Sequence[Any] = field(kw_only=False)
    prune_rate: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidValueError("a Pipeline needs at least one stage, the last a selector")
        *filters, last = self.stages
        if callable(last) and self.prune_rate is not None:
            last = last(prune_rate=self.prune_rate, seed=self.seed)
        if not isinstance(last, Selector) or not all(isinstance(f, Filter) for f in filters):
            raise InvalidTypeError(
                "a Pipeline is filters (SemDeDup, HardCutoff) followed by one selector (give the "
                "Pipeline a prune_rate if the selector has none), got "
                + ", ".join(type(s).__name__ for s in self.stages)
            )
        if self.prune_rate not in (None, last.prune_rate):
            raise InvalidValueError(
                f"prune_rate={self.prune_rate} contradicts the last stage's {last.prune_rate}; "
                "give one of them (a class or a partial as the last stage takes the pipeline's)"
            )
        self.stages = [*filters, last]
        self.prune_rate, self.seed = last.prune_rate, last.seed
        super().__post_init__()

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        account = []
        indices = pool.positions()
        for stage in self.stages:
            indices, details = stage._choose(pool)
            account.append({"stage": type(stage).__name__, "left": len(indices), **details})
            pool = pool.restrict(indices)
        return indices, {"stages": account}

    def state_dict(self) -> dict[str, Any]:
        """The settings of every stage, JSON-ready."""
        return {
            "stages": [{"stage": type(s).__name__, **s.state_dict()} for s in self.stages],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the settings of a pipeline with the same stages."""
        names = [s["stage"] for s in state["stages"]]
        if names != [type(s).__name__ for s in self.stages]:
            raise InvalidValueError(f"this pipeline's stages are not {names}")
        for stage, saved in zip(self.stages, state["stages"], strict=True):
            for name, value in saved.items():
                if name != "stage":
                    setattr(stage, name, value)
        self.prune_rate = None
        self.__post_init__()
