"""CCS selection at ImageNet's size and at 100 million. No torch: memory is measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.ccs import CCS
from scripts.benchmarks._harness import (
    Bench,
    Row,
    alternate,
    calling,
    in_fresh_process,
    spread_of,
)

__all__ = ["measure", "plain_numpy", "rows", "scores_like_aum"]

IMAGENET = 1_281_167
_RATE, _CUTOFF, _STRATA = 0.9, 0.3, 50
_CHUNK = 1 << 20

_SECONDS = 0.1
"""Target at ImageNet's size."""
_SPEEDUP = 50
"""Target over the slow loop at ImageNet's size."""
_SECONDS_100M, _GB_100M = 5.0, 1.5
"""Targets at 100 million, the input included."""


def rows(bench: Bench) -> Iterator[Row]:
    """Time and memory of one selection."""
    yield from _imagenet(bench)
    yield from _hundred_million(bench)


def scores_like_aum(n: int, seed: int = 0) -> Float[np.ndarray, " n"]:
    """Scores with the shape of AUM after training: most near 1, a tail to -1. Made in chunks."""
    rng = np.random.default_rng(seed)
    scores = np.empty(n, dtype=np.float32)
    for start in range(0, n, _CHUNK):
        part = scores[start : start + _CHUNK]
        rng.random(out=part, dtype=np.float32)
        part *= part * part
        part *= -2
        part += 1
    return scores


def ours(scores: Float[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Select with mlkit."""
    rule = CCS(prune_rate=_RATE, cutoff=_CUTOFF, num_strata=_STRATA)
    return rule.select(scores, hard="low").indices


def plain_numpy(scores: Float[np.ndarray, " n"], seed: int = 0) -> Int[np.ndarray, " m"]:
    """Select with plain vectorised NumPy: a partition, a radix sort of bins, a choice per bin."""
    rng = np.random.default_rng(seed)
    n = len(scores)
    cut, wanted = 3 * n // 10, n // 10
    keep = np.argpartition(scores, cut)[cut:] if cut else np.arange(n)
    values = scores[keep]
    low, high = values.min(), values.max()
    bins = np.minimum((values - low) * (_STRATA / (high - low)), _STRATA - 1).astype(np.uint8)
    grouped = keep[np.argsort(bins, kind="stable")]
    population = np.bincount(bins, minlength=_STRATA)
    ends = np.cumsum(population)
    chosen = []
    for handled, b in enumerate(np.argsort(population, kind="stable")):
        budget = min(int(population[b]), wanted // (_STRATA - handled))
        wanted -= budget
        members = grouped[ends[b] - population[b] : ends[b]]
        chosen.append(members[rng.choice(len(members), budget, replace=False, shuffle=False)])
    return np.sort(np.concatenate(chosen))


def slow_loop(scores: Float[np.ndarray, " n"]) -> list[int]:
    """Select with the tests' independent oracle: plain Python, one example at a time."""
    from tests.coresets import oracle

    return oracle.ccs_select(scores, _RATE, _CUTOFF, _STRATA)["indices"]


def measure(method: str, n: int) -> dict[str, float]:
    """Select once in this process: seconds of the selection alone, and how many were chosen."""
    scores = scores_like_aum(n)
    select = {"ours": ours, "plain_numpy": plain_numpy}[method]
    started = time.perf_counter()
    chosen = select(scores)
    return {"seconds": time.perf_counter() - started, "num_selected": len(chosen)}


def _imagenet(bench: Bench) -> Iterator[Row]:
    n = bench.size(IMAGENET, 20_000)
    case = f"CCS selection of {n:,}"
    scores = scores_like_aum(n)
    bench.check(ours(scores).tolist() == slow_loop(scores), "CCS and its slow oracle")
    bench.check(len(ours(scores)) == len(plain_numpy(scores)), "sizes of CCS and plain NumPy")

    mine = calling(ours, scores)
    slow = alternate(
        {"mlkit": mine, "slow loop": calling(slow_loop, scores)}, bench.size(3, 1), warmup=0
    )
    yield from bench.times(case, slow, limit=_SECONDS)
    speedup = statistics.median(slow["slow loop"]) / statistics.median(slow["mlkit"])
    yield Row.of(
        case, "speed-up over the slow loop", speedup, "x", limit=_SPEEDUP, higher_is_better=True
    )
    plain = alternate(
        {"mlkit": mine, "plain NumPy": calling(plain_numpy, scores)}, bench.size(11, 2)
    )
    yield from bench.times(case, plain, limit=_SECONDS)
    yield _memory(case, _fresh(n, 1))


def _hundred_million(bench: Bench) -> Iterator[Row]:
    n = bench.size(100_000_000, 200_000)
    case = f"CCS selection of {n:,}"
    runs = _fresh(n, bench.size(3, 1))
    times = {name: [run["seconds"] for run in taken] for name, taken in runs.items()}
    yield from bench.times(case, times, limit=_SECONDS_100M)
    yield _memory(case, runs, _GB_100M)


def _fresh(n: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Both methods in processes of their own, in turn."""
    runs: dict[str, list[dict[str, float]]] = {"mlkit": [], "plain NumPy": []}
    for _ in range(repeats):
        for name, method in zip(runs, ("ours", "plain_numpy"), strict=True):
            runs[name].append(in_fresh_process(f"{__name__}:measure", method=method, n=n))
    return runs


def _memory(case: str, runs: dict[str, list[dict[str, float]]], limit: float | None = None) -> Row:
    mine, theirs = ([run["peak_bytes"] / 1e9 for run in taken] for taken in runs.values())
    return Row.of(
        case,
        "peak memory of the process, input included",
        statistics.median(mine),
        "GB",
        peer="plain NumPy",
        peer_value=statistics.median(theirs),
        limit=limit,
        spread=spread_of(mine),
        peer_spread=spread_of(theirs),
    )
