"""Dynamic embeddings: steps, inference, rounds and memory against FBGEMM and `nn.EmbeddingBag`."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.benchmarks import _embeddings_step
from scripts.benchmarks._harness import Bench, Row

__all__ = ["rows"]


def rows(bench: Bench) -> Iterator[Row]:
    """Measure training and serving with FIITED's store."""
    yield from _embeddings_step.rows(bench)
