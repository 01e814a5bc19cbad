"""FIITED as a dense table times a mask: slow, float64, from the description alone.

Every quantity has its obvious form: weights of all chunks, a mask of the resident ones, utilities
of all chunks that decay at every step, selection by a full sort. Nothing is shared with the store
but the initial values, which are an input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mlkit.embeddings.fiited.config import FIITEDConfig

__all__ = ["MaskedOracle", "Outcome", "floor_upper16", "itep_rounds"]

Array = np.ndarray


def itep_rounds(steps: int, every: int) -> list[int]:
    """Steps after which a geometric schedule has a round, written out interval by interval."""
    found = []
    for step in range(1, steps + 1):
        period = 3 if step < 10 else 30 if step < 100 else 300 if step < 1000 else every
        if step % min(period, every) == 0:
            found.append(step)
    return found


def floor_upper16(value: float) -> float:
    """A positive float32 with its lower 16 bits cleared."""
    bits = np.array(value, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return float(bits.view(np.float32))


@dataclass
class Outcome:
    """What a round did, as indices of chunks: row * K + k."""

    carried_out: bool
    evicted: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)


class MaskedOracle:
    """Dense weights, a mask, utilities of all chunks.

    Args:
        config: Settings; `layout`, `utility_dtype` and the budget are not looked at.
        sizes: Rows of each table.
        padding: Padding row of each table, or None.
        initial: Initial vectors of all rows.
        target: Resident chunks at most.
        shares: Targets of each table, for `normalize="per_table"`.
        torch_optimizer: "sgd", "adagrad" or "sparse_adam" if the update is not fused.
    """

    def __init__(
        self,
        config: FIITEDConfig,
        sizes: Sequence[int],
        padding: Sequence[int | None],
        initial: Array,
        target: int,
        shares: Sequence[int] = (),
        torch_optimizer: str | None = None,
    ) -> None:
        self.config, self.sizes, self.target = config, list(sizes), target
        self.shares, self.torch_optimizer = list(shares), torch_optimizer
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self.padding = {
            int(f + p) for f, p in zip(self.first, padding, strict=False) if p is not None
        }
        rows, dim = initial.shape
        self.k = config.num_chunks
        self.width = dim // self.k
        shape = (rows, self.k, self.width)
        self.initial = initial.reshape(shape).astype(np.float64)
        self.weight = np.zeros(shape)
        self.mask = np.zeros((rows, self.k), bool)
        self.utility = np.zeros((rows, self.k))
        self.square = np.zeros(shape)  # Adagrad's sum, Adam's second moment
        self.moment = np.zeros(shape)
        self.count = np.zeros((rows, self.k), np.int64)  # Adam's steps of a chunk
        self.row_state = np.zeros(rows)
        self.steps = 0
        self.bad_rows = 0
        self.torch_steps = 0
        self.scale = 1.0  # of utilities where they are stored; matters to the percentile alone
        self._earned: dict[int, tuple[int, Array]] = {}

    # one step -----------------------------------------------------------------------------------

    def _bags(
        self,
        table: int,
        ids: Sequence[int],
        offsets: Sequence[int],
        weights: Array | None,
        mode: str,
    ) -> list[list[tuple[int, float]]]:
        """(row, coefficient) of each position of each bag, without padding."""
        bags = []
        for start, stop in pairwise(offsets):
            bag = []
            for place in range(start, stop):
                row = int(self.first[table]) + int(ids[place])
                if row not in self.padding:
                    bag.append((row, 1.0 if weights is None else float(weights[place])))
            if mode == "mean":
                bag = [(row, c / len(bag)) for row, c in bag]
            bags.append(bag)
        return bags

    def lookup(
        self,
        table: int,
        ids: Sequence[int],
        offsets: Sequence[int],
        weights: Array | None = None,
        mode: str = "sum",
    ) -> Array:
        """Pooled vectors of one table, zeros where a chunk has no storage."""
        visible = self.weight * self.mask[:, :, None]
        bags = self._bags(table, ids, offsets, weights, mode)
        out = np.zeros((len(bags), self.k * self.width))
        for number, bag in enumerate(bags):
            for row, coefficient in bag:
                out[number] += coefficient * visible[row].ravel()
        return out

    def backward(
        self,
        table: int,
        ids: Sequence[int],
        offsets: Sequence[int],
        grad: Array,
        weights: Array | None = None,
        mode: str = "sum",
    ) -> None:
        """Keep the gradient of a lookup's output for the end of the step; one call a table."""
        sums: dict[int, Array] = {}
        counts: dict[int, int] = {}
        for number, bag in enumerate(self._bags(table, ids, offsets, weights, mode)):
            for row, coefficient in bag:
                part = coefficient * grad[number].reshape(self.k, self.width)
                sums[row] = sums.get(row, 0) + part
                counts[row] = counts.get(row, 0) + 1
        for row, gradient in sums.items():
            self._earned[row] = (counts[row], gradient)

    def step(self, target: int | None = None) -> Outcome | None:
        """End a step: decay, utilities, update, new rows, and a round if one is due.

        Args:
            target: Of that round and from then on.
        """
        self.steps += 1
        self.utility *= self.config.decay_per_step
        self.torch_steps += self.torch_optimizer is not None
        earned, self._earned = dict(sorted(self._earned.items())), {}
        fused = self.config.optimizer is not None
        new = [r for r in earned if not self.mask[r].any() and not self.utility[r].any()]
        for row, (accesses, gradient) in earned.items():
            self._earn(row, accesses, gradient)
            if self.config.optimizer == "rowwise_adagrad":
                self.row_state[row] += (gradient**2).mean()
            self._update(row, gradient)
        for row in new:
            room = min(self.k, self.target - int(self.mask.sum()))
            if room > 0:
                self.mask[row, :room] = True
                self.weight[row, :room] = self.initial[row, :room]
                if fused:
                    self._update(row, earned[row][1])
        found = None
        if self.config.is_round(self.steps):
            before, self.target = self.target, self.target if target is None else target
            found = self.round(force=self.target < before)
        self.scale /= self.config.decay_per_step
        if found is not None and self.scale > 1e12:
            self.scale = self.config.decay_per_step
        return found

    def _earn(self, row: int, accesses: int, gradient: Array) -> None:
        """Add to the utilities of a row."""
        if not np.isfinite(gradient).all():
            self.bad_rows += 1
            return
        if (self.steps - 1) % self.config.utility_every:
            return
        norm = np.sqrt((gradient**2).sum(1))
        kind = self.config.utility
        if kind != "l2":
            self.utility[row] += {"freq_grad": accesses * norm, "freq": accesses, "grad": norm}[
                kind
            ]

    def _update(self, row: int, gradient: Array) -> None:
        c = self.config
        name = c.optimizer or self.torch_optimizer
        lr, eps = c.lr, c.eps
        for k in range(self.k):
            if not self.mask[row, k]:
                continue
            g, w = gradient[k], self.weight[row, k]
            if name == "sgd":
                w -= lr * g
            elif name == "rowwise_adagrad":
                w -= lr * g / (math.sqrt(self.row_state[row]) + eps)
            elif name == "adagrad":
                self.square[row, k] += g**2
                w -= lr * g / (np.sqrt(self.square[row, k]) + eps)
            else:
                b1, b2 = c.betas
                self.count[row, k] += 1
                n = self.torch_steps if name == "sparse_adam" else int(self.count[row, k])
                self.moment[row, k] = b1 * self.moment[row, k] + (1 - b1) * g
                self.square[row, k] = b2 * self.square[row, k] + (1 - b2) * g**2
                m, v = self.moment[row, k] / (1 - b1**n), self.square[row, k] / (1 - b2**n)
                if name == "sparse_adam":  # torch puts eps beside the root that is not corrected
                    v = self.square[row, k]
                    w -= lr * math.sqrt(1 - b2**n) * m / (np.sqrt(v) + eps)
                else:
                    w -= lr * m / (np.sqrt(v) + eps)

    # rounds -------------------------------------------------------------------------------------

    def scores(self) -> Array:
        """Normalised utilities, in the order of chunks."""
        if self.config.utility == "l2":
            norm = np.sqrt(((self.weight * self.mask[:, :, None]) ** 2).sum(2))
            self.utility = norm / self.config.decay_per_step  # of after the step's decay
        score = self.utility.copy()
        if self.config.prefix:
            score = np.minimum.accumulate(score, 1)
        if self.config.normalize == "p95":
            for a, b in zip(self.first[:-1], self.first[1:], strict=True):
                positive = np.sort(score[a:b][score[a:b] > 0])
                if len(positive):
                    # the smallest score that at least 95 % of them do not exceed
                    level = float(positive[math.ceil(0.95 * len(positive)) - 1])
                    score[a:b] /= floor_upper16(level * self.scale) / self.scale
        return score.ravel()

    def round(self, *, force: bool = False) -> Outcome:
        """Run a round now."""
        score = self.scores()
        parts, targets = [slice(0, len(score))], [self.target]
        if self.config.normalize == "per_table":
            parts = [slice(a * self.k, b * self.k) for a, b in pairwise(self.first.tolist())]
            targets = self.shares
        plans = [self._decide(score[p], p, n) for p, n in zip(parts, targets, strict=True)]
        wrong = sum(plan[2] for plan in plans)
        full = int(self.mask.sum()) > self.target
        if wrong < self.config.trigger * self.target and not full and not force:
            return Outcome(False)
        found = Outcome(True, [j for p in plans for j in p[0]], [j for p in plans for j in p[1]])
        for j in found.evicted:
            self._drop(j)
        for j in found.admitted:
            self._admit(j)
        assert int(self.mask.sum()) <= self.target
        return found

    def _decide(self, score: Array, part: slice, target: int) -> tuple[list[int], list[int], int]:
        """The pseudocode of a round: chunks to evict, chunks to admit, chunks on the wrong side."""
        resident = self.mask.reshape(-1)[part]
        ranked = np.sort(score)[::-1]
        tau = math.inf if target == 0 else float(ranked[target - 1])
        h = self.config.hysteresis
        if tau > 0:
            out, into = score < tau * (1 - h), (score > 0) & (score >= tau * (1 + h))
        else:  # all that ever earned something fit; the others make room where they have to
            out, into = score == 0, score > 0
        # of equal scores the higher index goes first and the lower one comes first
        evict = sorted(np.flatnonzero(resident & out), key=lambda j: (score[j], -j))
        admit = sorted(np.flatnonzero(~resident & into), key=lambda j: (-score[j], j))
        held = int(resident.sum())
        n_new = max(0, min(len(admit), target - held + len(evict)))
        n_out = max(0, held + n_new - target)
        if n_out > len(evict):
            others = [j for j in np.flatnonzero(resident) if not out[j]]
            others.sort(key=lambda j: (score[j], -j))
            evict += others[: n_out - len(evict)]
        wrong = int((resident & (score < tau)).sum()) + int((~resident & (score > tau)).sum())
        return (
            [int(j) + part.start for j in evict[:n_out]],
            [int(j) + part.start for j in admit[:n_new]],
            wrong,
        )

    def _drop(self, chunk: int) -> None:
        row, k = divmod(chunk, self.k)
        assert self.mask[row, k]
        self.mask[row, k] = False
        self._clear(row, k)

    def _admit(self, chunk: int) -> None:
        row, k = divmod(chunk, self.k)
        assert not self.mask[row, k]
        self.mask[row, k] = True
        self._clear(row, k)
        if self.config.admission == "init":
            self.weight[row, k] = self.initial[row, k]

    def _clear(self, row: int, k: int) -> None:
        for array in (self.weight, self.square, self.moment, self.count):
            array[row, k] = 0
