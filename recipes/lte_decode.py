"""The time of one token through one wide gated layer, by what each method reads of its weights.

Random weights and selections: the time depends on how much is read, not on values. Small layers
gain nothing from sparsity on a CPU, so the recipe's own model is not what is timed here. Several
layers take turns, so that weights come from memory and not from a cache, as in a whole model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mlkit_kernels.sparse_mlp import sparse_mlp

__all__ = ["DecodeTimes", "WideLayer"]

LAYERS = 4
"""More weights than a cache holds, at the sizes of the recipe: 550 MB."""


class DecodeTimes:
    """Times decode of one token, float32, on this CPU with the threads that torch has.

    Args:
        hidden_size: H.
        intermediate_size: I.
        expert_size: S.
        repeats: Calls of each side, which alternate; the median counts.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, expert_size: int, repeats: int
    ) -> None:
        self._sizes = (hidden_size, intermediate_size, expert_size)
        self.repeats = repeats

    @cached_property
    def layers(self) -> list[WideLayer]:
        """The layers that take turns."""
        return [WideLayer(*self._sizes) for _ in range(LAYERS)]

    @torch.inference_mode()
    def measure(self, method: str, sparsity: float, input_sparsity: float) -> dict[str, float]:
        """Return milliseconds a layer of a method, and of the best dense form in turn with it.

        Args:
            method: "dense", "magnitude", or any other for the kernel with its router.
            sparsity: Fraction of the layer's FLOPs that is skipped.
            input_sparsity: For "magnitude": fraction of the inputs that is taken as 0.
        """
        x = torch.randn(1, self._sizes[0])
        calls: dict[str, list[Callable[[], Tensor]]] = {
            "linear": [partial(layer.linear, x) for layer in self.layers],
            "mv": [partial(layer.mv, x[0]) for layer in self.layers],
        }
        if method == "magnitude":
            calls["sparse"] = [
                layer.columns(x[0], sparsity, input_sparsity) for layer in self.layers
            ]
        elif method != "dense":
            calls["sparse"] = [layer.kernel(x, sparsity) for layer in self.layers]
        ms = {name: 1e3 * seconds for name, seconds in _alternate(calls, self.repeats).items()}
        dense = min(ms["linear"], ms["mv"])
        return {"ms": ms.get("sparse", dense), "dense_ms": dense}


class WideLayer:
    """A gated layer with random weights, in the layout of every method.

    Args:
        hidden_size: H.
        intermediate_size: I.
        expert_size: S.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, expert_size: int) -> None:
        self.hidden, self.inner, self.size = hidden_size, intermediate_size, expert_size
        self.experts = intermediate_size // expert_size

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of the dense layer."""
        wide = (self.inner, self.hidden)
        return torch.randn(wide) * 0.02, torch.randn(wide) * 0.02, torch.randn(wide[::-1]) * 0.02

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Router, and the packed weights."""
        gate, up, down = self.weights
        blocks = (self.experts, self.size, self.hidden)
        gate_up = torch.cat([gate.view(blocks), up.view(blocks)], dim=1).contiguous()
        router = torch.randn(self.experts, self.hidden)
        return router, gate_up, down.t().contiguous().view(blocks)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """A row per input of each linear layer."""
        gate, up, down = (weight.t().contiguous() for weight in self.weights)
        return gate, up, down

    def linear(self, x: Tensor) -> Tensor:
        """The dense layer by `F.linear`."""
        gate, up, down = self.weights
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def mv(self, x: Tensor) -> Tensor:
        """The dense layer by `torch.mv`, for a token without a batch axis."""
        gate, up, down = self.weights
        return torch.mv(down, F.silu(torch.mv(gate, x)) * torch.mv(up, x))

    def kernel(self, x: Tensor, sparsity: float) -> Callable[[], Tensor]:
        """The kernel: router, comparison, selected experts."""
        router, gate_up, down_t = self.packed
        logits = F.linear(x, router)[0].sort().values
        skipped = min(round(sparsity * self.experts), self.experts - 1)
        between = (logits[max(skipped, 1) - 1] + logits[skipped]) / 2
        threshold = float(between) if skipped else -torch.inf
        return lambda: sparse_mlp(x, router, None, gate_up, down_t, threshold=threshold)

    def columns(self, x: Tensor, sparsity: float, input_sparsity: float) -> Callable[[], Tensor]:
        """Only what inputs above a threshold meet: rows of the transposed weights, summed."""
        gate, up, down = self.transposed
        inner_sparsity = min(max(3 * sparsity - 2 * input_sparsity, 0.0), 1.0)
        kept = max(1, round((1 - input_sparsity) * self.hidden))
        kept_inner = max(1, round((1 - inner_sparsity) * self.inner))
        limit = x.abs().sort(descending=True).values[kept - 1]

        def gather(values: Tensor, index: Tensor, rows: Tensor) -> Tensor:
            scale = values[index].unsqueeze(0)
            return F.embedding_bag(index.unsqueeze(0), rows, per_sample_weights=scale, mode="sum")[
                0
            ]

        def call() -> Tensor:
            index = (x.abs() >= limit).nonzero()[:, 0]
            h = F.silu(gather(x, index, gate)) * gather(x, index, up)
            level = h.abs().kthvalue(self.inner - kept_inner + 1).values
            return gather(h, (h.abs() >= level).nonzero()[:, 0], down)

        return call


def _alternate(calls: dict[str, list[Callable[[], Tensor]]], repeats: int) -> dict[str, float]:
    """Median seconds a layer of each side, called in turn; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, layers in calls.items():
            started = time.perf_counter()
            for call in layers:
                call()
            seconds[name].append((time.perf_counter() - started) / len(layers))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
