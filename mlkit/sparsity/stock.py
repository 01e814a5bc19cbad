"""Stock checkpoints in converted models: the neurons are put in the order of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["permute_stock_state"]


def permute_stock_state(
    site: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Reorder the neurons of a stock checkpoint on its way into a converted layer.

    A load_state_dict pre-hook. A checkpoint of a converted model brings `neuron_perm` and is taken
    as it is; one that cannot be understood is refused.
    """
    errors: list[str] = rest[-1]
    layer: Any = site
    if not hasattr(layer, "neuron_perm"):
        layer = next((m for m in site.children() if hasattr(m, "neuron_perm")), None)
        if layer is None:
            return  # packed, which takes no checkpoint and says so
    inner = f"{prefix}{layer.layout.host}." if layer.layout.host else prefix
    order = layer.neuron_perm
    present = [t for t in layer.shape.tensors if prefix + t.key in state_dict]
    if f"{inner}neuron_perm" in state_dict:
        order = state_dict[f"{inner}neuron_perm"]
        if order.shape != layer.neuron_perm.shape or (
            not order.is_meta and not _is_permutation(order)
        ):
            errors.append(f"{inner}neuron_perm is not a permutation of {layer.intermediate_size}")
    elif not present:
        return
    elif any(key.startswith(f"{inner}router.") for key in state_dict):
        errors.append(
            f"the checkpoint has {inner}router but not {inner}neuron_perm, so the order of its "
            "neurons is unknown; load a whole converted or a stock checkpoint"
        )
    elif order.is_meta or not _is_permutation(order):
        errors.append(
            f"{inner}neuron_perm has no values (converted on the meta device), so a stock "
            "checkpoint cannot be put in order; load it before converting"
        )
    else:
        for tensor in present:
            key = prefix + tensor.key
            state_dict[key] = tensor.reorder(state_dict[key], order)


def _is_permutation(order: Tensor) -> bool:
    expected = torch.arange(len(order), device=order.device)
    return order.ndim == 1 and bool(torch.equal(order.long().sort().values, expected))
