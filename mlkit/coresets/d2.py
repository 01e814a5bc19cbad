"""D2 pruning: difficulty and diversity balanced by messages on the nearest-neighbour graph.

Maharana, Yadav, Bansal: "D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data
Pruning", ICLR 2024, arXiv 2310.07931; official code: adymaharana/d2pruning, core/data/sampling.py,
with precomputed neighbours, "sum" or "product" mode, "weighted" sampling. Departures (our
decision): a heap instead of an argmax over all examples per step (same result), ties by keyed hash,
quotas in proportion to the classes, a cutoff by the score itself unless another is given.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Integer

from mlkit.coresets.candidates import (
    Group,
    features_of,
    group_quotas,
    groups,
    hardness_of,
)
from mlkit.coresets.counts import check_fraction, num_cut
from mlkit.coresets.scores import ArrayScore
from mlkit.coresets.selection import Pool, Selector
from mlkit.coresets.strata import cut_hardest
from mlkit.errors import InvalidValueError

__all__ = ["D2", "d2_select"]

Forward = Literal["sum", "product"]


def d2_select(
    hardness: Float[np.ndarray, " n"],
    neighbors: Integer[np.ndarray, "n k"],
    distances: Float[np.ndarray, "n k"],
    m: int,
    *,
    gamma: float = 1.0,
    forward: Forward = "sum",
) -> Int[np.ndarray, " m"]:
    """Choose `m` rows by message passing on a graph that is already known.

    Forward: x_i = h_i + sum_j exp(-d_ij) h_j over the neighbours j of i ("product": times h_i
    instead of plus). Then m times: take i = argmax x, the first row among equals, and let
    x_j -= exp(-gamma d_ij) x_i for its neighbours j. Edges are directed, as in the official code.

    The heap holds a bound on every x: values that fell are corrected when they come to the top,
    values that rose (behind a negative x_i) are pushed anew, so the choice is that of the plain
    argmax loop. Cost O(n + m k log n) instead of O(n m).

    Args:
        hardness: Higher is harder; not negative for the messages to mean anything.
        neighbors: Rows of the k nearest neighbours of each row, itself not among them.
        distances: Distance to each of them.
        m: How many to choose.
        gamma: Decay of the reverse message, at least 0. A larger one lets neighbours be chosen
            together.
        forward: How h and the messages combine.

    Returns:
        The rows in the order of their choice.

    Raises:
        InvalidValueError: For shapes that do not fit, neighbours that do not exist or are the row
            itself, a distance that is negative or not finite, m outside [0, n].

    Example:
        >>> near = np.array([[1], [0], [1]])
        >>> d2_select(np.array([1.0, 0.9, 0.5]), near, np.array([[0.0], [0.0], [9.0]]), 2)
        array([0, 2])
    """
    _check_graph(hardness, neighbors, distances, m)
    h = hardness.astype(np.float64)
    message = (np.exp(-distances.astype(np.float64)) * h[neighbors]).sum(axis=1)
    x: list[float] = (h + message if forward == "sum" else h * message).tolist()
    heap = [(-value, row) for row, value in enumerate(x)]
    heapq.heapify(heap)
    taken = bytearray(len(x))
    chosen = np.empty(m, dtype=np.int64)
    for step in range(m):
        while True:
            bound, row = heap[0]
            if taken[row]:
                heapq.heappop(heap)
            elif -bound != x[row]:
                heapq.heapreplace(heap, (-x[row], row))
            else:
                break
        heapq.heappop(heap)
        taken[row] = True
        chosen[step] = row
        decay = np.exp(-gamma * distances[row].astype(np.float64)).tolist()
        for other, weight in zip(neighbors[row].tolist(), decay, strict=True):
            before = x[other]
            x[other] = before - weight * x[row]
            if x[other] > before and not taken[other]:
                heapq.heappush(heap, (-x[other], other))
    return chosen


@dataclass(kw_only=True)
class D2(Selector):
    """Choose the hardest example again and again, letting each choice lower its neighbours.

    The hardest floor(cutoff * N) are dropped first (by `cutoff_scores` if given, else `scores`).
    The graph links each remaining example to its nearest neighbours in Euclidean distance; for the
    rule see `d2_select`, which also takes neighbours computed elsewhere. Hardness is
    `scores.hardness()`, shifted so that its minimum is 0 where it would be negative (as for AUM).

    Needs `scores` and `features` (N, d), and `labels` when class balanced.

    Args:
        num_neighbors: k, at least 1; 5 as in the official CIFAR10 command.
        gamma: Decay of the reverse message, at least 0. 1.0 is the official DataComp command's;
            the CIFAR10 command has 0.1.
        cutoff: Fraction of the full data set to drop from the hard end, in [0, prune_rate]; 0.4 in
            the official command at a pruning rate of 0.9.
        class_balanced: A graph, a cutoff and a quota per class, as in the paper's CIFAR runs.
        forward: "sum" (the paper's) or "product".

    Raises:
        InvalidValueError: From `select`, for missing inputs, infinite scores, features that are
            not finite.

    Example:
        >>> points = np.array([[0.0], [0.1], [5.0], [5.1]])
        >>> rule = D2(prune_rate=0.5, num_neighbors=1, class_balanced=False)
        >>> rule.select(np.array([4.0, 3.0, 2.0, 1.0]), hard="high", features=points).indices
        array([0, 2])
    """

    num_neighbors: int = 5
    gamma: float = 1.0
    cutoff: float = 0.0
    class_balanced: bool = True
    forward: Forward = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_neighbors, int) or self.num_neighbors < 1:
            raise InvalidValueError(f"num_neighbors must be at least 1, got {self.num_neighbors!r}")
        if not 0 <= self.gamma < float("inf"):
            raise InvalidValueError(f"gamma must be finite and at least 0, got {self.gamma!r}")
        if self.forward not in ("sum", "product"):
            raise InvalidValueError(f"forward must be 'sum' or 'product', got {self.forward!r}")
        check_fraction("cutoff", self.cutoff)
        if self.cutoff > self.prune_rate:
            raise InvalidValueError(
                f"cutoff must be at most prune_rate, got cutoff={self.cutoff}, "
                f"prune_rate={self.prune_rate}: more would be cut than may be left out"
            )

    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        score: ArrayScore = pool.needs("scores", self)
        pool.needs("features", self)
        total = self.budget(pool)
        before = groups(pool, self.seed, self.class_balanced, self)
        kept = [self._cut(pool, group, pool.cutoff_scores or score) for group in before]
        hardness = hardness_of(pool, np.concatenate([g.positions for g in kept]), self)
        chosen = [
            self._choose_in(pool, group.positions, hardness, int(quota))
            for group, quota in zip(kept, group_quotas(kept, total), strict=True)
        ]
        cut = sum(len(group.positions) for group in before) - sum(len(g.positions) for g in kept)
        return np.sort(np.concatenate(chosen)), {"seed": self.seed, "cut": cut}

    def _cut(self, pool: Pool, group: Group, by: ArrayScore) -> Group:
        """The group without its hardest."""
        count, rows = num_cut(group.size, self.cutoff), group.positions
        if count > len(rows):
            raise InvalidValueError(
                f"cutoff={self.cutoff} removes {count} examples"
                + (f" of class {group.label}" if self.class_balanced else "")
                + f" and only {len(rows)} are left; lower it or filter less"
            )
        ids = rows if pool.ids is None else pool.ids[rows]
        removed, _ = cut_hardest(by.values[rows], by.hard, count, self.seed, ids)
        return Group(group.label, rows[~removed], group.size)

    def _choose_in(
        self, pool: Pool, rows: Int[np.ndarray, " g"], hardness: Float[np.ndarray, " n"], m: int
    ) -> Int[np.ndarray, " m"]:
        if m == 0 or m == len(rows):
            return rows[:m]
        from sklearn.neighbors import NearestNeighbors

        features = features_of(pool, rows, self)
        graph = NearestNeighbors(n_neighbors=min(self.num_neighbors, len(rows) - 1)).fit(features)
        distances, neighbors = graph.kneighbors()
        order = d2_select(
            hardness[rows], neighbors, distances, m, gamma=self.gamma, forward=self.forward
        )
        return rows[order]


def _check_graph(
    hardness: np.ndarray, neighbors: np.ndarray, distances: np.ndarray, m: int
) -> None:
    n = len(hardness)
    if neighbors.shape != distances.shape or neighbors.ndim != 2 or len(neighbors) != n:
        raise InvalidValueError(
            f"neighbors and distances must both be ({n}, k), got {neighbors.shape} and "
            f"{distances.shape}"
        )
    if not 0 <= m <= n:
        raise InvalidValueError(f"m must lie in [0, {n}], got {m}")
    if neighbors.size and not (neighbors.min() >= 0 and neighbors.max() < n):
        raise InvalidValueError(
            f"neighbors must lie in [0, {n}), got {neighbors.min()} to {neighbors.max()}"
        )
    itself = (neighbors == np.arange(n)[:, None]).any(axis=1)
    if itself.any():
        raise InvalidValueError(
            f"{int(itself.sum())} rows are among their own neighbours (first row "
            f"{int(itself.argmax())}); leave out the first column of a search that returns them"
        )
    if not (np.isfinite(distances).all() and (distances >= 0).all()):
        raise InvalidValueError("distances must be finite and not negative")
