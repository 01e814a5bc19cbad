"""The recipe's own arguments, checked without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra.utils import instantiate

from mlkit.coresets.counts import check_fraction
from mlkit.coresets.scores import RECORDED
from mlkit.coresets.selection import Selector, Unseen
from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDataError, nearest

__all__ = ["CCSSettings"]

_STAGES = ("score", "select", "train")


@dataclass(kw_only=True)
class CCSSettings:
    """Arguments `ccs.*` of the recipe.

    Args:
        prune_rate: Shares of the training pool to leave out, each in [0, 1).
        methods: Name to a selector's configuration; `cutoff: search` chooses it on validation data,
            `score: <name>` gives the method a score of its own.
        cutoffs: What such a search tries.
        score: Which recorded score the selectors use.
        cutoff_score: Which recorded score decides the hardest, where it is another (the official
            code's is aum).
        scores_path: A saved `ScoreTable` in place of the scoring run's; with several seeds
            "{seed}" in it stands for the seed.
        stage: How far to go; the stages share a run directory.
        num_seeds: How many runs to average.
        max_steps: Optimizer steps of every fit.
        unseen: What selectors do with examples that the scoring run never visited.
        dynamics: Further arguments of `DynamicsRecorder`.

    Raises:
        InvalidValueError: For a value out of range.
        MissingDataError: If `scores_path` does not exist.
    """

    prune_rate: float | Sequence[float]
    methods: Mapping[str, Any]
    cutoffs: Sequence[float] = (0.0, 0.1, 0.3)
    score: str = "aum"
    cutoff_score: str | None = None
    scores_path: str | None = None
    stage: Literal["score", "select", "train"] = "train"
    num_seeds: int = 5
    max_steps: int = 700
    unseen: Unseen = "error"
    dynamics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rate in self.prune_rates:
            check_fraction("ccs.prune_rate", rate, below_one=True)
        if len(set(self.prune_rates)) < len(self.prune_rates):
            raise InvalidValueError(f"ccs.prune_rate names a rate twice: {self.prune_rates}")
        for cutoff in self.cutoffs:
            check_fraction("ccs.cutoffs", cutoff)
        if not self.prune_rates or not self.cutoffs or not self.methods:
            raise InvalidValueError("ccs.prune_rate, ccs.cutoffs and ccs.methods must not be empty")
        if self.stage not in _STAGES:
            raise InvalidValueError(f"no ccs.stage {self.stage!r}; {nearest(self.stage, _STAGES)}")
        for name in self.recorded:
            if name not in RECORDED:
                raise InvalidValueError(f"no score {name!r} is recorded; {nearest(name, RECORDED)}")
        for key in ("num_seeds", "max_steps"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise InvalidValueError(f"ccs.{key} must be an integer above 0, got {value!r}")
        self._check_scores_path()
        for method in self.methods:
            for rate in self.prune_rates:
                for beta in self.cutoffs_of(method, rate):
                    self.selector(method, rate, beta, seed=0)

    def _check_scores_path(self) -> None:
        if self.scores_path is None:
            return
        if "{seed}" in self.scores_path:
            return
        if self.num_seeds > 1:
            raise InvalidValueError(
                f"ccs.scores_path={self.scores_path} is one table and every seed has a training "
                "pool of its own: put {seed} into the path, or set ccs.num_seeds=1"
            )
        if not Path(self.scores_path).is_file():
            raise MissingDataError(
                f"ccs.scores_path={self.scores_path} is not a file; leave it out to score here"
            )

    @property
    def recorded(self) -> list[str]:
        """Scores that the scoring run has to record, the recipe's own first."""
        own = [node["score"] for node in self.methods.values() if node.get("score")]
        cut = [self.cutoff_score] if self.cutoff_score else []
        return list(dict.fromkeys([self.score, *own, *cut, "confidence"]))

    def score_of(self, method: str) -> str:
        """Which score a method selects by."""
        return self.methods[method].get("score") or self.score

    def cutoffs_of(self, method: str, rate: float) -> list[float | None]:
        """Cutoffs to search for a method; [None] where its configuration settles them.

        Raises:
            InvalidValueError: If none of `cutoffs` is allowed at this pruning rate.
        """
        if self.methods[method].get("cutoff") != "search":
            return [None]
        allowed: list[float | None] = [float(c) for c in self.cutoffs if c <= rate]
        if not allowed:
            raise InvalidValueError(
                f"no cutoff to search at prune_rate={rate}: ccs.cutoffs={list(self.cutoffs)} all "
                "exceed it"
            )
        return allowed

    def selector(self, method: str, rate: float, cutoff: float | None, seed: int) -> Selector:
        """Build the selector of a method.

        Raises:
            InvalidTypeError: If its `_target_` is no selector.
        """
        node: dict[str, Any] = {**self.methods[method], "prune_rate": rate, "seed": seed}
        node.pop("score", None)
        if cutoff is not None:
            node["cutoff"] = cutoff
        selector = instantiate(node, _convert_="all")
        if not isinstance(selector, Selector):
            raise InvalidTypeError(
                f"ccs.methods.{method} must be a selector, got {type(selector).__name__}; filters "
                "go into a Pipeline"
            )
        return selector

    @property
    def prune_rates(self) -> list[float]:
        """The pruning rates as a list."""
        rates = self.prune_rate
        return (
            list(rates) if isinstance(rates, Sequence) and not isinstance(rates, str) else [rates]
        )
