"""One feed-forward layer of LLaMA2-7B's shape on a GPU: the Triton kernels and their peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlkit_kernels.sparse_mlp import available_backends, expert_mask, sparse_mlp
from scripts.benchmarks._harness import Bench, Provider, Row, alternate, calling

__all__ = ["layer_rows", "rows"]

SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)


def rows(bench: Bench) -> Iterator[Row]:
    """Decode of 1 and 8 tokens, and prompts of 16 to 2048, where CUDA and Triton are present."""
    if not torch.cuda.is_available():
        bench.note("no CUDA device here: the Triton kernels were not measured")
        return
    if "triton" not in available_backends("cuda"):
        bench.note("triton is not installed: its kernels were not measured")
        return
    yield from layer_rows(bench, torch.device("cuda"))


class _Layer:
    """Random weights, dense and packed."""

    def __init__(self, hidden: int, width: int, size: int, device: torch.device) -> None:
        def draw(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).bfloat16()

        groups = width // size
        self.router = draw(groups, hidden, scale=hidden**-0.5)
        self.gate_up = draw(groups, 2 * size, hidden, scale=hidden**-0.5)
        self.down_t = draw(groups, size, hidden, scale=width**-0.5)
        self.gate, self.up = (
            part.reshape(width, hidden).contiguous() for part in self.gate_up.chunk(2, dim=1)
        )
        self.down = self.down_t.view(width, hidden).t().contiguous()

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)

    def limit(self, x: Tensor, sparsity: float) -> float:
        """The threshold that skips this share of the (token, expert) pairs."""
        if sparsity == 0:
            return -torch.inf
        logits = (x.float() @ self.router.float().t()).flatten().sort().values
        skipped = round(sparsity * len(logits))
        return float(logits[skipped - 1 : skipped + 1].mean())

    def sparse(self, x: Tensor, limit: float, backend: str) -> Tensor:
        return sparse_mlp(
            x, self.router, None, self.gate_up, self.down_t, threshold=limit, backend=backend
        )

    def selected(self, x: Tensor, experts: Tensor) -> Tensor:
        """The experts by `index_select`, chosen before: no router, and no wait for the host."""
        gate, up = self.gate_up.index_select(0, experts).chunk(2, dim=1)
        down = self.down_t.index_select(0, experts)
        h = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))
        return h @ down.flatten(0, 1)

    def nbytes(self, experts: int) -> int:
        """Bytes of the router and of that many experts."""
        each = (self.gate_up[0].numel() + self.down_t[0].numel()) * 2
        return self.router.numel() * 2 + experts * each


def layer_rows(bench: Bench, device: torch.device) -> Iterator[Row]:
    """Rows for a device; on a CPU, in Triton's interpreter, they check the code alone."""
    hidden, width, size = bench.size(4096, 64), bench.size(11008, 128), bench.size(32, 16)
    torch.manual_seed(0)
    layer = _Layer(hidden, width, size, device)
    rate = _bandwidth(bench, device)
    compiled = torch.compile(layer.dense, backend="inductor" if device.type == "cuda" else "eager")
    with torch.inference_mode():
        for tokens in (1, 8, *((16, 64, 256, 2048) if not bench.quick else (17,))):
            x = torch.randn(tokens, hidden, device=device).bfloat16()
            for sparsity in SPARSITIES:
                limit = layer.limit(x, sparsity)
                chosen = expert_mask(x, layer.router, None, limit).any(0)
                union = int(chosen.sum())
                providers: dict[str, Callable[[], Any]] = {
                    "mlkit triton": calling(layer.sparse, x, limit, "triton"),
                    "dense F.linear": calling(layer.dense, x),
                    "dense torch.compile": calling(compiled, x),
                }
                if tokens == 1:
                    providers |= _decode_peers(layer, x, chosen, sparsity)
                elif tokens > 8:
                    providers["masked dense"] = calling(layer.sparse, x, limit, "dense")
                want = layer.sparse(x, limit, "reference").float()
                error = layer.sparse(x, limit, "triton").float() - want
                bench.check(bool(error.norm() <= 2e-2 * want.norm()), "triton and reference")
                seconds = alternate(
                    {name: _graphed(call, device) for name, call in providers.items()},
                    bench.size(30, 1),
                    warmup=bench.size(5, 0),
                )
                yield from bench.times(
                    f"layer on a GPU, {hidden} x {width}, bfloat16, {tokens} tokens, {sparsity:.0%}"
                    f" of pairs skipped ({union} of {len(chosen)} experts read), with router",
                    seconds,
                    unit="us",
                    limit=1e6 * layer.nbytes(union) / rate,
                )


def _decode_peers(
    layer: _Layer, x: Tensor, chosen: Tensor, sparsity: float
) -> dict[str, Callable[[], Any]]:
    from scripts.benchmarks._lte_teal import skipping_mlp

    experts = chosen.nonzero().flatten()
    gate_t, up_t = layer.gate.t().contiguous(), layer.up.t().contiguous()
    down = layer.down_t.flatten(0, 1)
    h = F.silu(F.linear(x, layer.gate)) * F.linear(x, layer.up)
    low, inner = (
        -1.0 if sparsity == 0 else float(t.float().abs().flatten().quantile(sparsity))
        for t in (x, h)
    )
    return {
        "index_select, no router": calling(layer.selected, x, experts),
        "input channels skipped (TEAL's way)": calling(
            skipping_mlp, x, gate_t, up_t, down, low, inner
        ),
    }


def _graphed(call: Callable[[], Any], device: torch.device) -> Provider:
    """Capture a call in a CUDA graph, as serving does, so that its launches cost no host time."""
    if device.type != "cuda":
        return calling(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return calling(graph.replay)


def _bandwidth(bench: Bench, device: torch.device) -> float:
    """Return bytes a second that a plain copy reads and writes on this device."""
    source = torch.empty(bench.size(2**30, 2**16), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = alternate({"copy": calling(target.copy_, source)}, bench.size(20, 2))
    return 2 * source.numel() / statistics.median(seconds["copy"])
