"""A pruning round: its parts, and the search of the threshold against selection by torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlkit.embeddings.fiited.round import Round, RoundStats
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from scripts.benchmarks._embeddings_case import Case, store_of
from scripts.benchmarks._embeddings_room import child, fitting
from scripts.benchmarks._harness import Bench, Row

__all__ = ["measure", "rows", "select"]

_DENSITY = 0.25
_REDRAWN = 0.04
"""Share of the rows whose utilities are drawn anew between two rounds."""
_PER_MILLION_MS = 4.0
"""Wanted for a round, per million chunks."""
_BLOCK = 1 << 18
_PARTS = {
    "_groups": "scales of tables",
    "_find": "threshold and candidates",
    "_choose": "choice",
    "_apply": "moving",
}


def rows(bench: Bench) -> Iterator[Row]:
    """Rounds over all chunks of 26 tables x 1 M rows, D = 16."""
    whole = Case.of(bench, 16)
    case = fitting(bench, whole, 100 * whole.rows)
    found = child(bench, "_embeddings_round:measure", rounds=bench.size(5, 1), **vars(case))
    peers = child(
        bench, "_embeddings_round:select",
        chunks=4 * case.tables * case.rows, repeats=bench.size(3, 1),
    )  # fmt: skip
    millions = 4 * case.tables * case.rows / 1e6
    what = (
        f"pruning round, {millions:.3g} M chunks, density {_DENSITY}, "
        f"{found['churn']:.1%} of the residents replaced"
    )

    def per_million(seconds: float) -> float:
        return 1e3 * seconds / millions

    for clock, name in (("cpu", "CPU time"), ("wall", "wall time")):
        yield Row.of(
            what, f"{name} per million chunks", per_million(found[clock]), "ms",
            limit=_PER_MILLION_MS,
        )  # fmt: skip
    for part in (*_PARTS.values(), "tidying"):
        yield Row.of(what, f"CPU time of {part}", per_million(found[part]), "ms")
    for peer in ("torch.kthvalue", "torch.topk"):
        yield Row.of(
            what, "CPU time of threshold and candidates",
            per_million(found["threshold and candidates"]), "ms",
            peer=peer, peer_value=per_million(peers[peer]),
        )  # fmt: skip
    yield Row.of(
        what, "peak memory of the process (limit: the store)", found["peak_bytes"] / 1e9, "GB",
        limit=found["store_bytes"] / 1e9,
    )  # fmt: skip


def measure(rounds: int, **sizes: int) -> dict[str, float]:
    """Run rounds in this process.

    Returns:
        Medians over the rounds, in seconds: "cpu" and "wall" of a whole round, CPU seconds of each
        part; "churn"; "store_bytes".
    """
    case = Case(**sizes)
    store = store_of(case, _DENSITY, trigger=0.0)
    generator = torch.Generator().manual_seed(1)
    _utilities_of_residents(store, generator)
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        _redraw(store, generator)
        timed = _Timed(store)
        wall, cpu = time.perf_counter(), time.process_time()
        stats = timed.run(force=True)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert isinstance(stats, RoundStats)
        for name, value in {
            "cpu": cpu,
            "wall": wall,
            "churn": stats.churn,
            **timed.seconds,
        }.items():
            samples.setdefault(name, []).append(value)
        samples.setdefault("tidying", []).append(cpu - sum(timed.seconds.values()))
    found = {name: statistics.median(values) for name, values in samples.items()}
    return {**found, "store_bytes": store.memory_report().total_bytes}


def select(chunks: int, repeats: int) -> dict[str, float]:
    """Find the same threshold with torch, from utilities that lie side by side; CPU seconds."""
    scores = _utility(torch.rand(chunks, generator=torch.Generator().manual_seed(1)))
    kept = int(chunks * _DENSITY)

    def median(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(repeats):
            started = time.process_time()
            call()
            taken.append(time.process_time() - started)
        return statistics.median(taken)

    return {
        "torch.kthvalue": median(lambda: torch.kthvalue(scores, chunks - kept + 1).values),
        "torch.topk": median(lambda: torch.topk(scores, kept, sorted=False).values.amin()),
    }


class _Timed(Round):
    """A round that keeps the CPU seconds of its parts."""

    def __init__(self, store: DynamicEmbeddingStore) -> None:
        super().__init__(store)
        self.seconds = dict.fromkeys(_PARTS.values(), 0.0)
        self._depth = 0
        for name, part in _PARTS.items():
            setattr(self, name, self._timing(getattr(self, name), part))

    def _timing(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            started = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds[part] += time.process_time() - started

        return call


def _utility(uniform: Tensor) -> Tensor:
    """Utilities over nearly nine octaves, as skewed as those of real rows."""
    return torch.exp(6 * uniform)


def _utilities_of_residents(store: DynamicEmbeddingStore, generator: torch.Generator) -> None:
    """Give residents the best utilities, so that a first round has nothing to do."""
    per_row = store.config.num_chunks
    for start in range(0, len(store.header), _BLOCK):
        rows = torch.arange(start, min(start + _BLOCK, len(store.header)))
        drawn = torch.rand(len(rows), per_row, generator=generator)
        resident = store.resident(slice(start, start + len(rows)))
        share = torch.where(resident, 1 - _DENSITY * drawn, (1 - _DENSITY) * drawn)
        store.put_utilities(rows, _utility(share))


def _redraw(store: DynamicEmbeddingStore, generator: torch.Generator) -> None:
    """Draw the utilities of some rows anew, as a drift of the data would."""
    count = max(1, int(_REDRAWN * len(store.header)))
    rows = torch.randint(len(store.header), (count,), generator=generator)
    drawn = torch.rand(count, store.config.num_chunks, generator=generator)
    store.put_utilities(rows, _utility(drawn))
