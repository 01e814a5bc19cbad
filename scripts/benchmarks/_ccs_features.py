"""What looks at features: coverage, facility location, and D2's greedy choice."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int

from mlkit.coresets import FacilityLocation, coverage_auc
from mlkit.coresets.d2 import d2_select
from scripts.benchmarks._harness import Bench, Row, alternate, calling, spread_of

__all__ = ["argmax_loop", "rows"]

_TIMES_CDIST = 2
"""Target: at most this many times torch.cdist."""
_D2_SECONDS = 60.0
"""Target at ImageNet's size, neighbours known."""


def rows(bench: Bench) -> Iterator[Row]:
    """Time of each, and the value reached where there is one."""
    yield from _coverage(bench)
    yield from _facility_location(bench)
    yield from _d2(bench)


def _coverage(bench: Bench) -> Iterator[Row]:
    from sklearn.neighbors import NearestNeighbors

    examples, chosen, width = (
        bench.size(10_000, 500),
        bench.size(2_000, 100),
        bench.size(256, 16),
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples, width), dtype=np.float32)
    coreset = rng.standard_normal((chosen, width), dtype=np.float32)
    everything = np.arange(chosen)
    tensor, anchors = torch.from_numpy(x), torch.from_numpy(coreset)

    def ours() -> float:
        return coverage_auc(coreset, everything, eval_features=x)

    def cdist() -> float:
        return float(torch.cdist(tensor, anchors).amin(dim=1).mean())

    def sklearn() -> float:
        search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(coreset)
        return float(search.kneighbors(x)[0].mean())

    def product() -> None:
        torch.mm(tensor, anchors.T)

    bench.check(np.allclose(ours(), [cdist(), sklearn()], rtol=1e-4), "coverage")
    seconds = alternate(
        {
            "mlkit": calling(ours),
            "torch.cdist().amin()": calling(cdist),
            "sklearn NearestNeighbors (brute)": calling(sklearn),
            "matrix product": product,
        },
        bench.size(11, 2),
    )
    case = f"coverage_auc, {examples:,} x {chosen:,} x {width}"
    floor = statistics.median(seconds.pop("matrix product"))
    against_cdist = {k: seconds[k] for k in ("mlkit", "torch.cdist().amin()")}
    target = _TIMES_CDIST * statistics.median(seconds.pop("torch.cdist().amin()"))
    yield from bench.times(case, against_cdist, limit=target)
    yield from bench.times(case, seconds, metric="time (limit: the product)", limit=floor)


def _facility_location(bench: Bench) -> Iterator[Row]:
    """The same greedy rule on the same similarities; apricot's fastest optimizer, warmed up."""
    if importlib.util.find_spec("apricot") is None:
        bench.note(
            "facility location: apricot-select is not installed, so it has no row "
            "(pip install 'mlkit-torch[apricot]')"
        )
        return
    from sklearn.datasets import load_digits

    features = load_digits().data[: bench.size(1797, 200)] / 16
    rules = {
        "mlkit": FacilityLocation(prune_rate=0.9, backend="native"),
        "apricot": FacilityLocation(prune_rate=0.9, backend="apricot"),
    }
    reached = {k: rule.select(features=features).report["objective"] for k, rule in rules.items()}
    seconds = alternate(
        {k: calling(rule.select, features=features) for k, rule in rules.items()},
        bench.size(5, 1),
    )
    case = f"facility location, digits, {len(features):,} examples, 10 % kept"
    yield from bench.times(case, seconds)
    yield Row.of(
        case,
        "objective",
        reached["mlkit"],
        "",
        peer="apricot",
        peer_value=reached["apricot"],
        higher_is_better=True,
    )


def argmax_loop(
    hardness: Float[np.ndarray, " n"],
    neighbors: Int[np.ndarray, "n k"],
    distances: Float[np.ndarray, "n k"],
    m: int,
) -> Int[np.ndarray, " m"]:
    """D2's rule with an argmax over all examples at each step."""
    x = hardness + (np.exp(-distances) * hardness[neighbors]).sum(axis=1)
    chosen = np.empty(m, dtype=np.int64)
    for step in range(m):
        i = int(np.argmax(x))
        chosen[step] = i
        x[neighbors[i]] -= np.exp(-distances[i]) * x[i]
        x[i] = -np.inf
    return chosen


def _d2(bench: Bench) -> Iterator[Row]:
    """Greedy choice of a tenth on a random graph of 5 neighbours that is already known."""
    n, timed = bench.size(1_281_167, 5_000), bench.size(1_000, 100)
    rng = np.random.default_rng(0)
    neighbors = rng.integers(0, n - 1, (n, 5))
    neighbors += neighbors >= np.arange(n)[:, None]
    hardness, distances = rng.random(n), rng.random((n, 5))
    m = n // 10
    mine = d2_select(hardness, neighbors, distances, m)
    first = argmax_loop(hardness, neighbors, distances, timed)
    bench.check(bool((mine[:timed] == first).all()), "D2's first choices")

    seconds = alternate(
        {
            "mlkit": calling(d2_select, hardness, neighbors, distances, m),
            "loop": calling(argmax_loop, hardness, neighbors, distances, timed),
            "set-up": calling(argmax_loop, hardness, neighbors, distances, 0),
        },
        bench.size(3, 1),
        warmup=0,
    )
    per_choice = (statistics.median(seconds["loop"]) - statistics.median(seconds["set-up"])) / timed
    whole = statistics.median(seconds["set-up"]) + m * max(per_choice, 0)
    yield Row.of(
        f"D2 greedy choice of {m:,} of {n:,}, 5 neighbours known",
        "time",
        statistics.median(seconds["mlkit"]),
        "s",
        peer=f"argmax loop (extrapolated from {timed:,} choices)",
        peer_value=whole,
        limit=_D2_SECONDS,
        spread=spread_of(seconds["mlkit"]),
    )
