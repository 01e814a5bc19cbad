"""Moderate Coreset: keep the examples that are neither typical nor odd for their class.

Xia et al.: "Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient
Deep Learning", ICLR 2023; official code: tmllab/2023_ICLR_Moderate-DS, selection.py. Departures
(our decision): exact counts, ties by keyed hash, and by default a window per class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.candidates import features_of, group_quotas, groups, in_hash_order
from mlkit.coresets.selection import Pool, Selector

__all__ = ["Moderate", "moderate_window"]


def moderate_window(distances: Float[np.ndarray, " n"], m: int) -> Int[np.ndarray, " m"]:
    """Rows of the `m` middle ranks: sorted rows a .. a + m - 1 with a = floor((n - m) / 2).

    That is the paper's symmetric window around the median distance. Equal distances go by row.

    Example:
        >>> moderate_window(np.array([9.0, 1.0, 4.0, 2.0, 3.0]), 3)
        array([3, 4, 2])
    """
    start = (len(distances) - m) // 2
    return np.argsort(distances, kind="stable")[start : start + m]


@dataclass(kw_only=True)
class Moderate(Selector):
    """Keep the examples whose distance to their class's median feature is itself closest to median.

    d_i = ||f_i - median of f over the class of i||_2, the median taken per coordinate over the
    candidates. Sorted by d, the coreset is the symmetric window of ranks around the median: the
    closest examples are redundant, the farthest are often outliers or mislabelled.

    Needs `features` (N, d) and `labels`.

    Args:
        class_balanced: Put a window in each class, with quotas in proportion to the classes (ours,
            and the default, since the scale of d differs between classes). False ranks all
            examples together, as the official code does.

    Raises:
        InvalidValueError: From `select`, without features or labels, or for features that are not
            finite.

    Example:
        >>> features = np.array([[0.0], [1.0], [2.0], [3.0], [9.0]])
        >>> Moderate(prune_rate=0.4).select(features=features, labels=[0] * 5).indices
        array([0, 1, 3])
    """

    class_balanced: bool = True

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        classes = groups(pool, self.seed, True, self)
        distances = np.zeros(pool.num_samples)
        for group in classes:
            if len(group.positions):
                rows = features_of(pool, group.positions, self).astype(np.float64)
                distances[group.positions] = np.linalg.norm(rows - np.median(rows, axis=0), axis=1)
        total = self.budget(pool)
        if self.class_balanced:
            quotas = group_quotas(classes, total)
            windows = [(g.positions, int(m)) for g, m in zip(classes, quotas, strict=True)]
        else:
            windows = [(in_hash_order(pool, self.seed), total)]
        chosen = [rows[moderate_window(distances[rows], m)] for rows, m in windows]
        indices = np.sort(np.concatenate(chosen))
        kept = distances[indices]
        span = [float(kept.min()), float(kept.max())] if total else None
        return indices, {"seed": self.seed, "kept_distances": span}
