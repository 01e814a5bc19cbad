"""The recipe's own arguments, checked without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra.utils import instantiate

from mlkit.coresets.counts import check_fraction
from mlkit.coresets.scores import HARD_SIDE
from mlkit.coresets.selection import Selector, Unseen
from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDataError, nearest

__all__ = ["CCSSettings"]

_STAGES = ("score", "select", "train")


@dataclass(kw_only=True)
class CCSSettings:
    """Arguments `ccs.*` of the recipe.

    Args:
        prune_rate: Shares of the training pool to leave out, each in [0, 1).
        methods: Name to a selector's configuration; `cutoff: search` chooses it on validation data.
        cutoffs: What such a search tries.
        score: Which recorded score the selectors use.
        scores_path: A saved `ScoreTable` in place of the scoring run.
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
    scores_path: str | None = None
    stage: Literal["score", "select", "train"] = "train"
    num_seeds: int = 5
    max_steps: int = 700
    unseen: Unseen = "error"
    dynamics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rate in self.prune_rates:
            check_fraction("ccs.prune_rate", rate, below_one=True)
        for cutoff in self.cutoffs:
            check_fraction("ccs.cutoffs", cutoff)
        if not self.prune_rates or not self.cutoffs or not self.methods:
            raise InvalidValueError("ccs.prune_rate, ccs.cutoffs and ccs.methods must not be empty")
        if self.stage not in _STAGES:
            raise InvalidValueError(f"no ccs.stage {self.stage!r}; {nearest(self.stage, _STAGES)}")
        if self.score not in HARD_SIDE:
            raise InvalidValueError(
                f"no ccs.score {self.score!r}; {nearest(self.score, HARD_SIDE)}"
            )
        for key in ("num_seeds", "max_steps"):
            if getattr(self, key) < 1:
                raise InvalidValueError(f"ccs.{key} must be at least 1, got {getattr(self, key)}")
        if self.scores_path is not None and not Path(self.scores_path).is_file():
            raise MissingDataError(
                f"ccs.scores_path={self.scores_path} is not a file; leave it out to score here"
            )

        for method in self.methods:
            for rate in self.prune_rates:
                for beta in self.cutoffs_of(method, rate):
                    self.selector(method, rate, beta, seed=0)

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
        if cutoff is not None:
            node["cutoff"] = cutoff
        selector = instantiate(node)
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
        return [float(rates)] if isinstance(rates, int | float) else [float(r) for r in rates]
