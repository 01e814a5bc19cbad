"""A *synthetic* click stream whose rows have a known true dimension, and which drifts.

Ids are drawn from each table by Zipf's law. In some tables every row has a latent vector, of which
the first d components are not zero: d is the row's true dimension. In the others a row has one
number, so its true dimension is 1. The log-odds of a click are

    bias + a * pairs + b * linear + c * dense

where `pairs` sums the dot products of all pairs of the latent vectors (a factorisation machine),
`linear` sums the numbers, and `dense` is a weighted sum of normal features. The weights and the
bias are set for the first phase, so that the three parts have their shares of the variance, clicks
their rate, and the true log-odds their AUC. All of it is a design of ours and stands for no real
data.

Few tables interact, because a single pass over some 10⁵ examples carries too little information to
learn the vectors of many: with all 26 interacting, a DLRM hardly leaves AUC 0.63 (bound 0.80).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from mlkit.data.ctr.planted import Parts, World
from mlkit.data.ctr.stream import CTRData, Split, TestShare, split_ends
from mlkit.data.ctr.synthetic_config import SyntheticConfig

__all__ = ["SyntheticCTR", "expected_auc", "synthetic"]

_CHUNK = 8192
_CALIBRATION = 65_536


class SyntheticCTR(CTRData):
    """A generated stream with its truth.

    Attributes:
        config: What was generated.
        oracle_logits: True log-odds of every example.
        drift_at: Before which examples a drift happened. Phase 0 comes before the first.
    """

    oracle_logits: Float32[np.ndarray, " n"]

    def __init__(
        self,
        config: SyntheticConfig,
        worlds: Sequence[World],
        oracle_logits: Float32[np.ndarray, " n"],
        **data: Any,
    ) -> None:
        super().__init__(**data)
        self.config, self.oracle_logits = config, oracle_logits
        self.drift_at = config.drift_positions
        self._worlds = tuple(worlds)

    def true_dims(self, phase: int = -1) -> list[Int[np.ndarray, " rows"]]:
        """True dimension of every row, by table, in a phase (the last one by default)."""
        return [table.dims.copy() for table in self._worlds[phase].tables]

    def frequency(self, phase: int = -1) -> list[Float[np.ndarray, " rows"]]:
        """Probability of every row, by table, in a phase (the last one by default)."""
        return [table.probability for table in self._worlds[phase].tables]

    def oracle_auc(self, split: Split = "test") -> float:
        """Expected AUC of the true log-odds on a part: no model can expect more."""
        return expected_auc(self.oracle_logits[self.rows(split)])


def synthetic(
    *,
    seed: int,
    val_fraction: float = 0.05,
    test_fraction: TestShare = 0.25,
    **config: Any,
) -> SyntheticCTR:
    """Generate a stream. Equal arguments give equal streams.

    Args:
        seed: Keys the tables, the examples and the clicks.
        val_fraction: Share of the examples for validation, before the test part.
        test_fraction: Share of the examples for testing: the last ones.
        config: Arguments of `SyntheticConfig`.

    Raises:
        InvalidValueError: For a value out of range.
    """
    settings = SyntheticConfig(**config)
    num, borders = settings.num_samples, settings.drift_positions
    ends = split_ends(num, val_fraction, test_fraction)
    world_rng, calibration_rng, rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    worlds = [World.draw(settings, world_rng)]
    score = _calibrate(worlds[0], settings, calibration_rng)
    dense = np.empty((num, settings.num_dense), np.float32)
    sparse = np.empty((num, len(settings.table_sizes)), np.int32)
    logits, label = np.empty(num, np.float32), np.empty(num, np.float32)
    for start, stop in _chunks(num, borders):
        if start in borders:
            worlds.append(worlds[-1].drift(settings, world_rng))
        rows = slice(start, stop)
        dense[rows], sparse[rows] = worlds[-1].sample(stop - start, rng)
        logits[rows] = score(worlds[-1].parts(dense[rows], sparse[rows]))
        label[rows] = rng.random(stop - start) < _sigmoid(logits[rows])
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (dense, sparse, label)))
    return SyntheticCTR(
        settings,
        worlds,
        logits,
        name="ctr_synthetic",
        source=f"synthetic clicks, seed {seed}, arrays sha256 {digest.hexdigest()[:16]}",
        dense=dense,
        sparse=sparse,
        label=label,
        table_sizes=settings.table_sizes,
        table_names=[f"table{number}" for number in range(len(settings.table_sizes))],
        ends=ends,
    )


def _chunks(num: int, borders: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Chunks of at most `_CHUNK` examples, none across a border."""
    for begin, end in pairwise((0, *borders, num)):
        for start in range(begin, end, _CHUNK):
            yield start, min(start + _CHUNK, end)


def _calibrate(
    world: World, config: SyntheticConfig, rng: np.random.Generator
) -> Callable[[Parts], Float32[np.ndarray, " n"]]:
    """How the parts make up the log-odds, with the shares, rate and AUC that were asked for."""
    sampled = [
        world.parts(*world.sample(min(_CHUNK, _CALIBRATION - start), rng))
        for start in range(0, _CALIBRATION, _CHUNK)
    ]
    parts = np.stack([np.concatenate(part) for part in zip(*sampled, strict=True)]).astype(float)
    spread, centre = parts.std(1), parts.mean(1)
    weights = np.sqrt(config.shares) / np.where(spread > 0, spread, 1.0)
    shapes = weights @ (parts - centre[:, None])

    def bias_of(scale: float) -> float:
        def excess(bias: float) -> float:
            return float(_sigmoid(scale * shapes + bias).mean()) - config.base_rate

        return _zero_of(excess, -60.0, 60.0)

    def excess(scale: float) -> float:
        return expected_auc(scale * shapes + bias_of(scale)) - config.oracle_auc

    scale = _zero_of(excess, 0.0, 30.0)
    bias = bias_of(scale) - scale * float(weights @ centre)

    def score(parts: Parts) -> Float32[np.ndarray, " n"]:
        pairs, linear, dense = (
            np.float32(scale * w) * p for w, p in zip(weights, parts, strict=True)
        )
        return pairs + linear + dense + np.float32(bias)

    return score


def _zero_of(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is zero, to a part in a million of the interval."""
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def _sigmoid(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite, and its inverse 0
        return 1 / (1 + np.exp(-x))


def expected_auc(logits: Float[np.ndarray, " n"]) -> float:
    """Expected AUC of log-odds when the clicks are drawn by these very log-odds.

    Over all ordered pairs of examples: the mass of "the first is a click, the second is none, and
    the first scores higher" by the mass of "the first is a click, the second is none". Examples
    with equal log-odds are taken in any order.

    Example:
        >>> expected_auc(np.array([-50.0, -50.0, 50.0]))
        1.0
    """
    odds = _sigmoid(np.sort(np.asarray(logits, np.float64)))
    below = np.cumsum(1 - odds) - (1 - odds)
    pairs = odds.sum() * (1 - odds).sum() - (odds * (1 - odds)).sum()
    return float((odds * below).sum() / pairs)
