"""A sampler that trains on a coreset: the same every epoch, or a fresh draw of its budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from mlkit.coresets.scores import ArrayScore, Hard, ScoreTable
from mlkit.coresets.selection import Unseen, _pool
from mlkit.coresets.stratified import Stratified
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["CoverageCentricSampler"]


class CoverageCentricSampler(Sampler[int]):
    """Yield the indices of a coverage-centric coreset in random order.

    With `resample_every=n`, strata, cutoff and budgets stay as they are and the members are drawn
    afresh every n epochs: each epoch costs the same, and over time training sees more of the data.
    That is an extension of ours, which no paper measures; the default is the fixed coreset.

    All ranks draw the same indices; a distributed sampler around this one (Lightning adds it)
    divides them.

    Args:
        scores: A `ScoreTable`, a column of one, an `ArrayScore`, or an array with `hard`.
        selector: `CCS` or `Stratified`.
        score: Which column of a `ScoreTable` to use.
        hard: Hard side of a plain array.
        cutoff_scores: See `Selector.select`.
        labels: Classes, for `class_balanced` selectors.
        unseen: See `Selector.select`.
        resample_every: Epochs between draws; None keeps the first.
        steps_per_epoch: Batches per epoch; the coreset is repeated in new orders to fill them.
            None means one pass. Needs `batch_size`.
        batch_size: Examples per batch, with `steps_per_epoch`.

    Example:
        >>> from mlkit.coresets import CCS
        >>> scores = np.arange(100, dtype=np.float32)
        >>> sampler = CoverageCentricSampler(scores, CCS(prune_rate=0.9), hard="high")
        >>> len(sampler), len(list(sampler))
        (10, 10)
    """

    def __init__(
        self,
        scores: Any,
        selector: Stratified,
        *,
        score: str = "aum",
        hard: Hard | None = None,
        cutoff_scores: ArrayScore | None = None,
        labels: Any = None,
        unseen: Unseen = "error",
        resample_every: int | None = None,
        steps_per_epoch: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not isinstance(selector, Stratified):
            raise InvalidTypeError(
                f"the sampler draws from strata: pass CCS or Stratified, got "
                f"{type(selector).__name__}"
            )
        for name, value in (
            ("resample_every", resample_every),
            ("steps_per_epoch", steps_per_epoch),
            ("batch_size", batch_size),
        ):
            if value is not None and value < 1:
                raise InvalidValueError(f"{name} must be at least 1, got {value}")
        if (steps_per_epoch is None) != (batch_size is None):
            raise InvalidValueError("steps_per_epoch and batch_size go together: pass both")
        column = scores[score] if isinstance(scores, ScoreTable) else scores
        pool = _pool(column, hard, cutoff_scores, labels, None, None, None, unseen)
        self.selector = selector
        self.plan = selector.plan(pool)
        self.resample_every = resample_every
        self.epoch = 0
        size = int(self.plan.budgets.sum())
        self._length = size if steps_per_epoch is None else steps_per_epoch * int(batch_size or 0)
        if not size:
            raise InvalidValueError(
                f"the coreset is empty: prune_rate={selector.prune_rate} of {pool.num_samples}"
            )

    def __len__(self) -> int:
        return self._length

    def indices(self, epoch: int | None = None) -> np.ndarray:
        """The coreset of an epoch, ascending; the epoch to come if None."""
        epoch = self.epoch if epoch is None else epoch
        draw = 0 if self.resample_every is None else epoch // self.resample_every
        return self.plan.draw(self.selector.seed + draw * 0x9E3779B1)

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        coreset = torch.from_numpy(self.indices(epoch))
        generator = torch.Generator().manual_seed(((self.selector.seed << 20) + epoch) % 2**63)
        passes = math.ceil(self._length / len(coreset))
        order = torch.cat(
            [torch.randperm(len(coreset), generator=generator) for _ in range(passes)]
        )
        yield from coreset[order[: self._length]].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; without a call, iterations count as epochs."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch = state["epoch"]
