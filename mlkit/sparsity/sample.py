"""The logits of all routers in one forward pass, and the shift that brings them to a sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlkit.sparsity.module import SparseExpertMLP

__all__ = ["LogitSample"]

MAX_LOGITS = 1 << 16
"""Logits kept of each layer; the error of a quantile of so many is below half a point."""


class LogitSample:
    """Collect logits from now on; `shift_biases` ends it.

    Args:
        layers: LTE layers that are about to see a batch in soft mode.
    """

    def __init__(self, layers: Sequence[SparseExpertMLP]) -> None:
        self._layers = list(layers)
        self._logits: list[list[Tensor]] = [[] for _ in layers]
        self._hooks = [
            layer.router.register_forward_hook(self._collector(number))
            for number, layer in enumerate(layers)
        ]

    @staticmethod
    def fits(layers: Sequence[SparseExpertMLP]) -> bool:
        """Whether a shift of the biases changes what is selected."""
        config = layers[0].config
        return config.router == "sigmoid" and config.router_bias is not None

    def _collector(self, number: int) -> Any:
        layer = self._layers[number]

        def collect(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
            kept = logits.detach()
            mask = layer.group.token_mask()
            if mask is not None:
                kept = kept[mask.of(args[0], layer.training)]
            kept = kept.flatten()
            step = max(1, len(kept) // MAX_LOGITS)
            self._logits[number].append(kept[::step])

        return collect

    @torch.no_grad()
    def shift_biases(self, sparsity: float) -> float:
        """Add to all biases what makes this fraction of the FLOPs stay below the threshold.

        With several ranks it is the mean of their shifts. Without a pass in between it is 0.

        Returns:
            The shift.
        """
        for hook in self._hooks:
            hook.remove()
        shift = torch.zeros((), dtype=torch.float64, device="cpu")
        if all(self._logits):
            shift += self._layers[0].limit - self._quantile(sparsity)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shift = shift.to(next(self._layers[0].router.parameters()).device)
            dist.all_reduce(shift)
            shift /= dist.get_world_size()
        for layer in self._layers:
            for name, parameter in layer.router.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(float(shift))
        return float(shift)

    def _quantile(self, fraction: float) -> float:
        logits = [torch.cat(passes) for passes in self._logits]
        weights = [
            torch.full_like(some, layer.dense_flops / len(some))
            for some, layer in zip(logits, self._layers, strict=True)
        ]
        values, order = torch.cat(logits).sort()
        mass = torch.cat(weights)[order].double().cumsum(0)
        place = int(torch.searchsorted(mass, fraction * mass[-1]))
        return float(values[min(place, len(values) - 1)])
