"""What the options of a store cost: chunks, layouts, one-byte utilities, and the bookkeeping."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from scripts.benchmarks._embeddings_case import IDS, Case, batches, ours, store_of
from scripts.benchmarks._embeddings_room import child
from scripts.benchmarks._harness import Bench, Row, alternate

__all__ = ["bookkeeping", "options", "rows"]

_SHARE = 10.0
"""Percent of a step that utilities may take."""
_NEVER = 1 << 40
_OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"K={chunks}, {layout}": {"num_chunks": chunks, "layout": layout}
        for chunks in (1, 2, 4, 8)
        for layout in ("slab", "chunk")
    },
    **{
        f"K=4, {layout}, one-byte utilities": {"layout": layout, "utility_dtype": "uint8"}
        for layout in ("slab", "chunk")
    },
}


def rows(bench: Bench) -> Iterator[Row]:
    """Steps with and without utilities at D = 16 and 64, and of stores with other options."""
    steps = bench.size(20, 1)
    for dim in (16, 64):
        case = Case.of(bench, dim, tables=8)
        for density in (1.0, 0.25):
            found = child(
                bench, "_embeddings_options:bookkeeping", density=density, steps=steps, **vars(case)
            )
            for every in (1, 4):
                share = 100 * (1 - found["never"] / found[f"every {every}"])
                # Below what the clock can tell, the share may come out negative.
                yield Row.of(
                    f"utilities in a step, {case}, density {density}, utility_every={every}",
                    "share of the step's CPU time", max(share, 0.1), "%", limit=_SHARE,
                )  # fmt: skip
    case = Case.of(bench, 64, tables=4, rows=500_000)
    found = child(bench, "_embeddings_options:options", steps=steps, **vars(case))
    usual = found["K=4, slab"]
    for name in _OPTIONS:
        row = Row.of(
            f"options of a store, {case}, density 0.25: {name}", "training step, CPU time",
            1e3 * found[name], "ms", peer="K=4, slab", peer_value=1e3 * usual,
        )  # fmt: skip
        yield replace(row, is_detail=True)


def bookkeeping(density: float, steps: int, **sizes: int) -> dict[str, float]:
    """Median CPU seconds of a step with utilities "every 1" or "every 4" steps, and "never"."""
    case = Case(**sizes)
    store = store_of(case, density)
    provider = ours(case, store)
    given = iter(batches(case, IDS[0], 6 * (steps + 1)))

    def step(every: int, count: int) -> Callable[[], float]:
        def call() -> float:
            store.config = replace(store.config, utility_every=every)
            started = time.process_time()
            for _ in range(count):
                provider.step(next(given))
            return (time.process_time() - started) / count

        return call

    store.step()  # step 0 would count whatever `utility_every` is
    found = alternate(
        {"every 1": step(1, 1), "never": step(_NEVER, 1), "every 4": step(4, 4)}, steps
    )
    return {name: statistics.median(samples) for name, samples in found.items()}


def options(steps: int, **sizes: int) -> dict[str, float]:
    """Median CPU seconds of a step by the options of the store, in turn."""
    case = Case(**sizes)
    providers = {
        name: ours(case, store_of(case, 0.25, **given)) for name, given in _OPTIONS.items()
    }
    given = batches(case, IDS[0], steps + 1)

    def step(name: str) -> Callable[[], float]:
        turn = iter(given)

        def call() -> float:
            batch, started = next(turn), time.process_time()
            providers[name].step(batch)
            return time.process_time() - started

        return call

    found = alternate({name: step(name) for name in providers}, steps)
    return {name: statistics.median(samples) for name, samples in found.items()}
