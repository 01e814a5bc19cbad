"""A pruning round: the least useful chunks lose their storage to more useful ones."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlkit.embeddings.fiited.initial import initial_values
from mlkit_kernels.dynamic_embedding import Candidates, kth_largest, percentile
from mlkit_kernels.dynamic_embedding import op as kernels

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["Round", "RoundStats"]

logger = logging.getLogger(__name__)

_WARM_UP = 1000  # steps before which much churn is expected
_MUCH_CHURN = 0.1
_LEAST = 2.0**-126  # the smallest normal float32: scores below it count as zero
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class RoundStats:
    """What a round did.

    Args:
        step: After which step of training.
        threshold: Score above which chunks belong into the pool; of the first group where each
            table has its own.
        evicted: Chunks that lost their storage.
        admitted: Chunks that got some.
        resident: Chunks that have storage now.
        target: Chunks that may have it.
        misplaced: Share of `target` that was on the wrong side of the threshold.
    """

    step: int
    threshold: float
    evicted: int
    admitted: int
    resident: int
    target: int
    misplaced: float

    @property
    def churn(self) -> float:
        """Evicted chunks as a share of the target."""
        return self.evicted / self.target


@dataclass(frozen=True)
class _Group:
    """Tables that compete for a number of chunks."""

    tables: Tensor
    inverse: Tensor
    target: int
    resident: int


class Round:
    """Decides, and carries out.

    1. Score the chunks: utilities, divided by a percentile of their table's where `normalize` says.
    2. The threshold is the score of the last chunk that fits, found exactly (`_find`).
    3. Residents below it by the hysteresis may be evicted, others above it by the hysteresis (or
       at it, if there is none) admitted, best first, as many as there is room for; where the target
       was lowered, the lowest residents go whatever the hysteresis says. Where all chunks with a
       utility fit, residents without any make room for them.
    """

    def __init__(self, store: DynamicEmbeddingStore) -> None:
        self._store = store
        self._config = store.config

    @torch.no_grad()
    def run(self, *, force: bool = False) -> RoundStats | None:
        """Carry the round out; None if the trigger's share of chunks is not reached."""
        store = self._store
        if self._config.utility == "l2":
            self._measure_norms()
        evict, admit, thresholds, misplaced = [], [], [], 0
        for group in self._groups():
            threshold, found = self._find(group)
            misplaced += int(torch.count_nonzero(found.evict_scores < threshold))
            misplaced += int(torch.count_nonzero(found.admit_scores > threshold))
            out, new = self._choose(group, threshold, found)
            evict.append(out)
            admit.append(new)
            thresholds.append(threshold)
        share = misplaced / store.target
        if share < self._config.trigger and store.num_resident <= store.target and not force:
            return None
        evicted, admitted = torch.cat(evict), torch.cat(admit)
        self._apply(evicted, admitted)
        store.placement.tidy(store.plan.most_free_units)
        stats = RoundStats(
            step=store.steps,
            threshold=thresholds[0],
            evicted=len(evicted),
            admitted=len(admitted),
            resident=store.num_resident,
            target=store.target,
            misplaced=share,
        )
        if store.steps >= _WARM_UP and stats.churn > _MUCH_CHURN:
            logger.warning(
                "step %d: %.0f %% of the chunks changed hands in a round; a larger hysteresis "
                "(now %s) or a slower decay (now %s) would keep more of what they learned",
                store.steps, 100 * stats.churn, self._config.hysteresis, self._config.decay,
            )  # fmt: skip
        return stats

    def _measure_norms(self) -> None:
        """Utility "l2": the norms of the values."""
        store = self._store
        stored = store.layout.utilities(store.header, self._config.num_chunks)
        for start in range(0, len(stored), 1 << 16):
            rows = torch.arange(start, min(start + (1 << 16), len(stored)), device=stored.device)
            chunks = (
                store.read(rows)
                .float()
                .nan_to_num(0, 0, 0)
                .view(len(rows), self._config.num_chunks, -1)
            )
            store.put_utilities(rows, torch.linalg.vector_norm(chunks, dim=2))

    def _groups(self) -> list[_Group]:
        store = self._store
        tables = store.tables.metadata()
        one = torch.ones(len(tables))
        if self._config.normalize == "per_table":
            total = sum(self._size(t) for t in range(len(tables)))
            return [
                _Group(
                    store.tables.metadata((t,)),
                    one[:1],
                    store.target * self._size(t) // total,
                    int(store.resident(store.tables.rows_of(t)).sum()),
                )
                for t in range(len(tables))
            ]
        inverse = one
        if self._config.normalize == "p95":
            counts = self._histogram(_Group(tables, one, 0, 0), within=-1)
            scales = [percentile(row, 0.95) for row in counts]
            inverse = torch.tensor([1 / s if s > 0 else 1.0 for s in scales])
        return [_Group(tables, inverse, store.target, store.num_resident)]

    def _size(self, table: int) -> int:
        spec = self._store.tables.specs[table]
        return (spec.num_embeddings - (spec.padding_idx is not None)) * self._config.num_chunks

    def _histogram(self, group: _Group, within: int, *, resident_only: bool = False) -> Tensor:
        store = self._store
        return kernels.histogram(
            store.header, group.tables, store.layout, self._config.num_chunks, group.inverse,
            store.exponent, self._config.prefix, resident_only, within,
        )  # fmt: skip

    def _find(self, group: _Group) -> tuple[float, Candidates]:
        """Return the threshold, and at least the chunks on its wrong sides.

        The bin of the threshold is known from one histogram; the candidates are all that are on
        the wrong side of some score in it, so that the exact one is found among them.
        """
        upper = self._histogram(group, -1).sum(0)
        if group.target == 0:
            return math.inf, self._candidates(group, math.inf, _LARGEST)
        if int(upper.sum()) < group.target:
            return 0.0, self._candidates(group, _LEAST, 0.0)
        place, above = kth_largest(upper, group.target)
        start, stop = _score(place << 16), _score((place + 1) << 16)
        found = self._candidates(group, stop, _below(start))
        scores = torch.cat([found.evict_scores, found.admit_scores])
        inside = scores[(scores >= start) & (scores < stop) & (scores > 0)]
        nth = len(inside) - (group.target - above) + 1
        return float(torch.kthvalue(inside, nth).values), found

    def _resident_threshold(self, group: _Group, count: int) -> float:
        """Return the `count`-th largest positive score of residents; 0 if there are fewer."""
        upper = self._histogram(group, -1, resident_only=True).sum(0)
        if int(upper.sum()) < count or count == 0:
            return 0.0 if count else math.inf
        high, above = kth_largest(upper, count)
        lower = self._histogram(group, high, resident_only=True).sum(0)
        low, _ = kth_largest(lower, count - above)
        return _score(high << 16 | low)

    def _candidates(self, group: _Group, low: float, high: float) -> Candidates:
        store = self._store
        return kernels.candidates(
            store.header, group.tables, store.layout, self._config.num_chunks, group.inverse,
            low, high, store.exponent, self._config.prefix,
        )  # fmt: skip

    def _choose(self, group: _Group, threshold: float, found: Candidates) -> tuple[Tensor, Tensor]:
        """Return the numbers of the chunks to evict and of those to admit."""
        h = self._config.hysteresis
        low = torch.tensor(threshold * (1 - h) or _LEAST, dtype=torch.float32)
        high = torch.tensor(threshold * (1 + h), dtype=torch.float32)
        leaving = found.evict_scores < low
        evict, evict_scores = found.evict[leaving], found.evict_scores[leaving]
        coming = found.admit_scores >= high
        admit, admit_scores = found.admit[coming], found.admit_scores[coming]
        room = group.target - group.resident
        num_new = max(0, min(len(admit), room + len(evict)))
        num_out = max(0, num_new - room)
        if num_out > len(evict):
            evict, evict_scores = self._lowest(group, num_out)
        # Best first, lower number first; worst first, higher number first: with `prefix` a row's
        # later chunk never stays without an earlier one.
        worst = _first(-evict_scores.flip(0), num_out).flip(0)
        return evict[worst], admit[_first(admit_scores, num_new)]

    def _lowest(self, group: _Group, count: int) -> tuple[Tensor, Tensor]:
        """Return at least the `count` residents with the lowest scores."""
        keep = group.resident - count
        limit = self._resident_threshold(group, keep)
        bound = float(torch.nextafter(torch.tensor(limit), torch.tensor(math.inf)))
        found = self._candidates(group, bound, math.inf)
        return found.evict, found.evict_scores

    def _apply(self, evict: Tensor, admit: Tensor) -> None:
        store, per_row = self._store, self._config.num_chunks
        # A byte for each row of the header takes less than sorting the rows, in time and in memory.
        flips = torch.zeros(len(store.header), dtype=torch.uint8, device=store.header.device)
        for numbers in (evict, admit):
            flips.index_add_(0, numbers // per_row, (1 << numbers % per_row).to(torch.uint8))
        rows = flips.nonzero().squeeze(1)
        if not len(rows):
            return
        store.placement.set_masks(rows, store.placement.masks(rows) ^ flips.index_select(0, rows))
        if self._config.admission == "init" and len(admit):
            row, chunk = admit // per_row, admit % per_row
            values = initial_values(self._config, store.tables, row, store.embedding_dim)
            values = values.view(len(row), per_row, -1)[torch.arange(len(row)), chunk]
            at = store.placement.slots(row)[torch.arange(len(row)), chunk]
            store.pool.detach()[at] = values.to(store.pool.dtype)


def _first(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest scores; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = torch.kthvalue(scores, len(scores) - count + 1).values
    chosen = scores > last
    ties = (scores == last).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def _score(bits: int) -> float:
    """The float32 of these bits."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _below(score: float) -> float:
    """The next smaller float32, at least 0."""
    return float(torch.nextafter(torch.tensor(score), torch.tensor(0.0)))
