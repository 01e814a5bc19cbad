"""HotSketch: the ids of highest importance in a stream, in fixed memory."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlkit.embeddings.id_hash import hash_ids
from mlkit.errors import InvalidValueError

__all__ = ["SLOTS", "HotSketch"]

SLOTS = 4
"""Slots of a bucket, as in CAFE's code."""

EMPTY = -1


class HotSketch(nn.Module):
    """Buckets of four slots, each with an id, its score and the row that it owns or -1.

    An id lives in the bucket that its hash names. If its bucket is full, it takes the place of the
    one with the lowest score that owns no row, and its score goes on from there (Space-Saving;
    Zhang et al. 2024, CAFE, section 3.2 and code). If all four own rows, it is forgotten.

    A batch is taken at once: first the ids that are there, then the new ones of each bucket from
    the least to the most important (our decision: then what matters most is not displaced).

    Args:
        buckets: At least 1; 48 bytes each.
        seed: Keys the hash.
        device: Of the buffers.

    Raises:
        InvalidValueError: For less than one bucket.

    Example:
        >>> sketch = HotSketch(1)
        >>> sketch.insert(torch.arange(5), torch.tensor([5.0, 1, 2, 3, 4]))
        >>> sketch.keys.sort().values, sketch.scores.sort().values
        (tensor([[0, 2, 3, 4]], dtype=torch.int32), tensor([[2., 3., 4., 6.]]))
    """

    keys: Tensor
    scores: Tensor
    rows: Tensor

    def __init__(
        self, buckets: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if buckets < 1:
            raise InvalidValueError(f"buckets must be at least 1, got {buckets}")
        self.seed = seed
        shape = (buckets, SLOTS)
        self.register_buffer("keys", torch.empty(shape, dtype=torch.int32, device=device))
        self.register_buffer("scores", torch.empty(shape, dtype=torch.float32, device=device))
        self.register_buffer("rows", torch.empty(shape, dtype=torch.int32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget everything."""
        self.keys.fill_(EMPTY)
        self.scores.zero_()
        self.rows.fill_(-1)

    def locate(
        self, ids: Int[Tensor, " n"]
    ) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Whether each id is there, its bucket, and its slot (0 if it is not there)."""
        bucket = hash_ids(ids, self.seed, self.keys.shape[0])
        match = self.keys[bucket] == ids[:, None]
        return match.any(1), bucket, match.int().argmax(1)

    def owned_rows(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The row that each id owns, or -1."""
        bucket = hash_ids(ids, self.seed, self.keys.shape[0])
        own = torch.where(self.keys[bucket] == ids[..., None], self.rows[bucket], -1)
        return own.amax(-1).long()

    @torch.no_grad()
    def insert(self, ids: Int[Tensor, " n"], importance: Float[Tensor, " n"]) -> None:
        """Add importance to ids.

        Args:
            ids: Distinct, in 0 .. 2^31 - 1.
            importance: Finite, above 0.
        """
        found, bucket, slot = self.locate(ids)
        cells = bucket[found], slot[found]
        self.scores[cells] += importance[found]
        ids, bucket, importance = ids[~found], bucket[~found], importance[~found]
        order = importance.argsort(stable=True)
        order = order[bucket[order].argsort(stable=True)]
        ids, bucket, importance = ids[order], bucket[order], importance[order]
        turn = torch.arange(len(ids), device=ids.device)
        turn = turn - torch.searchsorted(bucket, bucket)
        for number in range(int(turn.max()) + 1 if len(ids) else 0):
            now = turn == number
            self._displace(ids[now], bucket[now], importance[now])

    def _displace(self, ids: Tensor, bucket: Tensor, importance: Tensor) -> None:
        """Put new ids, one per bucket, in place of the weakest without a row."""
        scores = self.scores[bucket].masked_fill(self.rows[bucket] >= 0, torch.inf)
        scores = scores.masked_fill(self.keys[bucket] == EMPTY, 0.0)
        lowest, slot = scores.min(1)
        free = lowest < torch.inf
        cells = bucket[free], slot[free]
        self.keys[cells] = ids[free].int()
        self.scores[cells] = lowest[free] + importance[free]
