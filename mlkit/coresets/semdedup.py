"""SemDeDup: drop near-copies, found by cosine similarity inside clusters of the embeddings.

Abbas, Tirumala, Simig, Ganguli, Morcos: "SemDeDup: Data-efficient learning at web-scale through
semantic deduplication", 2023, arXiv 2303.09540; official code: facebookresearch/SemDeDup,
semdedup.py. Departures (our decision): k-means starts from a keyed sample and is fitted on at most
256 rows per cluster (faiss's rule); similarities in float64, in blocks of bounded memory.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from mlkit.coresets.candidates import features_of, in_hash_order
from mlkit.coresets.counts import check_fraction
from mlkit.coresets.pipeline import Filter
from mlkit.coresets.selection import Pool
from mlkit.errors import InvalidValueError

__all__ = ["SemDeDup", "has_earlier_copy"]

_ROWS_PER_CLUSTER = 1000
"""Mean cluster size when the number of clusters is not given."""

_FIT_ROWS_PER_CLUSTER = 256
_FIT_ITERATIONS = 20
_BLOCK_BYTES = 1 << 26


def has_earlier_copy(unit: Float[np.ndarray, "n d"], eps: float) -> Bool[np.ndarray, " n"]:
    """Mark the rows whose cosine with any earlier row exceeds 1 - eps.

    An earlier row counts even if it is itself marked, as in the official code: in a chain of
    near-copies only the first stays.

    Args:
        unit: Rows of length 1, in the order of who stays first.
        eps: Threshold; 0 marks nothing.

    Example:
        >>> has_earlier_copy(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), 0.05)
        array([False, False,  True])
    """
    n = len(unit)
    marked = np.zeros(n, dtype=bool)
    rows = max(1, _BLOCK_BYTES // (8 * max(n, 1)))
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        # Rounding must not lift a copy's cosine above 1: eps = 0 would then mark it.
        cosine = np.minimum(unit[start:stop] @ unit[:stop].T, 1)
        earlier = np.arange(stop) < np.arange(start, stop)[:, None]
        marked[start:stop] = ((cosine > 1 - eps) & earlier).any(axis=1)
    return marked


@dataclass(kw_only=True)
class SemDeDup(Filter):
    """Remove examples that nearly repeat another one of their cluster.

    The embeddings are normalised and clustered by k-means. Inside a cluster the examples are put in
    order, and one goes if its cosine with any that comes before it exceeds 1 - eps. A filter has no
    size to reach: put it before a selector in a `Pipeline`. Copies that k-means puts into different
    clusters are not found, so fewer clusters find more at more cost, O(n^2 d / num_clusters).

    Needs `features` (N, d).

    Args:
        eps: Largest cosine distance of a near-copy, in [0, 1]; the default 0.05 is ours. The
            larger, the more goes; 0 removes nothing.
        num_clusters: k, at least 1; None takes one per 1,000 candidates, rounded up (ours; the
            paper used 50,000 for 440 million images, and found it robust to k). One cluster
            compares all pairs.
        keep: Which of near-copies stays: "hard", farthest in cosine from the centroid (the
            official default), "easy", the nearest to it, or "random", the smallest keyed hash.
        seed: Key of the start of k-means and of ties.

    Example:
        >>> from mlkit.coresets.pipeline import Pipeline
        >>> from mlkit.coresets.simple import RandomSelector
        >>> features = np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
        >>> stages = [SemDeDup(), RandomSelector(prune_rate=0.5)]
        >>> Pipeline(stages).select(features=features).report["stages"][0]["removed"]
        2
    """

    eps: float = 0.05
    num_clusters: int | None = None
    keep: Literal["hard", "easy", "random"] = "hard"

    def __post_init__(self) -> None:
        check_fraction("eps", self.eps)
        clusters = self.num_clusters
        if clusters is not None and (not isinstance(clusters, int) or clusters < 1):
            raise InvalidValueError(f"num_clusters must be None or at least 1, got {clusters!r}")
        if self.keep not in ("hard", "easy", "random"):
            raise InvalidValueError(f"keep must be 'hard', 'easy' or 'random', got {self.keep!r}")

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        positions = in_hash_order(pool, self.seed)
        unit = _normalised(features_of(pool, positions, self))
        wanted = self.num_clusters or -(-len(positions) // _ROWS_PER_CLUSTER)
        centroids, nearest = _k_means(unit, min(wanted, len(positions)))
        by_cluster = np.argsort(nearest, kind="stable")
        edges = np.searchsorted(nearest[by_cluster], np.arange(1, max(len(centroids), 1)))
        stays = np.ones(len(positions), dtype=bool)
        for number, rows in enumerate(np.split(by_cluster, edges)):
            if len(rows) > 1:
                order = rows[self._order(unit[rows], centroids[number])]
                stays[order] = ~has_earlier_copy(
                    _normalised(unit[order].astype(np.float64)), self.eps
                )
        return np.sort(positions[stays]), {
            "seed": self.seed,
            "num_clusters": len(centroids),
            "removed": int((~stays).sum()),
        }

    def _order(
        self, unit: Float[np.ndarray, "r d"], centroid: Float[np.ndarray, " d"]
    ) -> Int[np.ndarray, " r"]:
        """Who stays first; rows come in hash order, which settles ties."""
        if self.keep == "random":
            return np.arange(len(unit))
        cosine = unit.astype(np.float64) @ centroid
        return np.argsort(cosine if self.keep == "hard" else -cosine, kind="stable")


def _normalised(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1; a zero row stays zero and is a copy of none."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms == 0, 1, norms)


def _k_means(
    unit: Float[np.ndarray, "n d"], num_clusters: int
) -> tuple[Float[np.ndarray, "k d"], Int[np.ndarray, " n"]]:
    """Centroids and the nearest of each row; starts from the first rows, fits on the first ones."""
    if num_clusters <= 1:
        centroids = unit.mean(axis=0, keepdims=True) if len(unit) else unit
        return centroids, np.zeros(len(unit), dtype=np.int64)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(
        num_clusters, init=unit[:num_clusters], n_init=1, max_iter=_FIT_ITERATIONS, random_state=0
    )
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters is what copies look like.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means.fit(unit[: _FIT_ROWS_PER_CLUSTER * num_clusters])
    return means.cluster_centers_, means.predict(unit).astype(np.int64)
