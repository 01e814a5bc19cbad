"""Search for beta on a validation measure, never on test data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlkit.coresets.ccs import CCS
from mlkit.coresets.scores import ArrayScore, ScoreTable
from mlkit.coresets.selection import Selection
from mlkit.errors import InvalidValueError

__all__ = ["CutoffSearch", "search_cutoff"]


@dataclass(frozen=True)
class CutoffSearch:
    """Result of `search_cutoff`.

    Args:
        cutoff: The best beta.
        metrics: Measure of each beta tried.
        selection: The coreset of the best beta.
    """

    cutoff: float
    metrics: dict[float, float]
    selection: Selection


def search_cutoff(
    train_fn: Callable[[Selection], dict[str, float]],
    scores: ScoreTable | ArrayScore,
    prune_rate: float,
    betas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    metric: str = "val_acc",
    mode: str = "max",
    score: str = "aum",
    selector: CCS | None = None,
    **inputs: Any,
) -> CutoffSearch:
    """Train on the coreset of each beta and keep the one with the best validation measure.

    Betas above the pruning rate are left out; equal measures go to the smaller beta. Source: CCS
    searches beta in steps of 0.1 (the literature often does so on test data; pass a `train_fn`
    that measures on held-out training data).

    Args:
        train_fn: Trains on a coreset and returns its measures.
        scores: What to select by.
        prune_rate: alpha.
        betas: Cutoffs to try.
        metric: Which of the measures to compare.
        mode: "max" or "min".
        score: Column of a `ScoreTable` to use.
        selector: Settings other than the pruning rate and cutoff; `CCS` defaults if None.
        **inputs: Further arguments of `Selector.select`: labels, cutoff_scores, unseen, ...

    Raises:
        InvalidValueError: If no beta is allowed, or `train_fn` does not return `metric`.
    """
    if mode not in ("max", "min"):
        raise InvalidValueError(f"mode must be 'max' or 'min', got {mode!r}")
    allowed = sorted({float(b) for b in betas if b <= prune_rate})
    if not allowed:
        raise InvalidValueError(
            f"no cutoff to try: betas={list(betas)} all exceed prune_rate={prune_rate}"
        )
    column = scores[score] if isinstance(scores, ScoreTable) else scores
    base = selector or CCS(prune_rate=prune_rate)
    metrics: dict[float, float] = {}
    selections: dict[float, Selection] = {}
    for beta in allowed:
        chosen = replace(base, prune_rate=prune_rate, cutoff=beta)
        selections[beta] = chosen.select(column, **inputs)
        measured = train_fn(selections[beta])
        if metric not in measured:
            raise InvalidValueError(
                f"train_fn returned {sorted(measured)}, not the metric {metric!r}"
            )
        metrics[beta] = float(measured[metric])
    sign = 1 if mode == "max" else -1
    best = max(allowed, key=lambda beta: (sign * metrics[beta], -beta))
    return CutoffSearch(best, metrics, selections[best])
