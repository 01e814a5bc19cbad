"""Facility location: the subset to which all examples are most similar, by lazy greedy.

f(S) = sum_i max_{j in S} s_ij is monotone submodular, so the greedy set reaches at least 1 - 1/e of
the best value (Nemhauser, Wolsey, Fisher 1978); gains evaluated lazily give the same set (Minoux
1978). The same rule as apricot's FacilityLocationSelection (Schreiber et al., JMLR 2020), which can
do the work as well.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.candidates import features_of, group_quotas, groups
from mlkit.coresets.selection import Pool, Selector
from mlkit.errors import InvalidValueError, MissingDependencyError

__all__ = ["FacilityLocation", "lazy_greedy", "similarities"]

Metric = Literal["l2", "cosine"]

_BLOCK_BYTES = 1 << 26
"""Temporary of one block of rows while distances are computed."""


def similarities(features: Float[np.ndarray, "n d"], metric: Metric) -> Float[np.ndarray, "n n"]:
    """Similarity of every pair, float32, never negative.

    "l2" is the largest distance less the distance (as in apricot), "cosine" is 1 + cosine. The
    constant does not change which set is chosen, only the value of f.
    """
    n = len(features)
    x = features.astype(np.float64)
    if metric == "cosine":
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        x /= np.where(norms == 0, 1, norms)
    else:
        x -= x.mean(axis=0)
    squares = np.einsum("nd,nd->n", x, x)
    result = np.empty((n, n), dtype=np.float32)
    rows = max(1, _BLOCK_BYTES // (8 * max(n, 1)))
    for start in range(0, n, rows):
        block = x[start : start + rows] @ x.T
        if metric == "l2":
            block *= -2
            block += squares[start : start + rows, None]
            block += squares
            np.sqrt(np.maximum(block, 0, out=block), out=block)
        result[start : start + rows] = block
    if metric == "cosine":
        np.clip(result, -1, 1, out=result)
        result += 1
    else:
        np.fill_diagonal(result, 0)
        np.subtract(result.max(initial=0), result, out=result)
    return result


def lazy_greedy(
    similarity: Float[np.ndarray, "n n"], m: int
) -> tuple[Int[np.ndarray, " m"], float]:
    """Take `m` times the row that raises sum_i max_{j taken} s_ji most, the first among equals.

    An old gain bounds the new one from above, in floating point too (the sum runs in a fixed
    order), so only rows whose old gain comes to the top are evaluated again.

    Returns:
        The rows in the order of their choice, and the value reached.

    Example:
        >>> lazy_greedy(np.array([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 3.0]]), 2)
        (array([0, 2]), 8.0)
    """
    covered = np.zeros(len(similarity), dtype=similarity.dtype)
    scratch = np.empty_like(covered)

    def gain(row: int) -> float:
        np.subtract(similarity[row], covered, out=scratch)
        np.maximum(scratch, 0, out=scratch)
        return float(scratch.sum(dtype=np.float64))

    heap = [(-gain(row), row, 0) for row in range(len(similarity))]
    heapq.heapify(heap)
    chosen = np.empty(m, dtype=np.int64)
    for step in range(m):
        while heap[0][2] != step:
            row = heap[0][1]
            heapq.heapreplace(heap, (-gain(row), row, step))
        chosen[step] = heapq.heappop(heap)[1]
        np.maximum(covered, similarity[chosen[step]], out=covered)
    return chosen, float(covered.sum(dtype=np.float64))


@dataclass(kw_only=True)
class FacilityLocation(Selector):
    """Choose the examples that represent all others best: greedy on sum_i max_{j in S} s_ij.

    Needs `features` (N, d), and `labels` when class balanced. The similarities of all pairs that
    compete are held in memory, 4 n^2 bytes: 8 GiB is some 46,000 examples, or classes of that size.

    Args:
        class_balanced: Run inside each class, with quotas in proportion to the classes.
        backend: "native", or "apricot" to let apricot-select optimise the same similarities;
            "auto" is native.
        metric: "l2": largest distance less the distance (apricot's default); "cosine": 1 + cosine.
        max_bytes: Most that the similarities may take, above 0; 8 GiB (ours).

    Raises:
        InvalidValueError: From `select`, without features, for features that are not finite, or
            when the similarities would exceed `max_bytes`.
        MissingDependencyError: From `select`, for backend "apricot" without apricot-select.

    Example:
        >>> features = np.array([[0.0], [1.0], [2.0], [9.0]])
        >>> FacilityLocation(prune_rate=0.5).select(features=features).indices
        array([1, 3])
    """

    class_balanced: bool = False
    backend: Literal["auto", "apricot", "native"] = "auto"
    metric: Metric = "l2"
    max_bytes: int = 8 * 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in ("auto", "apricot", "native"):
            raise InvalidValueError(
                f"backend must be 'auto', 'apricot' or 'native', got {self.backend!r}"
            )
        if self.metric not in ("l2", "cosine"):
            raise InvalidValueError(f"metric must be 'l2' or 'cosine', got {self.metric!r}")
        if not self.max_bytes > 0:
            raise InvalidValueError(f"max_bytes must be above 0, got {self.max_bytes!r}")

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        pool.needs("features", self)
        competing = groups(pool, self.seed, self.class_balanced, self)
        quotas = group_quotas(competing, self.budget(pool))
        self._check_memory(max(len(group.positions) for group in competing))
        greedy = _apricot if self.backend == "apricot" else lazy_greedy
        chosen, objective = [], 0.0
        for group, quota in zip(competing, quotas, strict=True):
            if quota == 0:
                chosen.append(group.positions[:0])
                continue
            similarity = similarities(features_of(pool, group.positions, self), self.metric)
            order, value = greedy(similarity, int(quota))
            chosen.append(group.positions[order])
            objective += value
            del similarity
        backend = "native" if self.backend == "auto" else self.backend
        details = {"seed": self.seed, "backend": backend, "objective": objective}
        return np.sort(np.concatenate(chosen)), details

    def _check_memory(self, largest: int) -> None:
        needed = 4 * largest**2
        if needed > self.max_bytes:
            raise InvalidValueError(
                f"the similarities of {largest} examples take {needed} bytes "
                f"({needed / 2**30:.1f} GiB), more than max_bytes={self.max_bytes}; filter first, "
                "choose inside classes with class_balanced=True, use KCenterGreedy, or raise "
                "max_bytes"
            )


def _apricot(similarity: Float[np.ndarray, "n n"], m: int) -> tuple[Int[np.ndarray, " m"], float]:
    """`lazy_greedy` by apricot, in float64."""
    try:
        from apricot import FacilityLocationSelection
    except ImportError as error:
        raise MissingDependencyError(
            "FacilityLocation(backend='apricot') needs apricot-select: "
            "pip install 'mlkit-torch[apricot]'"
        ) from error
    if m == 0:
        return np.zeros(0, dtype=np.int64), 0.0
    selection = FacilityLocationSelection(m, metric="precomputed", optimizer="lazy")
    selection.fit(similarity.astype(np.float64))
    order = np.asarray(selection.ranking, dtype=np.int64)
    return order, float(similarity[order].max(axis=0).sum(dtype=np.float64))
