"""Coreset selection: speed and memory against slow, plain and published implementations."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.benchmarks import _ccs_features, _ccs_recorder, _ccs_selection
from scripts.benchmarks._harness import Bench, Row

__all__ = ["rows"]


def rows(bench: Bench) -> Iterator[Row]:
    """Measure every part of the room `mlkit.coresets` that has a peer or a target."""
    yield from _ccs_selection.rows(bench)
    yield from _ccs_recorder.rows(bench)
    yield from _ccs_features.rows(bench)
