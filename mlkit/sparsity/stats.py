"""What the LTE layers of a model do: sparsity per layer, losses, FLOPs; and the switches for it.

FLOPs are counted as in the paper (Zheng et al. 2024, arXiv 2402.06126, table 1): linear layers of
the blocks only, without head, embedding and attention scores, 2 per multiply-add, in units of 2^30.
LLaMA-7B has 4.00 for attention and 8.06 for feed-forward layers, 12.06 in all; with sparsity s it
is 4.00 + 8.06 (1 - s) + 0.08 for the routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity.module import PACKED_LAYER as _LAYER
from mlkit.sparsity.module import SparseExpertMLP, lte_layers
from mlkit.sparsity.router import Router

__all__ = [
    "LTEFlops",
    "LTEStats",
    "LayerStats",
    "StatsWindow",
    "freeze_routers",
    "lte_flops",
    "lte_stats",
    "reset_lte_stats",
    "set_lte_mode",
    "set_lte_threshold",
    "set_lte_weights",
]

GIGA = 2**30


@dataclass(frozen=True)
class LayerStats:
    """Means over the tokens that a layer has seen.

    Args:
        sparsity: Fraction of experts that did not run (or would not, in soft mode).
        eff: Efficiency loss.
        sep: Separability loss; its floor, at scores of 0 and 1, is 1 / (0.25 + sep_eps).
        undecided: Fraction of scores within 0.1 of the threshold.
        tokens: Number of valid tokens.
        nan: Number of NaN scores.
        flops: Of all its experts per token: its weight in means over layers.
        router_flops: Of its router.
    """

    sparsity: float
    eff: float
    sep: float
    undecided: float
    tokens: int
    nan: int
    flops: int
    router_flops: int


@dataclass(frozen=True)
class LTEStats:
    """Statistics by layer, with means weighted by the layers' FLOPs."""

    layers: Mapping[str, LayerStats]

    def _mean(self, name: str) -> float:
        total = sum(layer.flops for layer in self.layers.values())
        return sum(getattr(s, name) * s.flops for s in self.layers.values()) / total

    @property
    def sparsity(self) -> float:
        """Fraction of the feed-forward FLOPs that is skipped (FFN sparsity, not model sparsity)."""
        return self._mean("sparsity")

    @property
    def eff(self) -> float:
        """Efficiency loss."""
        return self._mean("eff")

    @property
    def sep(self) -> float:
        """Separability loss."""
        return self._mean("sep")

    @property
    def undecided(self) -> float:
        """Fraction of scores within 0.1 of the threshold."""
        return self._mean("undecided")

    @property
    def tokens(self) -> int:
        """Most tokens that a layer has seen."""
        return max(layer.tokens for layer in self.layers.values())

    @property
    def nan(self) -> int:
        """Number of NaN scores."""
        return sum(layer.nan for layer in self.layers.values())

    def __str__(self) -> str:
        width = max(len("all"), *(len(name) for name in self.layers))
        lines = [f"{'layer':{width}}  sparsity    eff     sep  undecided"]
        rows: list[tuple[str, Any]] = [*self.layers.items(), ("all", self)]
        lines += [
            f"{name:{width}}  {row.sparsity:8.3f}  {row.eff:5.3f}  {row.sep:6.2f}  "
            f"{row.undecided:9.3f}"
            for name, row in rows
        ]
        return "\n".join(lines)


def lte_stats(model: nn.Module, *, reset: bool = False, sync: bool = False) -> LTEStats:
    """Return what the layers did since the last reset; dense mode counts nothing.

    A forward pass that activation checkpointing repeats is counted once.

    Args:
        model: Has LTE layers.
        reset: Begin anew afterwards.
        sync: Sum over the ranks of the default process group; call it on every rank.

    Raises:
        RunError: If there is no LTE layer, or none has seen a token.
    """
    stats = _read(model, sync, {})
    if reset:
        reset_lte_stats(model)
    return stats


class StatsWindow:
    """Statistics since the last look, for readers that must not reset each other's counts.

    Args:
        model: Has LTE layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, Tensor] = {}
        self.skip()

    def skip(self) -> None:
        """Begin the window here."""
        self._before = {n: m.counts.sums.clone() for n, m in lte_layers(self._model).items()}

    def take(self, *, sync: bool = False) -> LTEStats:
        """Return the statistics since the last call, and begin a new window."""
        stats = _read(self._model, sync, self._before)
        self.skip()
        return stats


def _read(model: nn.Module, sync: bool, before: Mapping[str, Tensor]) -> LTEStats:
    layers = {}
    for name, layer in lte_layers(model).items():
        sums = layer.counts.sums
        if name in before:
            sums = sums - before[name].to(sums.device, sums.dtype)
        if sync and dist.is_available() and dist.is_initialized():
            sums = sums.clone()
            dist.all_reduce(sums)
        count = layer.counts.values(sums)
        tokens = count["tokens"]
        if tokens == 0:
            hint = "; a packed layer counts after count_experts(model)" if layer.is_packed else ""
            raise RunError(
                f"layer {name!r} has seen no token in soft or hard mode since the last reset; run "
                f"the model first{hint}"
            )
        layers[name] = LayerStats(
            sparsity=1 - count["active"] / (tokens * layer.num_experts),
            eff=count["eff"] / tokens,
            sep=count["sep"] / tokens,
            undecided=count["near"] / tokens,
            tokens=int(tokens),
            nan=int(count["nan"]),
            flops=layer.expert_flops,
            router_flops=layer.router_flops,
        )
    return LTEStats(layers)


def reset_lte_stats(model: nn.Module) -> None:
    """Begin to count anew."""
    for layer in lte_layers(model).values():
        layer.counts.reset()


# ------------------------------------------------------------------------ FLOPs


@dataclass(frozen=True)
class LTEFlops:
    """FLOPs per token of the blocks that hold LTE layers.

    Args:
        ffn: Linear layers of the dense feed-forward layers.
        other: Other linear layers of the same blocks (attention).
        router: The routers.
        skipped: The part of `ffn` that is not computed; below 0 if padding costs more.

    Example:
        >>> LTEFlops(ffn=100, other=50, router=1, skipped=80).speedup
        2.112676056338028
    """

    ffn: int
    other: int
    router: int
    skipped: float = 0.0

    @property
    def dense(self) -> int:
        """FLOPs of the stock model."""
        return self.ffn + self.other

    @property
    def sparse(self) -> float:
        """FLOPs with the skipped experts, routers included."""
        return self.ffn + self.other + self.router - self.skipped

    @property
    def speedup(self) -> float:
        """Ratio of the two."""
        return self.dense / self.sparse

    @property
    def model_sparsity(self) -> float:
        """Fraction of the blocks' weights that is skipped."""
        return self.skipped / self.dense


def lte_flops(model: nn.Module, sparsity: float | LTEStats) -> LTEFlops:
    """Count the FLOPs per token of a model with LTE layers, as in the paper's table 1.

    Adapters on linear layers count as merged.

    Args:
        model: May be on the meta device. Its blocks are the elements of the innermost
            `nn.ModuleList` or `nn.Sequential` around each LTE layer; without one, all of it.
        sparsity: FFN sparsity, or what `lte_stats` measured.
    """
    layers = lte_layers(model)
    if isinstance(sparsity, LTEStats):
        by_layer = {name: stats.sparsity for name, stats in sparsity.layers.items()}
    else:
        if not 0 <= sparsity <= 1:
            raise InvalidValueError(f"sparsity must be in [0, 1], got {sparsity}")
        by_layer = dict.fromkeys(layers, float(sparsity))
    ffn = sum(layer.dense_flops for layer in layers.values())
    router = sum(layer.router_flops for layer in layers.values())
    skipped = sum(
        layer.dense_flops - layer.expert_flops * (1 - by_layer[name])
        for name, layer in layers.items()
    )
    all_experts = sum(layer.expert_flops for layer in layers.values())
    linear = {}
    for block in {id(b): b for b in (_block(model, name) for name in layers)}.values():
        adapters = _adapter_parts(block)
        for module in block.modules():
            weight = getattr(module, "weight", None)
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            is_bare = isinstance(module, SparseExpertMLP) and weight is not None
            if isinstance(module, Router) or id(module) in adapters:
                continue
            if (is_linear or is_bare) and weight is not None:
                linear[id(weight)] = 2 * weight.numel()
            if _LAYER in module.__dict__:  # packed
                linear[id(module)] = module.__dict__[_LAYER].expert_flops
    return LTEFlops(ffn, sum(linear.values()) - all_experts, router, skipped)


def _adapter_parts(block: nn.Module) -> set[int]:
    """Modules of adapters (LoRA's A and B), which cost nothing once they are merged."""
    return {
        id(part)
        for module in block.modules()
        if "base_layer" in module._modules
        for name, child in module.named_children()
        if name != "base_layer"
        for part in child.modules()
    }


def _block(model: nn.Module, name: str) -> nn.Module:
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList | nn.Sequential):
            return model.get_submodule(".".join(parts[: end + 1]))
    return model


# --------------------------------------------------------------------- switches


def set_lte_mode(model: nn.Module, mode: str) -> None:
    """Put every LTE layer into "dense", "soft" (stage 1) or "hard" (stage 2, inference) mode."""
    for layer in lte_layers(model).values():
        layer.set_mode(mode)


def set_lte_threshold(model: nn.Module, threshold: float) -> None:
    """Set tau of the hard mode in [0, 1]: the sparsity knob at serving time (sigmoid router)."""
    for layer in lte_layers(model).values():
        layer.set_threshold(threshold)


def set_lte_weights(model: nn.Module, eta: float | None = None, lam: float | None = None) -> None:
    """Set the weights of the efficiency and the separability loss; None leaves one as it is."""
    for group in {id(layer.group): layer.group for layer in lte_layers(model).values()}.values():
        group.set_weights(eta, lam)


def freeze_routers(model: nn.Module, frozen: bool = True) -> None:
    """Stop (or resume) the training of the routers: stage 2 adapts the model to hard routing."""
    for layer in lte_layers(model).values():
        for router in layer.routers():
            router.requires_grad_(not frozen and router is layer.routing)
