"""What methods share that make a trained dense model sparse without training it.

They look at the intermediate values of a model with LTE layers in dense mode, by hooks on its stock
linear layers: for comparisons of quality, not for speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity.context import LTEGroup, MaskHook
from mlkit.sparsity.module import SparseExpertMLP, lte_layers, site_of

__all__ = ["PostHocSparsity", "Site"]


class Site:
    """A feed-forward layer, its stock linear layers, and what is counted of it.

    Args:
        model: Holds the layer.
        name: Of the layer.
        layer: In dense mode.
    """

    def __init__(self, model: nn.Module, name: str, layer: SparseExpertMLP) -> None:
        parts, self.layer = site_of(model, name, layer), layer
        layout = layer.layout
        names = [n for n in (layout.gate_proj, layout.in_proj) if n is not None]
        self.readers = [parts.get_submodule(n) for n in names]
        self.out_proj = parts.get_submodule(layout.out_proj)
        self.input_flops = layer.expert_flops - 2 * layer.intermediate_size * layer.shape.out_size
        tensor = next(t for t in layer.shape.tensors if t.key == f"{layout.out_proj}.weight")
        weight = parts.get_parameter(tensor.key).detach().float()
        self.out_norms = weight.norm(dim=1 - tensor.dim)
        self.skipped = torch.zeros(
            2, dtype=torch.float64
        )  # share of input, of inner values; summed
        self.tokens = 0


class PostHocSparsity(ABC):
    """Hooks on all feed-forward layers, which leave values out and count how many.

    Use it as a context, or `close` it: the model is then as it was.

    Args:
        model: Its LTE layers are in dense mode.

    Raises:
        InvalidValueError: If one is not.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = lte_layers(model)
        other = [name for name, layer in layers.items() if layer.mode != "dense"]
        if other:
            raise InvalidValueError(
                f"{other[0]!r} is in {layers[other[0]].mode} mode; a dense model is made sparse "
                'here: set_lte_mode(model, "dense") first'
            )
        self.sites = [Site(model, name, layer) for name, layer in layers.items()]
        self._group = LTEGroup(0.0, 0.0)
        self._handles = MaskHook.install(self._group, model, layers)
        for site in self.sites:
            for reader in site.readers:
                first = reader is site.readers[0]
                self._hook(reader, site, self.filter_input, counts=first)
            self._hook(site.out_proj, site, self.filter_inner, counts=True)

    def fit(self, sparsity: float, loss: Callable[[], float]) -> float:
        """Settle what is left out for a sparsity, and return the loss with it.

        Args:
            sparsity: Wanted fraction of the feed-forward FLOPs to leave out, in (0, 1).
            loss: Runs the model over calibration data and returns the loss to be low.

        Raises:
            InvalidValueError: If the sparsity is out of range.
        """
        if not 0 < sparsity < 1:
            raise InvalidValueError(f"sparsity must be in (0, 1), got {sparsity}")
        with torch.no_grad():
            return self.settle(sparsity, loss)

    @abstractmethod
    def settle(self, sparsity: float, loss: Callable[[], float]) -> float:
        """Do what `fit` says, for a sparsity in range and without gradients."""

    def filter_input(
        self, site: Site, x: Float[Tensor, "*tokens hidden"]
    ) -> Bool[Tensor, "*tokens hidden"] | None:
        """Say which inputs of a layer are kept; None keeps all."""
        return None

    def filter_inner(
        self, site: Site, h: Float[Tensor, "*tokens inner"]
    ) -> Bool[Tensor, "*tokens inner"] | None:
        """Say which values before the output projection are kept; None keeps all."""
        return None

    def _hook(self, module: nn.Module, site: Site, choose: Any, *, counts: bool) -> None:
        number = 0 if module in site.readers else 1

        def apply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            values = args[0]
            kept = choose(site, values)
            if counts:
                valid = self._valid(values)
                tokens = values[..., 0].numel() if valid is None else int(valid.sum())
                site.tokens += tokens if number == 1 else 0
                if kept is not None:
                    share = (~kept).double().mean(-1)
                    share = share if valid is None else share[valid]
                    site.skipped[number] += share.sum().cpu()
            return None if kept is None else (torch.where(kept, values, 0.0), *args[1:])

        self._handles.append(module.register_forward_pre_hook(apply))

    def _valid(self, values: Tensor) -> Tensor | None:
        mask = self._group.token_mask()
        return None if mask is None else mask.of(values, training=False)

    def reset(self) -> None:
        """Begin to count anew."""
        for site in self.sites:
            site.skipped.zero_()
            site.tokens = 0

    def layer_sparsity(self) -> list[float]:
        """Fraction of each layer's FLOPs that was left out since the last reset.

        Raises:
            RunError: If the model has not run.
        """
        if not all(site.tokens for site in self.sites):
            raise RunError("no token was seen since the last reset; run the model first")
        return [
            float(site.skipped[0] * site.input_flops + site.skipped[1] * self._inner_flops(site))
            / (site.tokens * site.layer.expert_flops)
            for site in self.sites
        ]

    def _inner_flops(self, site: Site) -> int:
        """FLOPs that an inner value which is left out saves, times the number of inner values."""
        return site.layer.expert_flops - site.input_flops

    def sparsity(self) -> float:
        """Fraction of all feed-forward FLOPs that was left out since the last reset."""
        total = sum(site.layer.expert_flops for site in self.sites)
        pairs = zip(self.layer_sparsity(), self.sites, strict=True)
        return sum(share * site.layer.expert_flops for share, site in pairs) / total

    def measure(self, run: Callable[[], float]) -> tuple[float, float]:
        """Return what `run` gives, and the sparsity meanwhile."""
        self.reset()
        with torch.no_grad():
            value = run()
        return value, self.sparsity()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
