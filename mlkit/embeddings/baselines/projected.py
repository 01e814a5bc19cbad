"""A table of fewer dimensions, brought to the full one by a projection or by zeros."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.baselines.base import CompressedEmbeddingBag
from mlkit.embeddings.memory import dense_bytes
from mlkit.errors import InvalidValueError

__all__ = ["ProjectedEmbeddingBag", "projected_bytes"]


def projected_bytes(
    rows: int, table_dim: int, dim: int, optimizer: str, element_size: int = 4, project: bool = True
) -> int:
    """Bytes of a table of `table_dim` dimensions and of its projection to `dim`.

    A projection is a matrix like the table, with the optimizer's state; it is absent where
    `table_dim` is `dim`.
    """
    table = dense_bytes(rows, table_dim, optimizer, element_size)
    if not project or table_dim == dim:
        return table
    return table + dense_bytes(dim, table_dim, optimizer, element_size)


class ProjectedEmbeddingBag(CompressedEmbeddingBag):
    """What `NarrowEmbeddingBag` and `MDEEmbeddingBag` share: d of D dimensions for every row.

    The bag is pooled in d dimensions, then projected (without bias) or padded with zeros; both are
    linear, so that each id has its row. Initial values are Xavier's uniform ones for table and
    projection, as in the MDE code of DLRM; without projection uniform within 1/sqrt(N), as in DLRM.
    """

    projection: nn.Parameter | None

    def _make(
        self,
        table_dim: int,
        project: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if isinstance(table_dim, bool) or not isinstance(table_dim, int):
            raise InvalidValueError(f"table_dim must be an integer, got {table_dim!r}")
        if not 1 <= table_dim <= self.embedding_dim:
            raise InvalidValueError(
                f"table_dim must be in 1 .. {self.embedding_dim} (embedding_dim), got {table_dim}"
            )
        self.table_dim = table_dim
        self.weight = nn.Parameter(
            torch.empty(self.num_embeddings, table_dim, device=device, dtype=dtype)
        )
        if project and table_dim < self.embedding_dim:
            self.projection = nn.Parameter(
                torch.empty(self.embedding_dim, table_dim, device=device, dtype=dtype)
            )
        else:
            self.projection = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values."""
        if self.projection is None:
            bound = 1 / math.sqrt(self.num_embeddings)
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(self.weight)
            nn.init.xavier_uniform_(self.projection)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def pool(
        self,
        input: Int[Tensor, "*shape"],
        offsets: Int[Tensor, " bags"] | None,
        per_sample_weights: Float[Tensor, "*shape"] | None,
    ) -> Float[Tensor, "bags dim"]:
        """Pool checked ids."""
        pooled = F.embedding_bag(
            input,
            self.weight,
            offsets if offsets is None else offsets.to(input.dtype),
            mode=self.mode,
            sparse=self.sparse,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        return self._widen(pooled)

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """The row of each id."""
        return self._widen(self.weight[ids])

    def _widen(self, vectors: Float[Tensor, "n table_dim"]) -> Float[Tensor, "n dim"]:
        if self.projection is not None:
            return F.linear(vectors, self.projection)
        return F.pad(vectors, (0, self.embedding_dim - self.table_dim))
