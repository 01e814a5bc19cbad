"""Tables of a *synthetic* click stream: rows of known popularity and known true dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice

import numpy as np
from jaxtyping import Float, Float32, Int

from mlkit.data.ctr.synthetic_config import SyntheticConfig

__all__ = ["Parts", "World"]

Parts = tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]
"""Of the log-odds of each example: due to pairs of rows, to single rows, to dense features."""

Rng = np.random.Generator


@dataclass(frozen=True)
class PlantedTable:
    """One table in one phase.

    Attributes:
        cumulative: Probability of the ranks up to each.
        ids: The row at each rank.
        dims: True dimension of each row.
        rank_dims: True dimension of each rank, where it belongs to the rank and not to the row.
        vectors: Latent vector of each row before it is cut to its true dimension; no column where
            the table does not interact.
        weights: Linear weight of each row; zero where the table interacts.
    """

    cumulative: Float[np.ndarray, " rows"]
    ids: Int[np.ndarray, " rows"]
    dims: Int[np.ndarray, " rows"]
    rank_dims: Int[np.ndarray, " rows"] | None
    vectors: Float32[np.ndarray, "rows dim"]
    weights: Float32[np.ndarray, " rows"]

    @classmethod
    def draw(
        cls, rows: int, exponent: float, settings: SyntheticConfig, rng: Rng, *, interacts: bool
    ) -> PlantedTable:
        """Draw the first phase of a table."""
        rank = np.arange(1, rows + 1, dtype=np.float64)
        cumulative = np.cumsum(rank**-exponent)
        ids = rng.permutation(rows).astype(np.int32)
        least, most = settings.min_dim, settings.latent_dim
        rank_dims = None
        if not interacts:
            dims = np.ones(rows, np.int64)
        elif settings.plant == "independent":
            dims = rng.integers(least, most, rows, endpoint=True)
        else:
            height = 1 - np.log(rank) / np.log(rows)
            rank_dims = np.rint(least * (most / least) ** height).astype(np.int64)
            dims = np.empty(rows, np.int64)
            dims[ids] = rank_dims
        width = most if interacts else 0
        return cls(
            cumulative=cumulative / cumulative[-1],
            ids=ids,
            dims=dims,
            rank_dims=rank_dims,
            vectors=_vectors((rows, width), settings, rng),
            weights=rng.standard_normal(rows, dtype=np.float32) * np.float32(not interacts),
        )

    def drift(self, settings: SyntheticConfig, rng: Rng) -> PlantedTable:
        """The next phase: some rows exchange their ranks, some become different rows."""
        rows = len(self.ids)
        ids, dims = self.ids.copy(), self.dims
        ranks = rng.choice(rows, round(settings.drift_share * rows), replace=False)
        ids[ranks] = ids[rng.permutation(ranks)]
        if self.rank_dims is not None:
            dims = np.empty_like(dims)
            dims[ids] = self.rank_dims
        renewed = rng.choice(rows, round(settings.renew_share * rows), replace=False)
        vectors, weights = self.vectors.copy(), self.weights.copy()
        vectors[renewed] = _vectors(vectors[renewed].shape, settings, rng)
        fresh = rng.standard_normal(len(renewed), dtype=np.float32)
        weights[renewed] = fresh * np.float32(not self.interacts)
        return replace(self, ids=ids, dims=dims, vectors=vectors, weights=weights)

    @property
    def interacts(self) -> bool:
        """Whether the rows have vectors; else they have a weight."""
        return self.vectors.shape[1] > 0

    @property
    def probability(self) -> Float[np.ndarray, " rows"]:
        """Of each row."""
        by_row = np.empty(len(self.ids))
        by_row[self.ids] = np.diff(self.cumulative, prepend=0.0)
        return by_row

    @cached_property
    def latent(self) -> Float32[np.ndarray, "rows dim"]:
        """Latent vectors, zero beyond the true dimension."""
        return self.vectors * (np.arange(self.vectors.shape[1]) < self.dims[:, None])

    @cached_property
    def squares(self) -> Float32[np.ndarray, " rows"]:
        """Squared norms of the latent vectors."""
        return np.square(self.latent).sum(1)

    def sample(self, num: int, rng: Rng) -> Int[np.ndarray, " num"]:
        """Draw rows by their probability."""
        return self.ids[np.searchsorted(self.cumulative, rng.random(num), side="right")]


def _vectors(
    shape: tuple[int, ...], settings: SyntheticConfig, rng: Rng
) -> Float32[np.ndarray, "rows dim"]:
    return np.float32(settings.latent_mean) + rng.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class World:
    """All tables in one phase, and the weights of the dense features."""

    tables: tuple[PlantedTable, ...]
    dense_weights: Float32[np.ndarray, " features"]

    @classmethod
    def draw(cls, settings: SyntheticConfig, rng: Rng) -> World:
        """Draw the first phase. The tables that interact are spread evenly over the list."""
        sizes, count = settings.table_sizes, settings.num_interacting
        chosen = {(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)}
        exponents = islice(cycle(settings.zipf), len(sizes))
        tables = tuple(
            PlantedTable.draw(rows, exponent, settings, rng, interacts=number in chosen)
            for number, (rows, exponent) in enumerate(zip(sizes, exponents, strict=True))
        )
        return cls(tables, rng.standard_normal(settings.num_dense, dtype=np.float32))

    def drift(self, settings: SyntheticConfig, rng: Rng) -> World:
        """The next phase."""
        return replace(self, tables=tuple(table.drift(settings, rng) for table in self.tables))

    def sample(
        self, num: int, rng: Rng
    ) -> tuple[Float32[np.ndarray, "num features"], Int[np.ndarray, "num tables"]]:
        """Draw dense features and ids."""
        dense = rng.standard_normal((num, len(self.dense_weights)), dtype=np.float32)
        return dense, np.column_stack([table.sample(num, rng) for table in self.tables])

    def parts(
        self, dense: Float32[np.ndarray, "n features"], sparse: Int[np.ndarray, "n tables"]
    ) -> Parts:
        """What the log-odds are made of, before weights."""
        width = max(table.vectors.shape[1] for table in self.tables)
        total = np.zeros((len(sparse), width), np.float32)
        own, linear = np.zeros(len(sparse), np.float32), np.zeros(len(sparse), np.float32)
        for ids, table in zip(sparse.T, self.tables, strict=True):
            if table.interacts:
                total += table.latent.take(ids, axis=0)
                own += table.squares.take(ids)
            else:
                linear += table.weights.take(ids)
        # the sum over pairs, by (square of the sum - sum of the squares) / 2
        pairs = (np.einsum("nd,nd->n", total, total) - own) / 2
        return pairs, linear, dense @ self.dense_weights
