"""One feed-forward layer on the CPU: the decode kernel, and packed layers with `auto`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mlkit
from mlkit.sparsity import LTEConfig, PackedExpertMLP, pack_for_inference
from mlkit_kernels.sparse_mlp import sparse_mlp, sparse_mlp_reference
from scripts.benchmarks._harness import Bench, Row, alternate

__all__ = ["auto_rows", "kernel_rows", "set_sparsity"]

TARGETS = {
    torch.float32: {0.5: 1.7, 0.75: 3.3, 0.9: 8.0, 0.95: 14.0},
    torch.bfloat16: {0.5: 2.5, 0.75: 4.2, 0.9: 9.0, 0.95: 15.0},
}
"""Wanted gain over the best dense form, by share of experts skipped, router included."""
LAYERS = {torch.float32: 4, torch.bfloat16: 8}
"""Layers used in turn, so that their weights come from memory and not from a cache."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
WORST = 0.97
"""What `auto` may lose against the stock layer, DESIGN: 3 %."""


# ------------------------------------------------------------------------- kernel


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


def kernel_rows(bench: Bench) -> Iterator[Row]:
    """Decode of one token through one layer, fp32 and bf16, against the best dense form."""
    with torch.inference_mode():
        for dtype in TARGETS:
            yield from _decode(bench, dtype)


def _decode(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    hidden, width, size = bench.size(2048, 64), bench.size(5632, 1280), 32
    torch.manual_seed(0)
    layers = [_Layer(hidden, width // size, size, dtype) for _ in range(LAYERS[dtype])]
    x = torch.randn(1, hidden).to(dtype)
    for sparsity, target in TARGETS[dtype].items():
        thresholds = [layer.threshold(x, sparsity) for layer in layers]
        first = layers[0]
        want = sparse_mlp_reference(
            x, first.router, None, first.gate_up, first.down_t, threshold=thresholds[0]
        ).float()
        error = (first.sparse(x, thresholds[0]).float() - want).norm() / want.norm()
        bench.check(float(error) < TOLERANCE[dtype], "sparse_mlp")

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
        fastest = min(("dense F.linear", "dense mv"), key=lambda k: sum(seconds[k]))
        dense_ms = 1e3 * sorted(seconds[fastest])[len(seconds[fastest]) // 2]
        name = str(dtype).removeprefix("torch.")
        yield from bench.times(
            f"decode of a layer, {hidden} x {width}, {name}, {sparsity:.0%} skipped, with router",
            {"mlkit": seconds["mlkit"], f"{fastest} (best dense)": seconds[fastest]},
            unit="ms",
            limit=dense_ms / target,
        )


# ----------------------------------------------------------------- packed modules


class _Gated(nn.Module):
    """A feed-forward layer as in Llama."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def set_sparsity(layers: Sequence[PackedExpertMLP], x: Tensor, sparsity: float) -> None:
    """Set the thresholds of layers so that this share of the (token, expert) pairs is skipped."""
    for packed in layers:
        logits = packed.router(x).flatten().double()
        if sparsity == 0:
            packed.layer.set_threshold(0.0)
        else:
            ordered, skipped = logits.sort().values, round(sparsity * len(logits))
            packed.layer.set_limit(float(ordered[skipped - 1 : skipped + 1].mean()))


def auto_rows(bench: Bench) -> Iterator[Row]:
    """Packed layers with backend "auto" against the stock modules, by tokens and sparsity."""
    wide = (bench.size(2048, 64), bench.size(5632, 256))
    narrow = [(128, 512), (256, 1024), (512, 1408)]
    with torch.inference_mode():
        for dtype in TARGETS:
            yield from _auto(bench, dtype, wide, (1, 2, 4, 8), (0.0, 0.25, 0.5, 0.75))
            for shape in narrow[: bench.size(3, 1)]:
                yield from _auto(bench, dtype, shape, (1, 8), (0.0, 0.5))


def _auto(
    bench: Bench,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: tuple[int, ...],
    sparsities: tuple[float, ...],
) -> Iterator[Row]:
    hidden, width = shape
    torch.manual_seed(0)
    count = LAYERS[dtype]
    with torch.inference_mode(False), torch.no_grad():
        stock = nn.ModuleList([_Gated(hidden, width) for _ in range(count)]).to(dtype).eval()
        model = nn.ModuleList([_Gated(hidden, width) for _ in range(count)]).to(dtype).eval()
        model.load_state_dict(stock.state_dict())
        mlkit.convert(model, LTEConfig(grouping="none", mode="hard"))
        pack_for_inference(model)
    packed = [m for m in model if isinstance(m, PackedExpertMLP)]
    for number in tokens:
        x = torch.randn(number, hidden).to(dtype)
        for sparsity in sparsities:
            set_sparsity(packed, x, sparsity)
            if sparsity == 0:
                want = stock[0](x).float()
                error = (packed[0](x).float() - want).norm() / want.norm()
                bench.check(float(error) < TOLERANCE[dtype], "packed and stock layer")
            inner = max(1, bench.size(2**21, 1) // (hidden * width))

            def run(layers: Sequence[nn.Module], x: Tensor = x, inner: int = inner) -> None:
                for _ in range(inner):
                    for layer in layers:
                        layer(x)

            seconds = alternate(
                {"mlkit auto": lambda: run(packed), "stock layer": lambda: run(list(stock))},
                bench.size(21, 2),
                warmup=3,
            )
            seconds = {k: [s / inner / count for s in v] for k, v in seconds.items()}
            name = str(dtype).removeprefix("torch.")
            yield from bench.times(
                f"packed layer, auto, {hidden} x {width}, {name}, {number} tokens, "
                f"{sparsity:.0%} of pairs skipped",
                seconds,
                unit="us",
                limit=1e6 * statistics.median(seconds["stock layer"]) / WORST,
            )
