"""Sparse feed-forward layers: the decode kernel against the dense layer it replaces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mlkit_kernels.sparse_mlp import available_backends, sparse_mlp, sparse_mlp_reference
from scripts.benchmarks._harness import Bench, Row, alternate

__all__ = ["rows"]

_TARGETS = {
    torch.float32: {0.5: 1.7, 0.75: 3.3, 0.9: 8.0, 0.95: 14.0},
    torch.bfloat16: {0.5: 2.5, 0.75: 4.2, 0.9: 9.0, 0.95: 15.0},
}
"""Wanted gain over the best dense form, by share of experts skipped, router included."""
_LAYERS = {torch.float32: 4, torch.bfloat16: 8}
"""Layers used in turn, so that their weights come from memory and not from a cache."""


class _Layer:
    """One gated layer with random weights, dense and packed."""

    def __init__(self, hidden: int, groups: int, size: int, dtype: torch.dtype) -> None:
        width = groups * size
        self.gate, self.up, self.down = (
            (torch.randn(shape) * 0.02).to(dtype)
            for shape in ((width, hidden), (width, hidden), (hidden, width))
        )
        self.router = torch.randn(groups, hidden).to(dtype)
        self.gate_up = torch.cat(
            [self.gate.view(groups, size, hidden), self.up.view(groups, size, hidden)], dim=1
        ).contiguous()
        self.down_t = self.down.t().contiguous().view(groups, size, hidden)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)

    def mv(self, x: Tensor) -> Tensor:
        return torch.mv(self.down, F.silu(torch.mv(self.gate, x[0])) * torch.mv(self.up, x[0]))

    def threshold(self, x: Tensor, sparsity: float) -> float:
        """A logit threshold that skips this share of the experts."""
        logits = (x.float() @ self.router.float().t())[0].sort().values
        skipped = round(sparsity * len(logits))
        return float((logits[skipped - 1] + logits[skipped]) / 2)

    def sparse(self, x: Tensor, threshold: float) -> Tensor:
        return sparse_mlp(x, self.router, None, self.gate_up, self.down_t, threshold=threshold)


def rows(bench: Bench) -> Iterator[Row]:
    """Decode of one token through one layer on the CPU, fp32 and bf16."""
    if "cpp" not in available_backends("cpu"):
        bench.note("no C++ compiler here: the decode kernel was not measured")
        return
    with torch.inference_mode():
        for dtype in _TARGETS:
            yield from _decode(bench, dtype)


def _decode(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    hidden, width, size = bench.size(2048, 64), bench.size(5632, 1280), 32
    torch.manual_seed(0)
    layers = [_Layer(hidden, width // size, size, dtype) for _ in range(_LAYERS[dtype])]
    x = torch.randn(1, hidden).to(dtype)
    name = str(dtype).removeprefix("torch.")
    for sparsity, target in _TARGETS[dtype].items():
        thresholds = [layer.threshold(x, sparsity) for layer in layers]
        first = layers[0]
        want = sparse_mlp_reference(
            x, first.router, None, first.gate_up, first.down_t, threshold=thresholds[0]
        ).float()
        error = (first.sparse(x, thresholds[0]).float() - want).norm() / want.norm()
        bench.check(float(error) < (1e-5 if dtype == torch.float32 else 2e-2), "sparse_mlp")

        def sparse(thresholds: list[float] = thresholds) -> None:
            for layer, threshold in zip(layers, thresholds, strict=True):
                layer.sparse(x, threshold)

        def linear() -> None:
            for layer in layers:
                layer.linear(x)

        def mv() -> None:
            for layer in layers:
                layer.mv(x)

        seconds = alternate(
            {"mlkit": sparse, "dense F.linear": linear, "dense mv": mv}, bench.size(15, 2)
        )
        seconds = {k: [s / len(layers) for s in v] for k, v in seconds.items()}
        best = min(sum(v) for k, v in seconds.items() if k != "mlkit")
        fastest = next(k for k, v in seconds.items() if k != "mlkit" and sum(v) == best)
        dense_ms = 1e3 * sorted(seconds[fastest])[len(seconds[fastest]) // 2]
        yield from bench.times(
            f"decode of a layer, {hidden} x {width}, {name}, {sparsity:.0%} skipped, with router",
            {"mlkit": seconds["mlkit"], f"{fastest} (best dense)": seconds[fastest]},
            unit="ms",
            limit=dense_ms / target,
        )
