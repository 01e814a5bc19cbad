"""`pack_for_inference` and `unpack`: LTE layers from the layout for training to that for serving.

Layer by layer, so that at most one of them is there twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mlkit.convert import _TAG
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError, nearest
from mlkit.sparsity.blocks import pack_pieces, pieces_of
from mlkit.sparsity.break_even import measure_break_even
from mlkit.sparsity.module import SparseExpertMLP, lte_layers, site_of
from mlkit.sparsity.packed import PackedExpertMLP
from mlkit_kernels.sparse_mlp import ACTIVATIONS, available_backends

__all__ = ["PackReport", "PackRow", "pack_for_inference", "unpack"]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "dense", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class PackRow:
    """A layer that was packed.

    Args:
        name: In the model.
        experts: N.
        expert_size: S.
        hidden_size: H.
        dtype: Of the packed weights.
        nbytes: Of the packed weights, router included.
        mode: The mode that the layer was in.
        dense_above: For backend="auto" on a CPU: number of tokens to the fraction of selected
            experts above which a dense GEMM runs, see `measure_break_even`.
    """

    name: str
    experts: int
    expert_size: int
    hidden_size: int
    dtype: torch.dtype
    nbytes: int
    mode: str
    dense_above: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PackReport:
    """What `pack_for_inference` did; prints as a table.

    Its last column: above which share of experts a dense GEMM runs (for how many tokens).
    """

    backend: str
    rows: tuple[PackRow, ...]

    def __str__(self) -> str:
        head = ("layer", "experts", "hidden", "type", "bytes", "mode before", "dense above")
        lines: list[tuple[str, ...]] = [head]
        for r in self.rows:
            kind = str(r.dtype).removeprefix("torch.")
            size = f"{r.experts}x{r.expert_size}"
            above = ", ".join(f"{f:.0%} ({t})" for t, f in r.dense_above.items())
            lines.append((r.name, size, str(r.hidden_size), kind, f"{r.nbytes:,}", r.mode, above))
        lines.append((f"{len(self.rows)} packed, backend {self.backend!r}", *[""] * 6))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


@dataclass(frozen=True)
class _Plan:
    """A layer that can be packed."""

    name: str
    site: nn.Module
    layer: SparseExpertMLP
    activation: str
    dtype: torch.dtype


def pack_for_inference(
    model: nn.Module, *, backend: str = "auto", dtype: torch.dtype | None = None
) -> PackReport:
    """Put every LTE layer of a model into the form for serving, in place.

    The layers then run in hard mode, whatever mode they were in, and the model is in eval mode.
    What a token does not select is not read. Weights are moved, one layer after another: memory
    does not double.

    Args:
        model: Changed in place. It must hold the layers; it cannot be one itself.
        backend: "auto": in each call what is fastest for what its tokens selected, as measured
            here (some tenths of a second, see `measure_break_even`); or one of the kernel's:
            "cpp", "triton", "dense", "reference".
        dtype: Of the packed weights (not of the routers); None leaves it.

    Returns:
        What was packed.

    Raises:
        RunError: If there is no LTE layer, one is packed already, or the backend cannot run here.
        InvalidValueError: If a layer cannot be packed; nothing has changed then.
    """
    if backend not in BACKENDS:
        raise InvalidValueError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; "
            f"{nearest(str(backend), BACKENDS)}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise InvalidValueError(f"dtype must be one of {DTYPES} or None, got {dtype}")
    packed = [n for n, m in model.named_modules() if isinstance(m, PackedExpertMLP)]
    if packed:
        raise RunError(f"{packed[0]!r} is packed already; mlkit.sparsity.unpack(model) first")
    plans = [_plan(model, name, layer, dtype) for name, layer in lte_layers(model).items()]
    _check_backend(plans, backend)
    model.eval()
    rows = []
    for plan in plans:
        made = _pack(plan, backend)
        layer = plan.layer
        rows.append(
            PackRow(
                plan.name, layer.num_experts, layer.expert_size, layer.hidden_size, plan.dtype,
                sum(p.numel() * p.element_size() for p in made.parameters()), layer.mode,
            )
        )  # fmt: skip
        _replace(model, layer, made)
    above = measure_break_even(model)
    rows = [replace(row, dense_above=above.get(row.name, {})) for row in rows]
    changed = sorted({row.mode for row in rows} - {"hard"})
    if changed:
        logger.info("packed layers run in hard mode; they were in %s mode", " and ".join(changed))
    return PackReport(backend, tuple(rows))


def unpack(model: nn.Module) -> list[str]:
    """Put the layers for training back in place of the packed ones.

    Weights come back bit for bit, unless they were packed in another type; threshold and
    statistics are those of the packed layers.

    Returns:
        Names of the layers.

    Raises:
        RunError: If no layer is packed.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, PackedExpertMLP)}
    if not found:
        raise RunError(f"no layer of {type(model).__name__} is packed: there is nothing to undo")
    for name, packed in found.items():
        layer = packed.layer
        site = site_of(model, name, layer)
        if layer.layout.host:
            _set(site, layer.layout.out_proj, packed.__dict__.pop("_out_proj"))
        _replace(model, packed, layer)
        _fill(site, packed)
        layer.is_packed = False
    return list(found)


# ------------------------------------------------------------------------ checks


def _plan(model: nn.Module, name: str, layer: SparseExpertMLP, dtype: torch.dtype | None) -> _Plan:
    if name == "":
        raise InvalidValueError(
            "the model itself is an LTE layer, which cannot be replaced in place; wrap it "
            "(nn.Sequential(model))"
        )
    layout = layer.layout
    site = site_of(model, name, layer)
    if layer.shape.out_size != layer.hidden_size:
        raise InvalidValueError(
            f"{name!r} maps {layer.hidden_size} channels to {layer.shape.out_size}; only layers "
            "with as many outputs as inputs can be packed"
        )
    for part in filter(None, (layout.gate_proj, layout.in_proj, layout.out_proj)):
        module = site.get_submodule(part)
        if hasattr(module, "base_layer"):
            raise InvalidValueError(
                f"{part!r} of {name!r} is a {type(module).__name__}, with an adapter; merge it "
                "(model.merge_and_unload()) before pack_for_inference"
            )
    types = {piece.dtype for piece in pieces_of(site, layout)}
    tensors = [site.get_parameter(piece.key) for piece in pieces_of(site, layout)]
    if any(t.is_meta for t in tensors):
        raise InvalidValueError(f"{name!r} is on the meta device: load its weights first")
    if len(types) > 1 and dtype is None:
        names = ", ".join(sorted(map(str, types)))
        raise InvalidValueError(
            f"the weights of {name!r} are of several types ({names}); set dtype"
        )
    return _Plan(name, site, layer, _activation(name, layer), dtype or types.pop())


def _activation(name: str, layer: SparseExpertMLP) -> str:
    """Return the kernel's name for a layer's activation, found by its values."""
    x = torch.linspace(-12, 12, 4801, dtype=torch.float32)
    with torch.no_grad():
        try:
            expected = layer._activate(x)
        except RuntimeError:
            expected = x.new_full(x.shape, torch.nan)
        for known, function in ACTIVATIONS.items():
            # the same formula in another order of operations, at values up to 12 (relu2: 144)
            if torch.allclose(function(x), expected, rtol=1e-5, atol=1e-5):
                return known
    held = layer.layout.activation or type(layer.get_submodule(layer._act or "")).__name__
    raise InvalidValueError(
        f"the activation of {name!r}, {held}, is none of the kernel's: {', '.join(ACTIVATIONS)}"
    )


def _check_backend(plans: list[_Plan], backend: str) -> None:
    if backend in ("auto", "dense", "reference"):
        return
    device = next(plans[0].layer.router.parameters()).device
    if backend not in available_backends(device):
        hint = "a CUDA device and triton" if backend == "triton" else "CPU tensors and a compiler"
        raise RunError(
            f"backend={backend!r} cannot run here: it needs {hint}, the model is on {device}; "
            f"available: {', '.join(available_backends(device))}"
        )
    allowed = [torch.float32, torch.bfloat16]
    if backend == "triton":
        allowed.append(torch.float16)
    for plan in plans:
        if plan.dtype not in allowed:
            raise InvalidTypeError(
                f"backend={backend!r} takes weights of {', '.join(map(str, allowed))}; "
                f"{plan.name!r} has {plan.dtype}: set dtype"
            )


# ----------------------------------------------------------------------- weights


def _pack(plan: _Plan, backend: str) -> PackedExpertMLP:
    site, layer = plan.site, plan.layer
    pieces = pieces_of(site, layer.layout)
    tensors = pack_pieces(site, pieces, layer.num_experts, plan.dtype)
    out = site.get_submodule(layer.layout.out_proj)
    packed = PackedExpertMLP(
        layer, pieces, tensors, out._parameters["bias"], activation=plan.activation, backend=backend
    )
    for piece in pieces:
        parameter = site.get_parameter(piece.key)
        parameter.data = parameter.data.new_empty(0)
        parameter.grad = None
    layer.is_packed = True
    if layer.layout.host:
        packed.__dict__["_out_proj"] = out
        _set(site, layer.layout.out_proj, nn.Identity())
    return packed


def _fill(site: nn.Module, packed: PackedExpertMLP) -> None:
    """Give the layer for training its weights back, and take them from the packed one."""
    values = packed.training_tensors()
    was_cast = packed.gate_up.dtype != packed.packed_dtype  # the whole model, since
    for piece in packed.pieces:
        parameter, value = site.get_parameter(piece.key), values.pop(piece.key)
        parameter.data = value if was_cast else value.to(piece.dtype)
    packed._parameters.clear()


# ----------------------------------------------------------------------- modules


def _set(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, key = path.rpartition(".")
    module.get_submodule(parent)._modules[key] = child


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in place of another, wherever it is."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is old:
                module._modules[key] = new
    tag = old.__dict__.get(_TAG)
    if tag is not None:
        new.__dict__[_TAG] = tag
