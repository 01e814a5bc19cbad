"""CAL: an example is hard where its prediction differs from those of its neighbours.

Margatina, Vernikos, Barrault, Aletras: "Active Learning by Acquiring Contrastive Examples", EMNLP
2021, arXiv 2109.03764, Algorithm 1. Departure (our decision): the neighbours come from the same
examples, as in pruning every example is labelled; they come from the labelled pool in the paper.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mlkit.coresets.scores import ArrayScore
from mlkit.errors import InvalidValueError

__all__ = ["cal_scores"]

_CHUNK_BYTES = 1 << 26


def cal_scores(
    probs: Float[np.ndarray, "n c"],
    features: Float[np.ndarray, "n d"],
    num_neighbors: int = 10,
) -> ArrayScore:
    """Score s_i = mean over the neighbours j of KL(p_j || p_i), high where i is hard.

    Neighbours are the nearest in Euclidean distance between features, the example itself excluded.

    Args:
        probs: Predicted distribution of each example; rows are normalised to sum to 1. A
            probability of 0 counts as the smallest positive one of its type.
        features: Embedding of each example.
        num_neighbors: k, at least 1; 10 as in the paper. At most n - 1 are there.

    Raises:
        InvalidValueError: For shapes that do not fit, values that are negative or not finite, a
            row of zeros.

    Example:
        >>> probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
        >>> score = cal_scores(probs, np.array([[0.0], [0.1], [0.2]]), num_neighbors=2)
        >>> score.name, score.values.round(2)
        ('cal', array([0.88, 0.88, 1.76]))
    """
    from sklearn.neighbors import NearestNeighbors

    n = len(probs)
    if probs.ndim != 2 or features.ndim != 2 or len(features) != n:
        raise InvalidValueError(
            f"probs and features must have one row per example, got {probs.shape} and "
            f"{features.shape}"
        )
    if not isinstance(num_neighbors, int) or num_neighbors < 1:
        raise InvalidValueError(f"num_neighbors must be at least 1, got {num_neighbors!r}")
    if not np.isfinite(features).all():
        raise InvalidValueError("features hold NaN or infinite values; leave these examples out")
    totals = probs.sum(axis=1, keepdims=True, dtype=np.float64)
    if not (np.isfinite(totals).all() and (probs >= 0).all() and (totals > 0).all()):
        raise InvalidValueError(
            "probs must be finite, not negative and not all 0 in a row: pass softmax outputs"
        )
    count = min(num_neighbors, n - 1)
    if count < 1:
        return ArrayScore(np.zeros(n), hard="high", name="cal")
    p = np.maximum(probs, np.finfo(probs.dtype).tiny) / totals
    from scipy.special import xlogy  # a quarter of a second to import

    log_p, negative_entropy = np.log(p), xlogy(p, p).sum(axis=1)
    neighbors = NearestNeighbors(n_neighbors=count).fit(features).kneighbors(return_distance=False)
    values = negative_entropy[neighbors].mean(axis=1)
    rows = max(1, _CHUNK_BYTES // (8 * count * p.shape[1]))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        values[part] -= (p[neighbors[part]].mean(axis=1) * log_p[part]).sum(axis=1)
    return ArrayScore(np.maximum(values, 0), hard="high", name="cal")
