"""A training step and inference of 26 tables on a GPU: the Triton kernels and their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mlkit_kernels.dynamic_embedding import available_backends
from scripts.benchmarks._embeddings_case import (
    IDS,
    Case,
    bags,
    batches,
    has_fbgemm,
    ours,
    store_of,
    tbe,
)
from scripts.benchmarks._harness import Bench, Row, alternate

__all__ = ["case_rows", "rows"]

_OF_TBE = 1.3
"""Wanted share of FBGEMM's step."""


def rows(bench: Bench) -> Iterator[Row]:
    """Rows at D = 64 and 128, where CUDA and Triton are present."""
    if not torch.cuda.is_available():
        bench.note("no CUDA device here: the Triton kernels were not measured")
        return
    if "triton" not in available_backends("cuda"):
        bench.note("triton is not installed: its kernels were not measured")
        return
    for dim in (64, 128):
        yield from case_rows(bench, Case.of(bench, dim), "cuda")


def case_rows(bench: Bench, case: Case, device: str) -> Iterator[Row]:
    """Rows of one case; on a CPU they check the code alone."""
    providers = {
        f"mlkit {density}": ours(case, store_of(case, density, device)) for density in (1.0, 0.25)
    }
    peer = "nn.EmbeddingBag + SGD"
    if device == "cuda" and has_fbgemm():
        peer = "FBGEMM TBE, row-wise Adagrad"
        providers[peer] = tbe(case, "rowwise_adagrad", device)
    else:
        providers[peer] = bags(case, "SGD", device)
    repeats = bench.size(30, 1)
    for ids in IDS:
        given = batches(case, ids, repeats + 1, device)
        for kind, metric in (("step", "training step"), ("forward", "inference")):
            with torch.set_grad_enabled(kind == "step"):
                seconds = alternate(
                    {who: _each(getattr(p, kind), given) for who, p in providers.items()}, repeats
                )
            for density in (1.0, 0.25):
                yield from bench.times(
                    f"{device}: {case}, {ids} ids, density {density}",
                    {"mlkit": seconds[f"mlkit {density}"], peer: seconds[peer]},
                    metric=metric,
                    unit="ms",
                    limit=_OF_TBE * 1e3 * sorted(seconds[peer])[len(seconds[peer]) // 2],
                )


def _each(call: Callable[[Any], Any], given: list[Any]) -> Callable[[], None]:
    """A provider that takes the batches in turn."""
    turn = iter(given)

    def run() -> None:
        call(next(turn))

    return run
