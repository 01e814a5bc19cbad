"""The hashing trick: ids share the rows of a smaller table."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.baselines.base import CompressedEmbeddingBag, largest_fitting
from mlkit.embeddings.id_hash import hash_ids

__all__ = ["HashingEmbeddingBag"]


class HashingEmbeddingBag(CompressedEmbeddingBag):
    """Ids hashed into M rows of full dimension (Weinberger et al. 2009).

    M is as large as the budget allows; with room for all N rows each id has its own. With a
    `padding_idx` there is one row more, of zeros, for it. Initial values are uniform within
    1/sqrt(N), as those of dense tables in DLRM's code and of the hashing baseline in that of CAFE.

    Args:
        num_embeddings: N, the ids.
        embedding_dim: D.
        memory_budget: Bytes (integer), "2GiB", or a fraction of the dense table's bytes with the
            same optimizer (float in (0, 1]).
        optimizer: "sgd", "rowwise_adagrad", "adagrad" or "adam": whose state counts.
        mode: "sum" or "mean".
        padding_idx: An id that counts in no bag.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Whether gradients are sparse.
        seed: Keys the hash.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        InvalidValueError: For a value out of range; if the budget holds no row, with the minimum.

    Example:
        >>> bag = HashingEmbeddingBag(1000, 16, memory_budget=0.1)
        >>> tuple(bag.weight.shape), bag.memory_report().byte_fraction
        ((100, 16), 0.1)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        memory_budget: int | str | float,
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
        row, extra = self.row_bytes(embedding_dim, dtype), int(self.padding_idx is not None)
        self.seed = seed
        self.hashed_rows = largest_fitting(
            lambda rows: (rows + extra) * row,
            self.parse_budget(memory_budget, dtype),
            1,
            num_embeddings,
            f"a hashed table of dimension {embedding_dim}",
        )
        rows = self.hashed_rows + extra
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values."""
        bound = 1 / math.sqrt(self.num_embeddings)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[-1].zero_()

    def hashed(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The row of `weight` for each id; `padding_idx` is not looked at."""
        if self.hashed_rows == self.num_embeddings:
            return ids.long()
        return hash_ids(ids, self.seed, self.hashed_rows)

    def pool(
        self,
        input: Int[Tensor, "*shape"],
        offsets: Int[Tensor, " bags"] | None,
        per_sample_weights: Float[Tensor, "*shape"] | None,
    ) -> Float[Tensor, "bags dim"]:
        """Pool checked ids."""
        rows, padding = self.hashed(input), None
        if self.padding_idx is not None:
            padding = self.hashed_rows
            rows = torch.where(input == self.padding_idx, padding, rows)
        return F.embedding_bag(
            rows,
            self.weight,
            None if offsets is None else offsets.long(),
            mode=self.mode,
            sparse=self.sparse,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """The row of each id."""
        return self.weight[self.hashed(ids)]
