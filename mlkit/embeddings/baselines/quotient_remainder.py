"""The quotient-remainder trick: a row is composed of two, and no two ids have the same pair."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.baselines.base import CompressedEmbeddingBag, largest_fitting
from mlkit.errors import InvalidValueError

__all__ = ["QREmbeddingBag"]


class QREmbeddingBag(CompressedEmbeddingBag):
    """Row of id i: quotient[i // m] * remainder[i % m] (Shi et al. 2020, arXiv 1909.02107).

    m is the largest with m + ceil(N/m) rows within the budget, at least sqrt(N) (our decision;
    DLRM's code fixes the number of ids that share a row of the quotient table, a small m whose
    table shrinks in large steps only: a half, a third). The product or sum is taken of every id's
    two rows, then pooled; DLRM's code pools first, which differs for bags of several ids.

    Initial values: the remainder table uniform within 1/sqrt(N), and for "mult" the quotient table
    uniform within 1/sqrt(N) of one, so that rows begin as those of a dense table in DLRM (our
    decision; DLRM's code draws both tables from 1/sqrt(N) .. 1, which makes all rows positive).

    Args:
        num_embeddings: N, the ids.
        embedding_dim: D.
        memory_budget: Bytes (integer), "2GiB", or a fraction of the dense table's bytes with the
            same optimizer (float in (0, 1]); about 2 sqrt(N) rows are the least.
        operation: "mult" or "add".
        optimizer: "sgd", "rowwise_adagrad", "adagrad" or "adam": whose state counts.
        mode: "sum" or "mean".
        padding_idx: An id that counts in no bag.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Whether gradients are sparse.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        InvalidValueError: For a value out of range; if the budget is too small, with the minimum.

    Example:
        >>> bag = QREmbeddingBag(1000, 16, memory_budget=0.1)
        >>> tuple(bag.remainder.shape), tuple(bag.quotient.shape)
        ((88, 16), (12, 16))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        memory_budget: int | str | float,
        operation: Literal["mult", "add"] = "mult",
        optimizer: str = "rowwise_adagrad",
        mode: Literal["sum", "mean"] = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        sparse: bool = False,
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
        if operation not in ("mult", "add"):
            raise InvalidValueError(f"operation must be 'mult' or 'add', got {operation!r}")
        self.operation = operation
        row = self.row_bytes(embedding_dim, dtype)
        self.divisor = largest_fitting(
            lambda m: (m + -(-num_embeddings // m)) * row,
            self.parse_budget(memory_budget, dtype),
            math.isqrt(num_embeddings - 1) + 1,
            num_embeddings,
            f"a quotient-remainder table of {num_embeddings} x {embedding_dim}",
        )
        quotients = -(-num_embeddings // self.divisor)
        self.quotient = nn.Parameter(
            torch.empty(quotients, embedding_dim, device=device, dtype=dtype)
        )
        self.remainder = nn.Parameter(
            torch.empty(self.divisor, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values."""
        bound = 1 / math.sqrt(self.num_embeddings)
        centre = 1.0 if self.operation == "mult" else 0.0
        nn.init.uniform_(self.quotient, centre - bound, centre + bound)
        nn.init.uniform_(self.remainder, -bound, bound)

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """The row of each id."""
        ids = ids.long()
        quotient = F.embedding(ids // self.divisor, self.quotient, sparse=self.sparse)
        remainder = F.embedding(ids % self.divisor, self.remainder, sparse=self.sparse)
        return quotient * remainder if self.operation == "mult" else quotient + remainder

    def pool(
        self,
        input: Int[Tensor, "*shape"],
        offsets: Int[Tensor, " bags"] | None,
        per_sample_weights: Float[Tensor, "*shape"] | None,
    ) -> Float[Tensor, "bags dim"]:
        """Pool checked ids: a bag over the rows of the batch, one more of zeros for padding."""
        rows = F.pad(self.rows(input.reshape(-1)), (0, 0, 0, 1))
        number = torch.arange(input.numel(), device=input.device).view(input.shape)
        padding = None
        if self.padding_idx is not None:
            padding = input.numel()
            number = torch.where(input == self.padding_idx, padding, number)
        return F.embedding_bag(
            number,
            rows,
            None if offsets is None else offsets.long(),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
