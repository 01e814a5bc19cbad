"""CAFE: rows of their own for the ids that matter now, shared rows for the rest."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlkit.embeddings.baselines.base import CompressedEmbeddingBag
from mlkit.embeddings.baselines.config import CAFEConfig
from mlkit.embeddings.baselines.sketch import SLOTS, HotSketch
from mlkit.embeddings.id_hash import hash_ids
from mlkit.embeddings.memory import MemoryReport
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["CAFEEmbeddingBag"]

SKETCH_BYTES = SLOTS * 12
"""Of a bucket: id, score and row of four slots."""

FREE_BYTES = 4
"""Of an entry of the stack of free rows."""

FIRST_ROUND = 10
"""Without a threshold, rounds come after 10, 20, 40 ... steps until `decay_every` (ours)."""

HYSTERESIS = 0.1
"""Without a threshold, a row is kept down to this much below the score of the last place (ours)."""

MAX_PENDING = 1000
"""Backward passes that wait for `step` before the user is told that none comes."""


class CAFEEmbeddingBag(CompressedEmbeddingBag):
    """Hot ids own a row, cold ids share hashed ones (Zhang et al. 2024, CAFE, SIGMOD'24).

    While training, each id of a batch earns importance: the norm of its gradient in the backward
    pass, scaled to a mean of one in each step (as in CAFE's code). `HotSketch` keeps the scores of
    the most important ids. After each optimizer step `step` must run: it adds the importance, and
    gives free rows to ids whose score has reached the threshold; such a row begins as a copy of the
    shared one, so that no output jumps. Every `decay_every` steps scores are multiplied by `decay`,
    and an id whose score has fallen below the threshold loses its row. `register_optimizer`
    arranges all this, and zeroes the optimizer's state at rows that change hands.

    The budget holds weights, optimizer state, sketch (48 bytes for each row of its own, four ids
    for each, as in CAFE's code) and the stack of free rows. In a `torch.distributed` group the
    importances of all processes are gathered, so that all of them decide alike.

    Args:
        num_embeddings: N, the ids; less than 2^31.
        embedding_dim: D.
        memory_budget: Bytes (integer), "2GiB", or a fraction of the dense table's bytes with the
            same optimizer (float in (0, 1]).
        hash_share: Share of the budget for shared rows, in (0, 1); 0.5 in CAFE's code.
        threshold: Score of a hot id. CAFE's code takes 500; it must fit the length of the training
            and the budget. None (ours): the score of the last place, found anew in each round, so
            that all rows are in use.
        decay: Factor of all scores, in (0, 1]; ours is 0.9 every 100 steps (CAFE's code decays by
            the importance seen).
        decay_every: Steps between decays, at least 1.
        optimizer: "sgd", "rowwise_adagrad", "adagrad" or "adam": whose state counts.
        mode: "sum" or "mean".
        padding_idx: An id that counts in no bag; it takes one row, of zeros.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Whether gradients are sparse.
        seed: Keys the hashes.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        InvalidValueError: For a value out of range; if the budget is too small, with the minimum.

    Example:
        >>> bag = CAFEEmbeddingBag(1000, 64, memory_budget=0.2, mode="sum")
        >>> bag.hot_rows, bag.hashed_rows
        (84, 99)
    """

    free: Tensor
    free_top: Tensor
    steps: Tensor
    threshold: Tensor
    skipped: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        memory_budget: int | str | float,
        hash_share: float = 0.5,
        threshold: float | None = None,
        decay: float = 0.9,
        decay_every: int = 100,
        optimizer: str = "rowwise_adagrad",
        mode: Literal["sum", "mean"] = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        sparse: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            optimizer=optimizer,
            mode=mode,
            padding_idx=padding_idx,
            include_last_offset=include_last_offset,
            sparse=sparse,
        )
        if num_embeddings >= 1 << 31:
            raise InvalidValueError(
                f"num_embeddings must be less than 2^31 (ids of the sketch), got {num_embeddings}"
            )
        CAFEConfig(
            memory_budget,
            optimizer,
            hash_share=hash_share,
            threshold=threshold,
            decay=decay,
            decay_every=decay_every,
            seed=seed,
        )  # checks the ranges
        self.fixed_threshold = threshold
        self.decay = decay
        self.decay_every = decay_every
        self.seed = seed
        row = self.row_bytes(embedding_dim, dtype)
        budget = self.parse_budget(memory_budget, dtype)
        self.hot_rows, self.hashed_rows = self._split(budget, row, hash_share)
        rows = self.hot_rows + self.hashed_rows + int(self.padding_idx is not None)
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, device=device, dtype=dtype))
        self.sketch = HotSketch(self.hot_rows, seed=seed + 1, device=device)
        for name, size, kind in _SCALARS:
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        self.register_buffer("free", torch.empty(self.hot_rows, dtype=torch.int32, device=device))
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.reset_parameters()

    def _split(self, budget: int, row: int, hash_share: float) -> tuple[int, int]:
        """Rows of their own and shared ones."""
        fixed = sum(kind.itemsize for _, _, kind in _SCALARS)
        fixed += row * int(self.padding_idx is not None)
        hot = row + SKETCH_BYTES + FREE_BYTES
        if fixed + hot + row > budget:
            raise InvalidValueError(
                f"memory_budget of {budget:,} bytes is too small for a CAFE table of dimension "
                f"{self.embedding_dim}: the minimum is {fixed + hot + row:,} bytes"
            )
        left = budget - fixed
        shared = min(max(1, int(hash_share * left) // row), (left - hot) // row)
        shared = min(shared, self.num_embeddings)
        return min((left - shared * row) // hot, self.num_embeddings), shared

    def reset_parameters(self) -> None:
        """Draw initial values; forget scores, and who owns which row."""
        bound = 1 / math.sqrt(self.num_embeddings)
        nn.init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            if self.padding_idx is not None:
                self.weight[-1].zero_()
            self.sketch.reset_parameters()
            self.free.copy_(torch.arange(self.hot_rows - 1, -1, -1))
            self.free_top.fill_(self.hot_rows)
            self.steps.zero_()
            self.skipped.zero_()
            first = math.inf if self.fixed_threshold is None else self.fixed_threshold
            self.threshold.fill_(first)
        self._pending.clear()

    # ------------------------------------------------------------------ lookup

    def physical(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The row of `weight` for each id; `padding_idx` is not looked at."""
        own = self.sketch.owned_rows(ids)
        shared = self.hot_rows + hash_ids(ids, self.seed, self.hashed_rows)
        return torch.where(own >= 0, own, shared)

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """The row of each id."""
        return self.weight[self.physical(ids)]

    def pool(
        self,
        input: Int[Tensor, "*shape"],
        offsets: Int[Tensor, " bags"] | None,
        per_sample_weights: Float[Tensor, "*shape"] | None,
    ) -> Float[Tensor, "bags dim"]:
        """Pool checked ids, and note them for the backward pass."""
        rows, padding = self.physical(input), None
        if self.padding_idx is not None:
            padding = self.hot_rows + self.hashed_rows
            rows = torch.where(input == self.padding_idx, padding, rows)
        pooled = F.embedding_bag(
            rows,
            self.weight,
            None if offsets is None else offsets.long(),
            mode=self.mode,
            sparse=self.sparse,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
        if self.training and torch.is_grad_enabled():
            self._watch(pooled, input, offsets, per_sample_weights)
        return pooled

    # -------------------------------------------------------------- importance

    @torch.compiler.disable
    def _watch(
        self, pooled: Tensor, input: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> None:
        if not pooled.requires_grad:
            return
        position = torch.arange(input.numel(), device=input.device)
        if offsets is None:
            bag = position // max(1, input.shape[1])
        else:
            bag = torch.searchsorted(offsets.long(), position, right=True) - 1
        ids = input.reshape(-1).long()
        share = torch.ones(len(ids), device=ids.device)
        if weights is not None:
            share = weights.detach().reshape(-1).abs().float()
        if self.padding_idx is not None:
            real = ids != self.padding_idx
            ids, bag, share = ids[real], bag[real], share[real]
        if self.mode == "mean":
            share = share / torch.bincount(bag, minlength=pooled.shape[0])[bag]
        pooled.register_hook(functools.partial(self._record, ids, bag, share))

    def _record(self, ids: Tensor, bag: Tensor, share: Tensor, gradient: Tensor) -> None:
        importance = gradient.detach().float().norm(dim=1)[bag] * share
        good = importance.isfinite()
        self.skipped += (~good).sum()
        if len(self._pending) == MAX_PENDING:
            warnings.warn(
                f"{MAX_PENDING} backward passes of a CAFE table without a step: its hot rows stay "
                "as they are; call register_optimizer(optimizer), or step() after each step",
                stacklevel=2,
            )
            self._pending.clear()
        self._pending.append((ids[good], importance[good]))

    def _take(self) -> tuple[Tensor, Tensor]:
        """Ids and importances since the last step, of all processes."""
        device = self.weight.device
        ids = [i for i, _ in self._pending] or [torch.empty(0, dtype=torch.long, device=device)]
        values = [v for _, v in self._pending] or [torch.empty(0, device=device)]
        self._pending.clear()
        return _all_gather(torch.cat(ids)), _all_gather(torch.cat(values))

    # -------------------------------------------------------------- adaptation

    @torch.no_grad()
    def step(self) -> Int[Tensor, " slots"]:
        """Add what the backward passes since the last step found; promote and demote ids.

        Returns:
            Rows of `weight` that an id has got: state of an optimizer there belongs to another.
        """
        ids, importance = self._take()
        self.steps += 1
        total = importance.sum()
        distinct, place = ids.unique(return_inverse=True)
        if total > 0:
            summed = torch.zeros(len(distinct), device=ids.device)
            summed.index_add_(0, place, importance * (len(ids) / total))
            self.sketch.insert(distinct[summed > 0], summed[summed > 0])
        if self._round(int(self.steps)):
            return self._promote(*(self.sketch.keys >= 0).nonzero(as_tuple=True))
        found, bucket, slot = self.sketch.locate(distinct)
        return self._promote(bucket[found], slot[found])

    def _round(self, steps: int) -> bool:
        """Decay, set the threshold and demote, if it is time."""
        is_decay = steps % self.decay_every == 0
        doubled, rest = divmod(steps, FIRST_ROUND)
        is_early = rest == 0 and doubled > 0 and doubled & (doubled - 1) == 0
        if not (is_decay or (is_early and self.fixed_threshold is None)):
            return False
        sketch = self.sketch
        if is_decay:
            sketch.scores *= self.decay
        keep = self.threshold
        if self.fixed_threshold is None:
            scores = sketch.scores[sketch.keys >= 0]
            last = scores.topk(self.hot_rows).values[-1] if len(scores) > self.hot_rows else 0.0
            self.threshold.fill_(last)
            keep = self.threshold * (1 - HYSTERESIS)
        cells = ((sketch.rows >= 0) & (sketch.scores < keep)).nonzero(as_tuple=True)
        top, count = int(self.free_top), len(cells[0])
        self.free[top : top + count] = sketch.rows[cells]
        self.free_top += count
        sketch.rows[cells] = -1
        return True

    def _promote(self, bucket: Tensor, slot: Tensor) -> Tensor:
        """Give free rows to the best of these ids that have reached the threshold."""
        sketch = self.sketch
        scores = sketch.scores[bucket, slot]
        chosen = (sketch.rows[bucket, slot] < 0) & (scores >= self.threshold)
        bucket, slot, scores = bucket[chosen], slot[chosen], scores[chosen]
        top = int(self.free_top)
        best = scores.argsort(descending=True, stable=True)[:top]
        cells = bucket[best], slot[best]
        rows = self.free[top - len(best) : top].flip(0).long()
        self.free_top -= len(best)
        shared = hash_ids(sketch.keys[cells], self.seed, self.hashed_rows)
        self.weight[rows] = self.weight[self.hot_rows + shared]
        sketch.rows[cells] = rows.int()
        return rows

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Run `step` after each step of an optimizer, and zero its state at rows newly given.

        Returns:
            A handle whose `remove` undoes it.

        Raises:
            InvalidTypeError: For something else than an optimizer.
            InvalidValueError: If the optimizer does not train this table.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidTypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not any(p is self.weight for group in optimizer.param_groups for p in group["params"]):
            raise InvalidValueError(
                f"this {type(optimizer).__name__} does not train the table's weight; convert the "
                "model and move it to its device before the optimizer is made"
            )
        return optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rows = self.step()
        for value in optimizer.state.get(self.weight, {}).values():
            if isinstance(value, Tensor) and value.shape[:1] == self.weight.shape[:1]:
                value[rows] = 0

    # ------------------------------------------------------------------- bytes

    def memory_report(self) -> MemoryReport:
        """Count everything that is held; the sketch and the counters are "other"."""
        report = super().memory_report()
        free = self.free.numel() * self.free.element_size()
        held = sum(b.numel() * b.element_size() for b in self.buffers())
        return MemoryReport(
            weight_bytes=report.weight_bytes,
            optimizer_bytes=report.optimizer_bytes,
            header_bytes=0,
            allocator_bytes=free,
            other_bytes=held - free,
            dense_bytes=report.dense_bytes,
            dense_weight_bytes=report.dense_weight_bytes,
        )


_SCALARS: tuple[tuple[str, tuple[()], torch.dtype], ...] = (
    ("free_top", (), torch.int64),
    ("steps", (), torch.int64),
    ("threshold", (), torch.float32),
    ("skipped", (), torch.int64),
)


def _all_gather(values: Tensor) -> Tensor:
    """The values of all processes one after the other; these alone without a group."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = int(max(sizes))
    parts = [values.new_empty(longest) for _ in range(world)]
    dist.all_gather(parts, F.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
