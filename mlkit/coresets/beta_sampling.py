"""Beta sampling: draw by score, with a Beta density that moves to easier examples as less is kept.

DUAL ("Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction
Uncertainty"), arXiv 2502.06905; official code: behaapyy/dual-pruning, exp_cifar/data_subset.py.
Departures (our decision): keyed weighted sampling instead of a global generator, exact counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.candidates import group_quotas, groups, hardness_of, in_hash_order
from mlkit.coresets.keyed import uniform
from mlkit.coresets.selection import Pool, Selector
from mlkit.errors import InvalidValueError

__all__ = ["BetaSampling", "beta_parameters", "log_weights"]

_TINY = 1e-12
"""Least b: at 0 (mu = 1) the Beta distribution is a point mass without a density."""


def beta_parameters(
    mean_hard: float, prune_rate: float, c: float, concentration: float
) -> tuple[float, float]:
    """(a, b) of the Beta density: b = (K - 1)(1 - mean_hard)(1 - prune_rate^c), a = K - b.

    Example:
        >>> a, b = beta_parameters(mean_hard=0.5, prune_rate=0.0, c=4.0, concentration=16.0)
        >>> a, b
        (8.5, 7.5)
    """
    b = max((concentration - 1) * (1 - mean_hard) * (1 - prune_rate**c), _TINY)
    return concentration - b, b


def log_weights(
    hardness: Float[np.ndarray, " n"], confidence: Float[np.ndarray, " n"], a: float, b: float
) -> Float[np.ndarray, " n"]:
    """log(h_i BetaPDF(p_i; a, b)) up to a constant; minus infinity where h_i is 0.

    In logarithms, since the density underflows in float64 for confident examples at small b.
    """
    p = confidence.astype(np.float64)
    from scipy.special import xlog1py, xlogy  # a quarter of a second to import

    log_density = xlogy(a - 1, p) + xlog1py(b - 1, -p)  # Infinite at p = 1 if b < 1.
    positive = hardness > 0
    log_hardness = np.log(hardness.astype(np.float64), where=positive, out=np.zeros(len(p)))
    return np.where(positive, log_hardness + log_density, -np.inf)


@dataclass(kw_only=True)
class BetaSampling(Selector):
    """Sample without replacement with weights h_i BetaPDF(p_i; a, b).

    h is the score (DUAL's is `table["dual"]`), p the mean probability of the label over training,
    b = (K - 1)(1 - mu)(1 - prune_rate^c), a = K - b, mu the mean of p over the hardest examples.
    Little pruning centres the density on the hardest examples' p; the more is pruned, the further
    it moves to the easy ones.

    The draw takes the smallest -log(u_i) / weight_i with u_i in (0, 1) from the keyed hash
    (Efraimidis and Spirakis, 2006): that is successive sampling in proportion to the weights.
    Examples of weight 0 come after all others, in keyed order. h is `scores.hardness()`, shifted
    so that its minimum is 0 where it would be negative.

    Needs `scores` and `confidence`, and `labels` when class balanced.

    Args:
        c: How late the density moves to easy examples, above 0: 4 for CIFAR, 11 for ImageNet
            (paper).
        num_hardest: How many examples mu averages over, at least 1; 10 in the official code.
        concentration: K = a + b, above 1; 16 in the official code.
        class_balanced: Draw inside each class, quotas in proportion to the classes (ours); mu
            stays that of all candidates.

    Raises:
        InvalidValueError: From `select`, for missing inputs, infinite scores, a confidence outside
            [0, 1].

    Example:
        >>> scores, mean_p = np.arange(100.0), np.linspace(0.99, 0.1, 100)
        >>> rule = BetaSampling(prune_rate=0.7)
        >>> len(rule.select(scores, hard="high", confidence=mean_p))
        30
    """

    c: float = 4.0
    num_hardest: int = 10
    concentration: float = 16.0
    class_balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.c < float("inf"):
            raise InvalidValueError(f"c must be finite and above 0, got {self.c!r}")
        if not isinstance(self.num_hardest, int) or self.num_hardest < 1:
            raise InvalidValueError(f"num_hardest must be at least 1, got {self.num_hardest!r}")
        if not 1 < self.concentration < float("inf"):
            raise InvalidValueError(
                f"concentration must be finite and above 1, got {self.concentration!r}"
            )

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        confidence = pool.needs("confidence", self)
        rows = in_hash_order(pool, self.seed)
        hardness = hardness_of(pool, rows, self)
        hardest = rows[np.argsort(-hardness[rows], kind="stable")[: self.num_hardest]]
        mean_hard = float(confidence[hardest].mean(dtype=np.float64)) if len(hardest) else 0.0
        a, b = beta_parameters(mean_hard, self.prune_rate, self.c, self.concentration)

        keys = np.full(pool.num_samples, np.inf)
        u = uniform(rows if pool.ids is None else pool.ids[rows], self.seed)
        keys[rows] = np.log(-np.log(u)) - log_weights(hardness[rows], confidence[rows], a, b)
        competing = groups(pool, self.seed, self.class_balanced, self)
        quotas = group_quotas(competing, self.budget(pool))
        chosen = [
            group.positions[np.argsort(keys[group.positions], kind="stable")[:quota]]
            for group, quota in zip(competing, quotas, strict=True)
        ]
        details = {"seed": self.seed, "mean_hard": mean_hard, "a": a, "b": b}
        return np.sort(np.concatenate(chosen)), details
