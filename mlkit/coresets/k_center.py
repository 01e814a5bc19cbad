"""k-center greedy: always take the example that is farthest from everything taken so far.

Sener, Savarese: "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR
2018, arXiv 1708.00489, Algorithm 1; the traversal is Gonzalez (1985), whose covering radius is at
most twice the best possible one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.candidates import features_of, in_hash_order
from mlkit.coresets.selection import Pool, Selector
from mlkit.errors import InvalidValueError

__all__ = ["KCenterGreedy", "k_center_greedy"]


def k_center_greedy(
    features: Float[np.ndarray, "n d"], m: int, first: int = 0
) -> tuple[Int[np.ndarray, " m"], float]:
    """Farthest-point traversal in Euclidean distance from row `first`.

    Each step takes argmax_i min_{s taken} ||f_i - f_s||_2, the first row among equals. Squared
    distances come from norms and one matrix-vector product over the centred features, in their own
    precision (at least float32); what is within its rounding error of 0 counts as 0, so copies of
    a taken row go by row. Cost O(n m d), memory one copy of the features.

    Returns:
        The rows in the order of their choice, and the covering radius: the largest distance of any
        row to its nearest chosen one (infinite if m = 0 < n).

    Example:
        >>> k_center_greedy(np.array([[0.0], [1.0], [5.0], [9.0]]), 3)
        (array([0, 3, 2]), 1.0)
    """
    chosen = np.empty(m, dtype=np.int64)
    if len(features) == 0:
        return chosen, 0.0
    dtype = np.result_type(features.dtype, np.float32)
    x = (features - features.mean(axis=0, dtype=np.float64)).astype(dtype)
    squares = np.einsum("nd,nd->n", x, x)
    # Measured for copies: 1, 3 and 5 eps at d = 64, 512 and 2,048.
    noise = (2 + x.shape[1] ** 0.5 / 8) * np.finfo(dtype).eps
    nearest = np.full(len(x), np.inf, dtype=dtype)
    row = first
    for step in range(m):
        chosen[step] = row
        scale = squares + squares[row]
        distance = scale - 2 * (x @ x[row])
        distance[distance <= noise * scale] = 0
        np.minimum(nearest, distance, out=nearest)
        nearest[row] = -1
        row = int(nearest.argmax())
    return chosen, float(np.sqrt(max(nearest.max(), 0)))


@dataclass(kw_only=True)
class KCenterGreedy(Selector):
    """Choose centres so that the farthest example is as near to one as the greedy rule can make it.

    Needs `features` (N, d). Scores and labels play no part; outliers are chosen early, so filter
    them first (`Pipeline`, `HardCutoff`) if labels are noisy.

    Args:
        metric: "l2", or "cosine" to normalise the features first (the order of cosine distances is
            that of the Euclidean ones between unit vectors); a zero vector stays where it is.
        first: Position of the first centre in the data set; None takes the candidate of the
            smallest keyed hash, a uniformly random one.

    Raises:
        InvalidValueError: From `select`, without features, for features that are not finite, for a
            `first` that is not among the candidates.

    Example:
        >>> features = np.array([[0.0], [1.0], [5.0], [9.0]])
        >>> KCenterGreedy(prune_rate=0.25, first=0).select(features=features).indices
        array([0, 2, 3])
    """

    metric: Literal["l2", "cosine"] = "l2"
    first: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("l2", "cosine"):
            raise InvalidValueError(f"metric must be 'l2' or 'cosine', got {self.metric!r}")
        if self.first is not None and (not isinstance(self.first, int) or self.first < 0):
            raise InvalidValueError(
                f"first must be None or a position, at least 0, got {self.first!r}"
            )

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        rows = in_hash_order(pool, self.seed)
        features = features_of(pool, rows, self)
        start = 0
        if self.first is not None:
            found = np.flatnonzero(rows == self.first)
            if not len(found):
                raise InvalidValueError(
                    f"first={self.first} is not among the {len(rows)} candidates of "
                    f"{pool.num_samples} examples"
                )
            start = int(found[0])
        if self.metric == "cosine":
            norms = np.linalg.norm(features, axis=1, keepdims=True)
            features = features / np.where(norms == 0, 1, norms)
        chosen, radius = k_center_greedy(features, self.budget(pool), start)
        order = rows[chosen]
        return np.sort(order), {
            "seed": self.seed,
            "first": int(order[0]) if len(order) else None,
            "radius": radius if np.isfinite(radius) else None,
        }
