"""`backend="auto"` of packed layers: measured once for each kind of layer, used in every call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from torch import nn

from mlkit.errors import RunError
from mlkit.sparsity.packed import PackedExpertMLP
from mlkit_kernels.sparse_mlp import available_backends, break_even_fraction, measure_prices

__all__ = ["measure_break_even"]

logger = logging.getLogger(__name__)

_TYPES = (torch.float32, torch.bfloat16)
_TOKENS = (1, 2, 4, 8)


def measure_break_even(model: nn.Module) -> dict[str, dict[int, float]]:
    """Time reading the selected experts against a dense GEMM, for `backend="auto"`.

    `pack_for_inference` does this. Do it again when threads or machine have changed: after
    `torch.set_num_threads`, or in a copy of the model that was made elsewhere. It takes up to half
    a second for each kind of layer; on a GPU, or without the C++ kernel, there is nothing to
    measure.

    Args:
        model: Holds packed layers.

    Returns:
        For each packed layer with backend "auto", by name: number of tokens to the fraction of
        selected experts above which a dense GEMM runs (1: never).

    Raises:
        RunError: If no layer is packed.
    """
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedExpertMLP)}
    if not packed:
        raise RunError(f"no layer of {type(model).__name__} is packed: pack_for_inference first")
    found: dict[str, dict[int, float]] = {}
    for group in _alike(packed).values():
        first = next(iter(group.values()))
        started = time.perf_counter()
        prices = measure_prices(
            [(m.gate_up.detach(), m.down_t.detach()) for m in group.values()],
            activation=first.activation,
            dtype=next(first.router.parameters()).dtype,
        )
        experts = first.layer.num_experts
        fractions = {t: break_even_fraction(prices, t, experts) for t in _TOKENS}
        for name, module in group.items():
            module.prices = prices
            found[name] = fractions
        logger.info(
            "measured %d layers of %s %s with %d threads in %.2f s: dense above a fraction of %s",
            len(group),
            tuple(first.gate_up.shape),
            first.gate_up.dtype,
            torch.get_num_threads(),
            time.perf_counter() - started,
            ", ".join(f"{f:.2f} ({t} tokens)" for t, f in fractions.items()),
        )
    return found


def _alike(
    packed: Mapping[str, PackedExpertMLP],
) -> dict[tuple[object, ...], dict[str, PackedExpertMLP]]:
    """Group the layers for which the C++ kernel can run by what their times depend on."""
    groups: dict[tuple[object, ...], dict[str, PackedExpertMLP]] = {}
    for name, module in packed.items():
        module.prices = None
        kind = next(module.router.parameters()).dtype
        types_fit = module.gate_up.dtype in _TYPES and kind in _TYPES
        if module.backend != "auto" or module.gate_up.device.type != "cpu" or not types_fit:
            continue
        if "cpp" in available_backends("cpu"):
            shape = tuple(module.gate_up.shape)
            key = (shape, module.gate_up.dtype, kind, module.activation)
            groups.setdefault(key, {})[name] = module
    return groups
