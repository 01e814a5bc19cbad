"""A *synthetic* click stream whose rows have a known true dimension, and which drifts.

Each of the tables has ids drawn by Zipf's law. Row r has a latent vector whose first d_r components
are not zero: d_r is its true dimension. The log-odds of a click are

    bias + scale * (√i · pairs / sd + √l · linear / sd + √(1 - i - l) · dense / sd)

where `pairs` is the sum over all pairs of tables of the dot product of the two rows' vectors (a
factorisation machine), `linear` a number per row and `dense` a weighted sum of normal features.
`bias` and `scale` are set so that the rate of clicks and the AUC of the true log-odds are what was
asked for. The whole generator is a design of ours; it stands for no real data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int

from mlkit.data.ctr.stream import CTRData, split_ends
from mlkit.errors import InvalidValueError, nearest

__all__ = ["Plant", "SyntheticCTR", "SyntheticConfig", "expected_auc", "synthetic"]

Plant = Literal["frequency", "independent"]

_CHUNK = 8192
_CALIBRATION = 65_536


def _default_sizes() -> tuple[int, ...]:
    return tuple(int(size) for size in np.geomspace(200, 20_000, 26).round())


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What is generated.

    Args:
        num_samples: Examples.
        table_sizes: Rows of each table; the default is 26 from 200 to 20,000, 112,000 in all.
        zipf: Exponents of Zipf's law, given to the tables in turn: the row of rank k is drawn in
            proportion to k^-s.
        latent_dim: The largest true dimension.
        min_dim: The smallest.
        plant: "frequency": the true dimension falls with the logarithm of the rank, from
            `latent_dim` to `min_dim`. "independent": the same dimensions, dealt at random.
        drift_every: A drift happens after every so many examples; None for none.
        drift_share: Share of each table's rows that exchange their ranks at random in a drift.
        renew_share: Share of each table's rows whose latent vector and linear weight are drawn anew
            in a drift.
        num_dense: Dense features, standard normal.
        interaction_share: Share of the variance of the log-odds that is due to pairs, i.
        linear_share: Share due to the numbers per row, l; the dense features have the rest.
        base_rate: Rate of clicks.
        oracle_auc: Expected AUC of the true log-odds: no model can do better.

    Raises:
        InvalidValueError: For a value out of range.
    """

    num_samples: int = 400_000
    table_sizes: Sequence[int] = field(default_factory=_default_sizes)
    zipf: Sequence[float] = (1.05, 1.2)
    latent_dim: int = 32
    min_dim: int = 2
    plant: Plant = "independent"
    drift_every: int | None = 150_000
    drift_share: float = 0.1
    renew_share: float = 0.0
    num_dense: int = 4
    interaction_share: float = 0.7
    linear_share: float = 0.2
    base_rate: float = 0.25
    oracle_auc: float = 0.8

    def __post_init__(self) -> None:
        if self.plant not in get_args(Plant):
            raise InvalidValueError(f"no plant {self.plant!r}; {nearest(self.plant, get_args(Plant))}")
        for key, least in (("num_samples", 1), ("min_dim", 1), ("num_dense", 1)):
            if getattr(self, key) < least:
                raise InvalidValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        if self.drift_every is not None and self.drift_every < 1:
            raise InvalidValueError(
                f"drift_every must be at least 1, or null for no drift, got {self.drift_every}"
            )
        if not self.min_dim <= self.latent_dim:
            raise InvalidValueError(
                f"latent_dim={self.latent_dim} is below min_dim={self.min_dim}; raise it"
            )
        if len(self.table_sizes) < 2 or min(self.table_sizes) < 2:
            raise InvalidValueError(
                "table_sizes must name at least two tables of at least two rows, got "
                f"{list(self.table_sizes)}"
            )
        if not self.zipf or min(self.zipf) < 0:
            raise InvalidValueError(f"zipf must hold exponents of at least 0, got {self.zipf}")
        for key in ("drift_share", "renew_share", "interaction_share", "linear_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise InvalidValueError(f"{key} must be in [0, 1], got {getattr(self, key)}")
        if self.interaction_share + self.linear_share > 1:
            raise InvalidValueError(
                f"interaction_share={self.interaction_share} and linear_share={self.linear_share} "
                "must not exceed 1 together"
            )
        if not 0.01 <= self.base_rate <= 0.99 or not 0.5 < self.oracle_auc <= 0.95:
            raise InvalidValueError(
                "base_rate must be in [0.01, 0.99] and oracle_auc in (0.5, 0.95], got "
                f"{self.base_rate} and {self.oracle_auc}"
            )


class SyntheticCTR(CTRData):
    """A generated stream with its truth.

    Attributes:
        config: What was generated.
        oracle_logits: True log-odds of every example, in float32.
        drift_at: Before which examples a drift happened, ascending; phase k begins with drift k.
    """

    def __init__(
        self,
        config: SyntheticConfig,
        worlds: Sequence[_World],
        oracle_logits: Float32[np.ndarray, " n"],
        **data: object,
    ) -> None:
        super().__init__(**data)  # type: ignore[arg-type]
        self.config = config
        self.oracle_logits = oracle_logits
        every = config.drift_every or config.num_samples
        self.drift_at = tuple(range(every, config.num_samples, every))
        self._worlds = tuple(worlds)

    def true_dims(self, phase: int = -1) -> list[Int[np.ndarray, " rows"]]:
        """True dimension of every row, by table, in a phase (the last if not given)."""
        return [table.dims.copy() for table in self._worlds[phase].tables]

    def frequency(self, phase: int = -1) -> list[Float[np.ndarray, " rows"]]:
        """Probability of every row, by table, in a phase (the last if not given)."""
        return [table.probability.copy() for table in self._worlds[phase].tables]

    def oracle_auc(self, split: Literal["train", "val", "test"] = "test") -> float:
        """Expected AUC of the true log-odds on a part: the bound of every model."""
        return expected_auc(self.oracle_logits[self.rows(split)])


def synthetic(
    *, seed: int, val_fraction: float = 0.05, test_fraction: float = 0.25, **config: object
) -> SyntheticCTR:
    """Generate a stream; equal arguments give equal streams.

    Args:
        seed: Keys the latent vectors, the ids and the clicks.
        val_fraction: Share of the examples for validation, before the test part.
        test_fraction: Share of the examples for testing: the last ones.
        config: Arguments of `SyntheticConfig`.

    Raises:
        InvalidValueError: For a value out of range.
    """
    return generate(SyntheticConfig(**config), seed, val_fraction, test_fraction)  # type: ignore[arg-type]


def generate(
    config: SyntheticConfig, seed: int, val_fraction: float, test_fraction: float
) -> SyntheticCTR:
    """Generate a stream from a checked configuration."""
    world_rng, scale_rng, rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    world = _World.draw(config, world_rng)
    score = _calibrate(world, config, scale_rng)
    num, width = config.num_samples, len(config.table_sizes)
    dense = np.empty((num, config.num_dense), np.float32)
    sparse = np.empty((num, width), np.int32)
    logits, label = np.empty(num, np.float32), np.empty(num, np.float32)
    worlds = [world]
    every = config.drift_every or num
    for start, stop in _chunks(num, every):
        if start and start % every == 0:
            worlds.append(worlds[-1].drift(config, world_rng))
        rows = slice(start, stop)
        dense[rows] = rng.standard_normal((stop - start, config.num_dense), dtype=np.float32)
        sparse[rows] = worlds[-1].ids(stop - start, rng)
        logits[rows] = score(worlds[-1], dense[rows], sparse[rows])
        label[rows] = rng.random(stop - start) < _sigmoid(logits[rows].astype(np.float64))
    digest = hashlib.sha256()
    for array in (dense, sparse, label):
        digest.update(array.tobytes())
    return SyntheticCTR(
        config,
        worlds,
        logits,
        name="synthetic",
        source=f"synthetic clicks (seed {seed}), arrays sha256 {digest.hexdigest()[:16]}",
        dense=dense,
        sparse=sparse,
        label=label,
        table_sizes=config.table_sizes,
        table_names=[f"table{number}" for number in range(width)],
        ends=split_ends(num, val_fraction, test_fraction),
    )


def _chunks(num: int, every: int) -> Iterator[tuple[int, int]]:
    """Chunks of at most `_CHUNK` examples, none across a drift."""
    for phase in range(0, num, every):
        end = min(phase + every, num)
        for start in range(phase, end, _CHUNK):
            yield start, min(start + _CHUNK, end)


@dataclass(frozen=True)
class _Table:
    """One table in one phase.

    Attributes:
        cumulative: Probability of the ranks up to each.
        rank_dims: True dimension of each rank, where the plant is "frequency".
        ids: The row at each rank.
        dims: True dimension of each row.
        vectors: Latent vector of each row with all `latent_dim` components.
        weights: Linear weight of each row.
    """

    cumulative: Float[np.ndarray, " rows"]
    rank_dims: Int[np.ndarray, " rows"] | None
    ids: Int[np.ndarray, " rows"]
    dims: Int[np.ndarray, " rows"]
    vectors: Float32[np.ndarray, "rows dim"]
    weights: Float32[np.ndarray, " rows"]

    @property
    def probability(self) -> Float[np.ndarray, " rows"]:
        """Of each row."""
        by_row = np.empty(len(self.ids))
        by_row[self.ids] = np.diff(self.cumulative, prepend=0.0)
        return by_row

    @property
    def latent(self) -> Float32[np.ndarray, "rows dim"]:
        """Latent vectors, zero beyond the true dimension."""
        return self.vectors * (np.arange(self.vectors.shape[1]) < self.dims[:, None])

    @classmethod
    def draw(cls, rows: int, exponent: float, config: SyntheticConfig, rng: _Rng) -> _Table:
        mass = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
        cumulative = np.cumsum(mass / mass.sum())
        cumulative[-1] = 1.0
        ids = rng.permutation(rows).astype(np.int32)
        if config.plant == "frequency":
            height = 1 - np.log(np.arange(1, rows + 1)) / np.log(rows)
        else:
            height = rng.random(rows)
        by_rank = np.rint(config.min_dim * (config.latent_dim / config.min_dim) ** height)
        dims = np.empty(rows, np.int64)
        dims[ids] = by_rank
        return cls(
            cumulative=cumulative,
            rank_dims=dims[ids] if config.plant == "frequency" else None,
            ids=ids,
            dims=dims,
            vectors=rng.standard_normal((rows, config.latent_dim), dtype=np.float32),
            weights=rng.standard_normal(rows, dtype=np.float32),
        )

    def drift(self, config: SyntheticConfig, rng: _Rng) -> _Table:
        rows = len(self.ids)
        ids, dims = self.ids.copy(), self.dims
        ranks = rng.choice(rows, round(config.drift_share * rows), replace=False)
        ids[ranks] = ids[rng.permutation(ranks)]
        if self.rank_dims is not None:
            dims = np.empty_like(dims)
            dims[ids] = self.rank_dims
        vectors, weights = self.vectors, self.weights
        renewed = rng.choice(rows, round(config.renew_share * rows), replace=False)
        if len(renewed):
            vectors, weights = vectors.copy(), weights.copy()
            vectors[renewed] = rng.standard_normal(
                (len(renewed), vectors.shape[1]), dtype=np.float32
            )
            weights[renewed] = rng.standard_normal(len(renewed), dtype=np.float32)
        return _Table(self.cumulative, self.rank_dims, ids, dims, vectors, weights)


_Rng = np.random.Generator


@dataclass(frozen=True)
class _World:
    """All tables in one phase, and the weights of the dense features."""

    tables: Sequence[_Table]
    dense_weights: Float32[np.ndarray, " features"]

    @classmethod
    def draw(cls, config: SyntheticConfig, rng: _Rng) -> _World:
        exponents = islice(cycle(config.zipf), len(config.table_sizes))
        tables = [
            _Table.draw(rows, exponent, config, rng)
            for rows, exponent in zip(config.table_sizes, exponents, strict=True)
        ]
        return cls(tables, rng.standard_normal(config.num_dense, dtype=np.float32))

    def drift(self, config: SyntheticConfig, rng: _Rng) -> _World:
        return _World([table.drift(config, rng) for table in self.tables], self.dense_weights)

    def ids(self, num: int, rng: _Rng) -> Int[np.ndarray, "num tables"]:
        columns = np.empty((num, len(self.tables)), np.int32)
        for column, table in enumerate(self.tables):
            columns[:, column] = table.ids[np.searchsorted(table.cumulative, rng.random(num))]
        return columns

    @cached_property
    def _lookup(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each table: latent vectors, their squared norms, weights."""
        return [
            (latent, np.square(latent).sum(1), table.weights)
            for table in self.tables
            for latent in (table.latent,)
        ]

    def parts(
        self, dense: Float32[np.ndarray, "n features"], sparse: Int[np.ndarray, "n tables"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs, linear and dense parts of each example."""
        total = np.zeros((len(sparse), self.tables[0].vectors.shape[1]), np.float32)
        own, linear = np.zeros(len(sparse), np.float32), np.zeros(len(sparse), np.float32)
        for ids, (latent, squares, weights) in zip(sparse.T, self._lookup, strict=True):
            total += latent.take(ids, axis=0)
            own += squares.take(ids)
            linear += weights.take(ids)
        pairs = (np.einsum("nd,nd->n", total, total) - own) / 2
        return pairs, linear, dense @ self.dense_weights


@dataclass(frozen=True)
class _Score:
    """Log-odds: a weighted sum of the three parts."""

    weights: tuple[float, float, float]
    bias: float

    def __call__(self, world: _World, dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
        parts = world.parts(dense, sparse)
        return self.bias + sum(w * part for w, part in zip(self.weights, parts, strict=True))


def _calibrate(world: _World, config: SyntheticConfig, rng: _Rng) -> _Score:
    """Weights and bias that give the rate of clicks and the AUC that were asked for."""
    pieces = []
    for start in range(0, _CALIBRATION, _CHUNK):
        num = min(_CHUNK, _CALIBRATION - start)
        dense = rng.standard_normal((num, config.num_dense), dtype=np.float32)
        pieces.append(world.parts(dense, world.ids(num, rng)))
    parts = [np.concatenate(part).astype(np.float64) for part in zip(*pieces, strict=True)]
    i, l = config.interaction_share, config.linear_share
    weights = [np.sqrt(s) / part.std() for s, part in zip((i, l, max(1 - i - l, 0.0)), parts, strict=True)]
    logits = np.sort(sum(w * part for w, part in zip(weights, parts, strict=True)))
    logits -= logits.mean()

    def bias_for(scale: float) -> float:
        return _bisect(lambda b: _sigmoid(scale * logits + b).mean() - config.base_rate, -60, 60)

    def excess(scale: float) -> float:
        return expected_auc(scale * logits + bias_for(scale)) - config.oracle_auc

    scale = _bisect(excess, 0, 30)
    shift = sum(w * part.mean() for w, part in zip(weights, parts, strict=True))
    first, second, third = (float(scale * w) for w in weights)
    return _Score((first, second, third), float(bias_for(scale) - scale * shift))


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is zero, to a part in a million of the interval."""
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def expected_auc(logits: Float[np.ndarray, " n"]) -> float:
    """Expected AUC of log-odds when the labels are drawn by these very log-odds.

    It is the mean over pairs of examples of P(first clicked, second not, first scored higher) over
    P(first clicked, second not).
    """
    odds = _sigmoid(np.sort(np.asarray(logits, np.float64)))
    below = np.cumsum(1 - odds) - (1 - odds)
    pairs = odds.sum() * (1 - odds).sum() - (odds * (1 - odds)).sum()
    return float((odds * below).sum() / pairs)
