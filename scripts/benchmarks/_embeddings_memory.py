"""Peak memory of a training process by density, against dense tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, TableSpec
from mlkit.embeddings.fiited.lookup import lookup
from scripts.benchmarks._embeddings_case import Case, bags
from scripts.benchmarks._embeddings_room import child
from scripts.benchmarks._harness import Bench, Row, peak_rss

__all__ = ["measure", "rows"]

_DENSITIES = (1.0, 0.35, 0.1)
_ROUNDS = 2


def rows(bench: Bench) -> Iterator[Row]:
    """Peak of processes that train all rows of 4 tables x 500 k, D = 64, with Adagrad."""
    case = Case.of(bench, 64, tables=4, rows=500_000)
    dense = child(bench, "_embeddings_memory:measure", density=0.0, **vars(case))
    for density in _DENSITIES:
        mine = child(bench, "_embeddings_memory:measure", density=density, **vars(case))
        what = f"training of {case}, Adagrad, every row, density {density}"
        yield Row.of(
            what,
            "peak memory of the process",
            mine["peak_bytes"] / 1e9,
            "GB",
            peer="nn.EmbeddingBag + Adagrad",
            peer_value=dense["peak_bytes"] / 1e9,
        )
        yield Row.of(
            what,
            "the same beyond its imports (limit: the store)",
            _beyond(mine) / 1e9,
            "GB",
            peer="nn.EmbeddingBag + Adagrad",
            peer_value=_beyond(dense) / 1e9,
            limit=mine["bytes"] / 1e9,
        )


def _beyond(found: dict[str, float]) -> float:
    return max(found["peak_bytes"] - found["imports_bytes"], 1.0)


def measure(density: float, **sizes: int) -> dict[str, float]:
    """Train every row of every table once, with rounds at the end; density 0: dense tables.

    Returns:
        "bytes" of tables and optimizer, "imports_bytes" of the process before them.
    """
    imports = peak_rss()
    case = Case(**sizes)
    every = [
        torch.arange(start, start + case.batch).remainder(case.rows).repeat(case.tables)
        for start in range(0, case.rows, case.batch)
    ]
    if density == 0:
        provider = bags(case, "Adagrad")
        for indices in every:
            provider.step(indices)
        return {"imports_bytes": imports, "bytes": 8 * case.tables * case.rows * case.dim}
    config = FIITEDConfig(
        target_density=density, optimizer="adagrad", lr=0.01, schedule="fixed",
        prune_every=max(1, len(every) // _ROUNDS),
    )  # fmt: skip
    specs = [TableSpec(f"t{number}", case.rows) for number in range(case.tables)]
    store = DynamicEmbeddingStore(specs, case.dim, config)
    grad = torch.full((case.batch, case.tables * case.dim), 1e-3)
    for indices in every:
        lookup(store, indices).backward(grad)
        store.step()
    return {"imports_bytes": imports, "bytes": store.memory_report().total_bytes}
