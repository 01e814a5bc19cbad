"""A training step and inference of 26 tables on the CPU, against FBGEMM and `nn.EmbeddingBag`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from scripts.benchmarks._embeddings_case import (
    IDS,
    Case,
    Provider,
    bags,
    batches,
    has_fbgemm,
    ours,
    store_of,
    tbe,
)
from scripts.benchmarks._embeddings_limit import bound_ms
from scripts.benchmarks._embeddings_room import Samples, alternate_children, child, fitting
from scripts.benchmarks._harness import Bench, Row, spread_of

__all__ = ["measure", "rows"]

_TBE, _TBE_SGD = "FBGEMM TBE, row-wise Adagrad", "FBGEMM TBE, SGD"
_ADAGRAD, _SGD = "nn.EmbeddingBag + Adagrad", "nn.EmbeddingBag + SGD"
_DENSITIES = (1.0, 0.25)
_OF_TBE = {1.0: 1.5, 0.25: 1.0}
"""Wanted share of FBGEMM's step, by density; at 0.25 for wide rows."""
_WIDE = 64
_SPEEDUP = 2.0
"""Wanted gain over `nn.EmbeddingBag` + Adagrad."""


def rows(bench: Bench) -> Iterator[Row]:
    """Steps and forward passes at D = 16 and 64."""
    _check(bench)
    if not has_fbgemm():
        bench.note("fbgemm_gpu is not installed (extra torchrec): its rows are left out")
    size = bench.size(2**30, 2**20)
    speeds = child(
        bench, "_embeddings_limit:measure",
        size=size, accesses=bench.size(500_000, 100), repeats=bench.size(7, 1),
    )  # fmt: skip
    for dim in (16, _WIDE):
        case = fitting(bench, Case.of(bench, dim), adagrad_bytes(Case.of(bench, dim)))
        yield from _case_rows(bench, case, dim, speeds)


def adagrad_bytes(case: Case) -> int:
    """What the largest provider holds for a table: weights and sums of squares."""
    return case.rows * case.dim * 4 * 2


# ---------------------------------------------------------------------------------- measuring


def provider_of(case: Case, name: str, density: float, optimizer: str) -> Provider:
    """Build one provider by its short name: "ours", "tbe" or "bags"."""
    if name == "ours":
        return ours(case, store_of(case, density, optimizer=optimizer))
    return (tbe if name == "tbe" else bags)(case, optimizer)


def measure(
    name: str, density: float, optimizer: str, steps: int, **sizes: int
) -> dict[str, float]:
    """Time one provider in this process.

    Returns:
        "<step or forward> <cpu or wall> <ids>": the median in seconds; CPU seconds are those of
        all threads of the process.
    """
    case = Case(**sizes)
    provider = provider_of(case, name, density, optimizer)
    given = {ids: batches(case, ids, steps + 1) for ids in IDS}
    found: dict[str, list[float]] = {}

    def timed(what: str, call: Any, batch: torch.Tensor, *, counts: bool) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        call(batch)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if counts:
            found.setdefault(f"{what} cpu", []).append(cpu)
            found.setdefault(f"{what} wall", []).append(wall)

    for number in range(steps + 1):
        for ids in IDS:
            batch = given[ids][number]
            timed(f"step {ids}", provider.step, batch, counts=number > 0)
    with torch.no_grad():
        for number in range(steps + 1):
            for ids in IDS:
                batch = given[ids][number]
                timed(f"forward {ids}", provider.forward, batch, counts=number > 0)
    return {what: statistics.median(samples) for what, samples in found.items()}


# --------------------------------------------------------------------------------------- rows


def _case_rows(bench: Bench, case: Case, dim: int, speeds: Mapping[str, float]) -> Iterator[Row]:
    asked: dict[str, tuple[str, float, str]] = {
        f"mlkit {density}": ("ours", density, "rowwise_adagrad") for density in _DENSITIES
    }
    if has_fbgemm():
        asked |= {_TBE: ("tbe", 1.0, "rowwise_adagrad"), _TBE_SGD: ("tbe", 1.0, "sgd")}
    asked |= {_ADAGRAD: ("bags", 1.0, "Adagrad"), _SGD: ("bags", 1.0, "SGD")}
    arguments = {
        who: {
            "name": name, "density": density, "optimizer": optimizer,
            "steps": bench.size(20, 1), **vars(case),
        }
        for who, (name, density, optimizer) in asked.items()
    }  # fmt: skip
    samples = alternate_children(bench, "_embeddings_step:measure", arguments, bench.size(3, 1))
    peers = [who for who in asked if not who.startswith("mlkit")]
    for ids in IDS:
        for density in _DENSITIES:
            what = f"{case}, {ids} ids, density {density}"
            mine = samples[f"mlkit {density}"]
            for kind, metric in (("step", "training step"), ("forward", "inference")):
                bound = bound_ms(speeds, case, density, ids, update=kind == "step")
                for clock, name in (("cpu", "CPU time"), ("wall", "wall time")):
                    for peer in peers:
                        row = _against(
                            what, f"{metric}, {name}", f"{kind} {ids} {clock}", mine, peer,
                            samples[peer], bound,
                        )  # fmt: skip
                        main = clock == "cpu" and peer in (_TBE, _ADAGRAD)
                        yield replace(row, is_detail=not main)
            yield from _goals(what, f"step {ids} cpu", mine, samples, density, dim)


def _against(
    case: str, metric: str, key: str, mine: Samples, peer: str, theirs: Samples,
    bound: float | None,
) -> Row:  # fmt: skip
    return Row.of(
        case, metric, 1e3 * statistics.median(mine[key]), "ms",
        peer=peer, peer_value=1e3 * statistics.median(theirs[key]), limit=bound,
        spread=spread_of(mine[key], 1e3), peer_spread=spread_of(theirs[key], 1e3),
    )  # fmt: skip


def _goals(
    case: str, key: str, mine: Samples, samples: Mapping[str, Samples], density: float, dim: int
) -> Iterator[Row]:
    value = statistics.median(mine[key])
    if _TBE in samples and (density == 1.0 or dim >= _WIDE):
        share = value / statistics.median(samples[_TBE][key])
        yield Row.of(case, "step / FBGEMM's step", share, "x", limit=_OF_TBE[density])
    gain = statistics.median(samples[_ADAGRAD][key]) / value
    yield Row.of(
        case, "speed-up over nn.EmbeddingBag + Adagrad", gain, "x", limit=_SPEEDUP,
        higher_is_better=True,
    )  # fmt: skip


def _check(bench: Bench) -> None:
    """Let all providers make two steps on small tables, and compare their rows."""
    case = Case(tables=3, rows=50, dim=8, batch=16)
    pairs = [("sgd", bags, "SGD"), ("adagrad", bags, "Adagrad")]
    if has_fbgemm():
        pairs += [("sgd", tbe, "sgd"), ("rowwise_adagrad", tbe, "rowwise_adagrad")]
    for fused, peer, name in pairs:
        mine = ours(case, store_of(case, 1.0, optimizer=fused))
        theirs = peer(case, name)
        for batch in batches(case, IDS[1], 2):
            mine.step(batch)
            theirs.step(batch)
        close = torch.allclose(mine.rows(), theirs.rows(), rtol=1e-4, atol=1e-6)
        bench.check(close, f"{fused} and {peer.__name__} {name}")
