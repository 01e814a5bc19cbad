"""Which modules are feed-forward layers: a registry of adapters, and the layers of a user's own.

An adapter is a function from a module to its `FFNLayout`, registered for the class or for the
class's name. `LTEConfig(projections=...)` covers one's own class without any registration.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mlkit.errors import InvalidTypeError
from mlkit.sparsity.config import ACTIVATIONS, LTEConfig
from mlkit.sparsity.layout import FFNLayout
from mlkit.sparsity.module import SparseExpertMLP

__all__ = ["find_layouts", "register_ffn_adapter"]

Adapter = Callable[[nn.Module], FFNLayout | str | None]

_ADAPTERS: dict[type[nn.Module] | str, Adapter] = {}
_ACT_NAMES = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn")


def register_ffn_adapter(cls: type[nn.Module] | str, adapter: Adapter) -> None:
    """Say how a class of feed-forward layers is built.

    Args:
        cls: The class (subclasses count), or the name of it.
        adapter: Maps a module to its `FFNLayout`, to a string (the reason why it cannot be
            converted), or to None (it is no feed-forward layer).

    Example:
        >>> class Block(nn.Module):
        ...     pass
        >>> register_ffn_adapter(Block, lambda m: FFNLayout("w3", "w2", "w1", activation="silu"))
    """
    if not (isinstance(cls, str) or (isinstance(cls, type) and issubclass(cls, nn.Module))):
        raise InvalidTypeError(f"cls must be an nn.Module class or its name, got {cls!r}")
    if not callable(adapter):
        raise InvalidTypeError(f"adapter must map a module to an FFNLayout, got {adapter!r}")
    _ADAPTERS[cls] = adapter


def find_layouts(model: nn.Module, config: LTEConfig) -> Iterator[tuple[str, FFNLayout | str]]:
    """Yield the feed-forward layers of a model by name: the layout, or why it cannot be converted.

    Those that are converted already are among them, as the stock layers that they were; those made
    by the constructor of `SparseExpertMLP` are not. Nothing is looked for inside of what was found.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if any(parent == "" or name.startswith(parent + ".") for parent in found):
            continue
        layer = module.__dict__.get("_lte_layer", module)  # a packed one has the layer in it
        if isinstance(layer, SparseExpertMLP) and "_stock" not in layer.__dict__:
            found.append(name)
            continue
        layout = _layout(layer.__dict__.get("_stock", module), config)
        if layout is not None:
            found.append(name)
            yield name, layout


def _layout(module: nn.Module, config: LTEConfig) -> FFNLayout | str | None:
    if config.projections is not None:
        return _from_projections(module, config)
    for cls in type(module).__mro__:
        for key in (cls, cls.__name__):
            if key in _ADAPTERS:
                return _ADAPTERS[key](module)
    known: Adapter = importlib.import_module("mlkit.sparsity.transformers").known_layout
    return known(module)


def _from_projections(module: nn.Module, config: LTEConfig) -> FFNLayout | str | None:
    assert config.projections is not None
    if not all(_has(module, name) for name in config.projections):
        return None
    *gates, up, down = config.projections
    layout = FFNLayout(up, down, gates[0] if gates else None, activation=config.activation)
    if config.activation is not None:
        return layout
    for name in _ACT_NAMES:
        if isinstance(getattr(module, name, None), nn.Module):
            return FFNLayout(up, down, layout.gate_proj, act=name)
    return layout


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def reproduces(stock: nn.Module, new: nn.Module, hidden_size: int) -> bool:
    """Whether a new module in dense mode computes what the stock one does, on random input.

    In training mode, too, from the same random state: dropout must be where it was.
    """
    like = next(stock.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, hidden_size, generator=generator).to(like.device, like.dtype)
    modes = [(m, m.training) for m in (*stock.modules(), *new.modules())]
    devices = [] if like.device.type == "cpu" else [like.device]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=like.device.type):
            for training in (False, True):
                outputs = []
                for module in (stock, new):
                    torch.manual_seed(0)
                    outputs.append(module.train(training)(x))
                if not _is_near(*outputs):
                    return False
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        for module, training in modes:
            module.training = training
    return True


def _is_near(expected: Any, found: torch.Tensor) -> bool:
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    error = (expected - found).float().norm()
    # 64 roundings: the same sums in the same order, but perhaps by other kernels
    allowed = 64 * torch.finfo(found.dtype).eps * expected.float().norm()
    return bool(error <= allowed + 1e-12)


def variants(module: nn.Module, layout: FFNLayout) -> Iterator[FFNLayout]:
    """Yield what a layout may mean that leaves its activation or dropout open."""
    names: list[str | None] = [layout.activation]
    if layout.act is None and layout.activation is None:
        names = list(ACTIVATIONS)
    drops = [n for n, m in module.named_modules() if isinstance(m, nn.Dropout)]
    for name in names:
        yield replace(layout, activation=name)
        if layout.dropout is None:
            for drop in drops:
                yield replace(layout, activation=name, dropout=drop)
