"""How `mlkit.convert` and `mlkit.restore` turn feed-forward layers into LTE layers and back."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlkit.convert import Candidate, Cost, conversions
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity.config import LTEConfig
from mlkit.sparsity.context import MaskHook
from mlkit.sparsity.families import find_layouts, reproduces, variants
from mlkit.sparsity.grouping import balanced_kmeans, expert_permutation
from mlkit.sparsity.layout import (
    FFNLayout,
    FFNShape,
    inspect_layout,
    permute_neurons,
    reading_rows,
    resize_neurons,
)
from mlkit.sparsity.module import SparseExpertMLP, lte_layers
from mlkit.sparsity.stock import permute_stock_state
from mlkit.sparsity.width import why_not_divisible, why_not_padded

__all__ = ["LTEConverter", "link_lte_layers"]


class LTEConverter:
    """The `Converter` of `LTEConfig`."""

    def __init__(self) -> None:
        self._layouts: dict[int, FFNLayout] = {}

    def candidates(self, model: nn.Module, config: LTEConfig) -> list[Candidate]:
        """Every feed-forward layer; with the reason for those that will not be converted."""
        owners = _owners(model)
        found = []
        sites: dict[int, int] = {}
        done = conversions(model)
        layouts = list(find_layouts(model, config))
        asked = _asked(config.layers, [name for name, _ in layouts])
        for name, layout in layouts:
            site = model.get_submodule(name)
            if isinstance(layout, FFNLayout) and not isinstance(inspect_layout(site, layout), str):
                for parameter in _parameters(site, layout):
                    sites[id(parameter)] = sites.get(id(parameter), 0) + 1
            if name not in asked:
                left_out = f"not among the layers {config.layers}"
                found.append(Candidate(name, type(site).__name__, left_out=left_out))
                continue
            if name in done:
                continue
            checked = layout if isinstance(layout, str) else _check(site, layout, config)
            if isinstance(checked, FFNLayout):
                self._layouts[id(site)] = checked
            reason = checked if isinstance(checked, str) else None
            found.append(Candidate(name, type(site).__name__, reason))
        for number, candidate in enumerate(found):
            site = model.get_submodule(candidate.name)
            if id(site) in self._layouts and any(
                owners[id(p)] > 1 or sites[id(p)] > 1
                for p in _parameters(site, self._layouts[id(site)])
            ):
                reason = (
                    "its weights are shared with another layer, whose neurons would be moved too; "
                    "share the whole feed-forward module, or clone the weights"
                )
                found[number] = dataclasses.replace(candidate, refusal=reason)
        return found

    def build(
        self, model: nn.Module, names: Sequence[str], config: LTEConfig, *, structure_only: bool
    ) -> dict[str, nn.Module]:
        """Make the layers, group their neurons, and permute when nothing can fail any more."""
        new: dict[str, nn.Module] = {}
        made: list[tuple[nn.Module, SparseExpertMLP, Tensor | None]] = []
        for name in names:
            site = model.get_submodule(name)
            layout, seed = self._layouts[id(site)], zlib.crc32(name.encode())
            layer = _make(site, layout, config, seed, structure_only)
            order = None
            if not (structure_only or layer.neuron_perm.is_meta):
                order = _order(site, layer, seed)
            made.append((site, layer, order))
            new[_join(name, layout.host)] = layer
            if layer.has_outer_act:
                new[_join(name, layout.act)] = nn.Identity()
        for site, layer, order in made:
            if layer.padding:
                resize_neurons(site, layer.shape.tensors, layer.intermediate_size)
            if order is not None:
                permute_neurons(site, layer.shape.tensors, order)
                layer.neuron_perm.copy_(order)
                layer.reset_router(site)
            if layer.layout.host:
                site.register_load_state_dict_pre_hook(permute_stock_state)
        present = {n: m for n, m in model.named_modules() if isinstance(m, SparseExpertMLP)}
        layers = [*present.values(), *(layer for _, layer, _ in made)]
        _link(model, layers, [*present, *new])
        return new

    def restore(self, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
        """Put neurons back in stock order and hand out the stock modules."""
        new: dict[str, nn.Module] = {}
        sites = [(name, model.get_submodule(name)) for name in names]
        for name, site in sites:
            _check_plain(name, site, _layer(site))
        for name, site in sites:
            layer = _layer(site)
            if not layer.neuron_perm.is_meta:
                permute_neurons(site, layer.shape.tensors, layer.stock_order())
            if layer.padding:
                resize_neurons(site, layer.shape.tensors, layer.shape.intermediate_size)
            new[_join(name, layer.layout.host)] = layer.stock()
            if layer.has_outer_act:
                new[_join(name, layer.layout.act)] = layer.get_submodule("act")
            for key, hook in list(site._load_state_dict_pre_hooks.items()):
                if getattr(hook, "hook", None) is permute_stock_state:
                    del site._load_state_dict_pre_hooks[key]
        for module in model.modules():
            MaskHook.remove(module)
        return new

    def cost(self, site: nn.Module) -> Cost:
        """Parameters, bytes and FLOPs of the layer, with its router once it has one."""
        layer = _layer_or_none(site)
        if layer is not None:
            parameters = _parameters(site, layer.layout) + list(layer.routing.parameters())
            return _cost(parameters, layer.expert_flops + layer.router_flops)
        layout = self._layouts[id(site)]
        shape = inspect_layout(site, layout)
        assert isinstance(shape, FFNShape)
        width = (2 if layout.is_gated else 1) * shape.hidden_size + shape.out_size
        return _cost(_parameters(site, layout), 2 * shape.intermediate_size * width)


def link_lte_layers(model: nn.Module) -> None:
    """Let the LTE layers of a model that was built of `SparseExpertMLP` share losses and mask.

    The losses are means over all layers jointly, so each layer must know how many there are;
    `mlkit.convert` does this by itself. The model's forward pass hands its argument
    `attention_mask` to the layers from now on.
    """
    layers = lte_layers(model)
    _link(model, list(layers.values()), list(layers))


def _link(model: nn.Module, layers: list[SparseExpertMLP], names: list[str]) -> None:
    group = layers[0].group
    total = sum(layer.dense_flops for layer in layers)
    for layer in layers:
        layer.group = group
        is_uniform = layer.config.layer_weighting == "uniform"
        layer.loss_weight = 1 / len(layers) if is_uniform else layer.dense_flops / total
    for module in model.modules():
        MaskHook.remove(module)
    MaskHook.install(group, model, names)


def _asked(layers: Sequence[int] | None, names: list[str]) -> list[str]:
    if layers is None or not names:
        return names
    for number in layers:
        if not -len(names) <= number < len(names):
            raise InvalidValueError(
                f"layers holds {number}, but the model has {len(names)} feed-forward layers: "
                f"0 to {len(names) - 1}, or -{len(names)} to -1"
            )
    return [names[number] for number in layers]


def _join(name: str, part: str | None) -> str:
    return ".".join(filter(None, (name, part)))


def _layer_or_none(site: nn.Module) -> SparseExpertMLP | None:
    if isinstance(site, SparseExpertMLP):
        return site
    return next((m for m in site.children() if isinstance(m, SparseExpertMLP)), None)


def _layer(site: nn.Module) -> SparseExpertMLP:
    layer = _layer_or_none(site)
    if layer is None:  # a tagged site holds its layer, or the packed form of it
        raise RunError("the LTE layers are packed: mlkit.sparsity.unpack(model) first")
    return layer


def _owners(model: nn.Module) -> dict[int, int]:
    """Count the modules that hold each parameter."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _parameters(site: nn.Module, layout: FFNLayout) -> list[nn.Parameter]:
    """Parameters of the two or three linear layers."""
    found: list[nn.Parameter] = []
    for name in filter(None, (layout.gate_proj, layout.in_proj, layout.out_proj)):
        found += [p for p in site.get_submodule(name)._parameters.values() if p is not None]
    return found


def _cost(parameters: list[nn.Parameter], flops: int) -> Cost:
    count = sum(p.numel() for p in parameters)
    return Cost(count, sum(p.numel() * p.element_size() for p in parameters), flops)


def _check(site: nn.Module, layout: FFNLayout, config: LTEConfig) -> FFNLayout | str:
    """Return the layout with its activation found, or why this layer cannot be converted."""
    shape = inspect_layout(site, layout)
    if isinstance(shape, str):
        return shape
    if reason := why_not_divisible(shape, config):
        return reason
    found = _with_activation(site, layout, shape)
    if isinstance(found, str):
        return found
    act = None if found.act is None else site.get_submodule(found.act)
    return why_not_padded(shape, found, config, act) or found


def _with_activation(site: nn.Module, layout: FFNLayout, shape: FFNShape) -> FFNLayout | str:
    is_open = layout.act is None and layout.activation is None
    if layout.act is not None:
        act = site.get_submodule(layout.act)
        if layout.host and any(True for _ in act.parameters()):
            return f"its activation {type(act).__name__} has parameters, which would change names"
    if layout.host:
        no_act = f"FFNLayout of {type(site).__name__} has a host and needs act or activation"
        return no_act if is_open else layout
    if any(p.is_meta for p in site.parameters()):
        if is_open:
            return "its activation is unknown and cannot be tried on meta: set LTEConfig.activation"
        return layout
    whole = LTEConfig(expert_size=shape.intermediate_size, mode="dense")
    for variant in variants(site, layout):
        layer = SparseExpertMLP.wrap(site, variant, shape, whole, structure_only=True)
        if reproduces(site, layer, shape.hidden_size):
            return variant
    tried = " with any known activation" if is_open else ""
    return (
        f"{type(site).__name__} does not compute {_formula(layout)}{tried} (dropout may follow): "
        "tried on random input; check the order of the names, or see register_ffn_adapter"
    )


def _formula(layout: FFNLayout) -> str:
    gate, act = layout.gate_proj, layout.act or layout.activation or "act"
    inner = f"{act}({gate}(x)) * {layout.in_proj}(x)" if gate else f"{act}({layout.in_proj}(x))"
    return f"{layout.out_proj}({inner})"


def _make(
    site: nn.Module, layout: FFNLayout, config: LTEConfig, seed: int, structure_only: bool
) -> SparseExpertMLP:
    shape = inspect_layout(site, layout)
    assert isinstance(shape, FFNShape)
    stock = site.get_submodule(layout.host)
    is_outer = bool(layout.host and layout.act) and not str(layout.act).startswith(
        f"{layout.host}."
    )
    act = site.get_submodule(layout.act) if is_outer and layout.act else None
    return SparseExpertMLP.wrap(
        stock, layout, shape, config, seed=seed, act=act, structure_only=structure_only
    )


def _order(site: nn.Module, layer: SparseExpertMLP, seed: int) -> Tensor:
    """Return the order of neurons in which experts are contiguous."""
    config = layer.config
    if config.grouping == "none":
        return torch.arange(layer.intermediate_size)
    if config.grouping == "random":
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + seed)
        return torch.randperm(layer.intermediate_size, generator=generator)
    rows = reading_rows(site, layer.layout, layer.shape.tensors, layer.shape.intermediate_size)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, layer.padding))
    expert = balanced_kmeans(
        rows,
        config.expert_size,
        seed=config.seed,
        assign=config.assign,
        normalize=config.normalize,
    )
    return expert_permutation(expert)


def _check_plain(name: str, site: nn.Module, layer: SparseExpertMLP) -> None:
    layout = layer.layout
    for part in filter(None, (layout.gate_proj, layout.in_proj, layout.out_proj)):
        if hasattr(site.get_submodule(part), "base_layer"):
            raise RunError(
                f"{_join(name, part)} is a {type(site.get_submodule(part)).__name__}, with an "
                "adapter in the order of the experts; merge it (model.merge_and_unload()) before "
                "mlkit.restore"
            )
    if "_stock" not in layer.__dict__:
        raise InvalidValueError(f"{name!r} was made by its constructor: there is no stock module")
