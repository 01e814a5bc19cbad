"""Mixed dimensions: a table's dimension follows how often each of its rows is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from mlkit.embeddings.baselines.projected import ProjectedEmbeddingBag, projected_bytes
from mlkit.errors import InvalidValueError

__all__ = ["MDEEmbeddingBag", "mixed_dimensions"]


class MDEEmbeddingBag(ProjectedEmbeddingBag):
    """One table of MDE (Ginart et al. 2019, arXiv 1909.11810): `table_dim` projected to D.

    The dimensions of a model's tables hang together: `mixed_dimensions` finds them.

    Args:
        num_embeddings: N, the ids.
        embedding_dim: D.
        table_dim: d, in 1 .. D; with D there is no projection.
        optimizer: "sgd", "rowwise_adagrad", "adagrad" or "adam": whose state counts.
        mode: "sum" or "mean".
        padding_idx: An id that counts in no bag.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Whether the table's gradients are sparse; those of the projection are dense.
        device: Of the weights.
        dtype: Of the weights.

    Raises:
        InvalidValueError: For a value out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        table_dim: int,
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
        self._make(table_dim, True, device, dtype)


def mixed_dimensions(
    rows: Sequence[int],
    dim: int | Sequence[int],
    budget_bytes: int,
    *,
    alpha: float = 0.3,
    optimizer: str = "rowwise_adagrad",
    element_size: int = 4,
) -> list[int]:
    """Dimensions of the tables of a model, by the popularity rule of Ginart et al. (2019).

    With one read per table and example, a row of a table of n rows has popularity 1/n, and the
    table's dimension is d = lambda * n^-alpha, rounded and kept in 1 .. D. The largest lambda is
    taken with which tables, projections and optimizer state are within the budget. DLRM's code
    fixes the dimension of the smallest table instead, and has no budget.

    Args:
        rows: Rows of each table.
        dim: D, of all tables or of each.
        budget_bytes: For all tables together.
        alpha: 0 gives all tables the same dimension; 0.3 as in DLRM's code (`--md-temperature`).
        optimizer: Whose state counts.
        element_size: Bytes of a weight.

    Returns:
        The dimension of each table.

    Raises:
        InvalidValueError: For a value out of range; if one dimension for each table is too much,
            with the minimum.

    Example:
        >>> mixed_dimensions([100, 10_000, 1_000_000], 64, 20_000_000, alpha=0.3)
        [55, 14, 3]
    """
    dims = [dim] * len(rows) if isinstance(dim, int) else list(dim)
    if not rows or len(dims) != len(rows) or min(*rows, *dims) < 1:
        raise InvalidValueError(
            "rows and dim must hold an integer of at least 1 for each of one or more tables, "
            f"got {list(rows)} and {dim}"
        )
    if not 0 <= alpha < math.inf:
        raise InvalidValueError(f"alpha must be at least 0 and finite, got {alpha}")

    def total(found: list[int]) -> int:
        tables = zip(rows, found, dims, strict=True)
        return sum(projected_bytes(n, d, full, optimizer, element_size) for n, d, full in tables)

    def rule(base: float) -> list[int]:
        return [
            max(1, min(full, math.floor(base * n**-alpha + 0.5)))
            for n, full in zip(rows, dims, strict=True)
        ]

    # A dimension goes from j to j + 1 at these values of lambda and at no others.
    steps = {
        (j + 0.5) * n**alpha * (1 + 1e-12)
        for n, full in zip(rows, dims, strict=True)
        for j in range(1, full)
    }
    least = math.inf
    for base in (*sorted(steps, reverse=True), 0.0):
        found = rule(base)
        if total(found) <= budget_bytes:
            return found
        least = min(least, total(found))
    raise InvalidValueError(
        f"memory_budget of {budget_bytes:,} bytes is too small for tables of mixed dimensions: "
        f"the minimum is {least:,} bytes"
    )
