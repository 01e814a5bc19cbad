"""A cutoff without a search: what share of the labels looks wrong, and what the paper used.

Heuristic, our decision. The estimate from threshold samples is Pleiss et al., NeurIPS 2020 (arXiv
2001.10528); the table is CCS's CIFAR10 row as remembered, except 0.3 at 0.9, which the
official commands confirm.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from mlkit.coresets.counts import check_fraction
from mlkit.coresets.scores import ArrayScore
from mlkit.errors import InvalidValueError

__all__ = ["TABLE", "auto_cutoff", "mislabel_fraction"]

TABLE = ((0.0, 0.0), (0.5, 0.0), (0.7, 0.1), (0.8, 0.1), (0.9, 0.3))
"""(pruning rate, cutoff): interpolated between, constant beyond the last."""


def mislabel_fraction(
    aum: ArrayScore, threshold_samples: Int[np.ndarray, " t"] | None = None
) -> float:
    """Estimate which share of the examples carries a wrong label from their margins.

    Args:
        aum: Area under the margin; low is hard.
        threshold_samples: Positions of examples that were trained under a label that fits none of
            them (Pleiss et al.); the 99th percentile of their margins is the threshold. Without
            them the threshold is 0: on average over training, another class was more likely than
            the label.

    Returns:
        Share of the other examples with a margin below the threshold.
    """
    if aum.hard != "low":
        raise InvalidValueError(
            f"a margin is hard when low; the score {aum.name!r} is hard when high: pass AUM"
        )
    if threshold_samples is None:
        return float(np.mean(aum.values < 0))
    threshold = np.percentile(aum.values[threshold_samples], 99)
    others = np.ones(len(aum), dtype=bool)
    others[threshold_samples] = False
    return float(np.mean(aum.values[others] <= threshold))


def auto_cutoff(
    prune_rate: float,
    score: ArrayScore,
    *,
    threshold_samples: Int[np.ndarray, " t"] | None = None,
    wrong_fraction: float | None = None,
) -> tuple[float, str]:
    """Return max(table value at `prune_rate`, estimated share of wrong labels), and why.

    The estimate needs AUM; for other scores the table alone decides. Never above `prune_rate`.
    Rounded to three digits, so that counts stay exact and the report readable.

    Args:
        prune_rate: alpha.
        score: The score to cut by.
        threshold_samples: See `mislabel_fraction`.
        wrong_fraction: Your own estimate of the share of wrong labels, for instance from
            cleanlab, in place of ours.
    """
    rates, cutoffs = zip(*TABLE, strict=True)
    usual = float(np.interp(prune_rate, rates, cutoffs))
    wrong = 0.0
    if wrong_fraction is not None:
        check_fraction("wrong_fraction", wrong_fraction)
        wrong = wrong_fraction
    elif score.name == "aum":
        wrong = mislabel_fraction(score, threshold_samples)
    chosen = round(min(max(usual, wrong), prune_rate), 3)
    return chosen, f"heuristic: table {usual:.3f}, labels that look wrong {wrong:.3f}"
