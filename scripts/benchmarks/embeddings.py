"""Dynamic embeddings: steps, inference, rounds and memory against FBGEMM and `nn.EmbeddingBag`."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.benchmarks import (
    _embeddings_gpu,
    _embeddings_memory,
    _embeddings_options,
    _embeddings_round,
    _embeddings_step,
)
from scripts.benchmarks._harness import Bench, Row

__all__ = ["rows"]


def rows(bench: Bench) -> Iterator[Row]:
    """Measure training and serving with FIITED's store."""
    yield from _embeddings_step.rows(bench)
    yield from _embeddings_options.rows(bench)
    yield from _embeddings_round.rows(bench)
    yield from _embeddings_memory.rows(bench)
    yield from _embeddings_gpu.rows(bench)
