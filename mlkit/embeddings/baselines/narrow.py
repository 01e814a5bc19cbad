"""The plain way to fewer bytes: one smaller dimension for all rows of a table."""

from __future__ import annotations

from typing import Literal

import torch

from mlkit.embeddings.baselines.base import largest_fitting
from mlkit.embeddings.baselines.projected import ProjectedEmbeddingBag, projected_bytes

__all__ = ["NarrowEmbeddingBag"]


class NarrowEmbeddingBag(ProjectedEmbeddingBag):
    """d < D dimensions for every row, projected to D by a matrix without bias, or zero-padded.

    d is the largest within the budget, which counts the projection; with room for D dimensions it
    is the dense table.

    Args:
        num_embeddings: N, the ids.
        embedding_dim: D.
        memory_budget: Bytes (integer), "2GiB", or a fraction of the dense table's bytes with the
            same optimizer (float in (0, 1]).
        project: Whether to project; otherwise the D - d last values are zero.
        optimizer: "sgd", "rowwise_adagrad", "adagrad" or "adam": whose state counts.
        mode: "sum" or "mean".
        padding_idx: An id that counts in no bag.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Whether the table's gradients are sparse; those of the projection are dense.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        InvalidValueError: For a value out of range; if one dimension is too much, with the minimum.

    Example:
        >>> bag = NarrowEmbeddingBag(1000, 16, memory_budget=0.5, project=False)
        >>> bag.table_dim, round(bag.memory_report().byte_fraction, 3)
        (7, 0.471)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        memory_budget: int | str | float,
        project: bool = True,
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
        size = (dtype or torch.get_default_dtype()).itemsize
        budget = self.parse_budget(memory_budget, dtype)

        def nbytes(table_dim: int) -> int:
            return projected_bytes(
                num_embeddings, table_dim, embedding_dim, optimizer, size, project
            )

        # The dense table has no projection, so that it may take less than fewer dimensions do.
        is_dense = nbytes(embedding_dim) <= max(budget, nbytes(1))
        least = embedding_dim if is_dense else 1
        most = embedding_dim if is_dense else embedding_dim - 1
        what = f"a narrow table of {num_embeddings} rows"
        table_dim = largest_fitting(nbytes, budget, least, most, what)
        self._make(table_dim, project, device, dtype)
