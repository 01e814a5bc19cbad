"""Stock checkpoints in converted models: neurons are padded and put in the order of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlkit.sparsity.layout import permute_neurons

__all__ = ["permute_stock_state"]


def permute_stock_state(
    site: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Pad and reorder the neurons of a stock checkpoint on its way into a converted layer.

    A load_state_dict pre-hook. A checkpoint of a converted model brings `neuron_perm` and is taken
    as it is. An adapter brings `neuron_perm` without the weights it is for: then the weights that
    are here follow. A checkpoint that cannot be understood is refused.
    """
    errors: list[str] = rest[-1]
    layer: Any = site
    if not hasattr(layer, "neuron_perm"):
        layer = next((m for m in site.children() if hasattr(m, "neuron_perm")), None)
        if layer is None:
            return  # packed, which takes no checkpoint and says so
    inner = f"{prefix}{layer.layout.host}." if layer.layout.host else prefix
    router = [key for key in state_dict if key.startswith(f"{inner}router.")]
    orders = {key: state_dict[key] for key in router if key.endswith(".neuron_perm")}
    order = layer.routers()[0].neuron_perm
    present = [t for t in layer.shape.tensors if prefix + t.key in state_dict]
    if orders:
        for key, value in orders.items():
            if not (value.is_meta or _is_permutation(value, layer.intermediate_size)):
                errors.append(f"{key} is not a permutation of {layer.intermediate_size}")
                return
        if not present and not _has_base_layers(layer, prefix, state_dict):
            _follow(site, layer, orders, f"{inner}router.", errors)
    elif not present:
        return
    elif router:
        errors.append(
            f"the checkpoint has {inner}router but not {inner}router.neuron_perm, so the order of "
            "its neurons is unknown; load a whole converted or a stock checkpoint"
        )
    elif not _is_permutation(order, layer.intermediate_size):
        errors.append(
            f"{inner}router.neuron_perm has no values (converted on the meta device), so a stock "
            "checkpoint cannot be put in order; load it before converting"
        )
    else:
        for tensor in present:
            key = prefix + tensor.key
            value, neurons = state_dict.pop(key), tensor.copies * layer.shape.intermediate_size
            if value.ndim <= tensor.dim or value.shape[tensor.dim] != neurons:
                errors.append(
                    f"size mismatch for {key}: {tuple(value.shape)} in the checkpoint, the layer "
                    f"before conversion has {neurons} in dimension {tensor.dim}"
                )
                continue
            padded = tensor.resize(value, layer.intermediate_size)
            state_dict[key] = tensor.reorder(padded, order)


def _has_base_layers(layer: Any, prefix: str, state_dict: dict[str, Any]) -> bool:
    """Whether weights are there under the names that they have below an adapter's layers."""
    pairs = (tensor.key.rpartition(".") for tensor in layer.shape.tensors)
    return any(f"{prefix}{owner}.base_layer.{kind}" in state_dict for owner, _, kind in pairs)


def _follow(
    site: nn.Module, layer: Any, orders: dict[str, Tensor], prefix: str, errors: list[str]
) -> None:
    """Move the neurons that are here to where the router of an adapter expects them."""
    original, *copies = layer.routers()
    order = next(iter(orders.values()))
    if torch.equal(original.neuron_perm.cpu(), order.cpu()):
        return
    names = {id(m): f"{prefix}{n}.neuron_perm" for n, m in layer.router.named_modules()}
    if any(names[id(copy)] not in orders for copy in copies):
        errors.append(
            f"{next(iter(orders))} is another order of the neurons than that of the adapters which "
            "this model has; load it into a model of its own"
        )
    elif not _is_permutation(original.neuron_perm, len(order)):
        errors.append(f"{prefix}neuron_perm has no values: load the weights of the model first")
    else:
        place = original.neuron_perm.argsort()[order.to(original.neuron_perm.device)]
        permute_neurons(site, layer.shape.tensors, place)
        original.neuron_perm.copy_(order)


def _is_permutation(order: Tensor, neurons: int) -> bool:
    if order.is_meta or order.shape != (neurons,):
        return False
    return bool(torch.equal(order.long().sort().values, torch.arange(neurons, device=order.device)))
