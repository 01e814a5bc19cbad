"""Sparse feed-forward layers: kernel, packed layers and a whole model against dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlkit_kernels.sparse_mlp import available_backends
from scripts.benchmarks import _lte_gpu, _lte_layer, _lte_model
from scripts.benchmarks._harness import Bench, Row

__all__ = ["rows"]


def rows(bench: Bench) -> Iterator[Row]:
    """Measure serving with LTE: on the CPU, and on a GPU where there is one."""
    if "cpp" in available_backends("cpu"):
        yield from _lte_layer.kernel_rows(bench)
        yield from (replace(row, is_detail=True) for row in _lte_layer.auto_rows(bench))
        yield from _lte_model.rows(bench)
    else:
        bench.note("no C++ compiler here: the decode kernel was not measured")
    yield from _lte_gpu.rows(bench)
