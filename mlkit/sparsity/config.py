"""Settings of LTE (Learn-To-be-Efficient; Zheng et al. 2024, arXiv 2402.06126), without torch.

A default is marked *paper* (sections 4 and 5, appendix tables) or *ours*. The paper says nothing
about the routers' initial values, the bias, the epsilon of the separability loss, the grouping's
normalisation and padding; all of that is ours, and `docs/decisions/005-*.md` has what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlkit.errors import InvalidValueError, nearest

__all__ = ["LTEConfig"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh", "sigmoid")
MODES = ("dense", "soft", "hard")


@dataclass(frozen=True)
class LTEConfig:
    """What `mlkit.convert` does to the feed-forward layers of a model.

    Args:
        expert_size: S, neurons per expert; must divide the width of the layer. 32 (*paper*).
        threshold: tau; an expert runs if its score is above it. In (0, 1), 0.5 (*paper*).
        eta: Weight of the efficiency loss: the sparsity knob. 0..2 in the paper, 0.2 is *ours*.
        lam: Weight of the separability loss once the schedule is done. 0.5 (*paper*).
        lam_schedule: Fractions of stage 1 with lambda zero and with a linear ramp to `lam`; (0, 0),
            a constant lambda (*paper*).
        sep_eps: epsilon in 1 / ((G - tau)^2 + epsilon); 0.25, *ours*. The loss is singular without
            it, and with a small one no score ever crosses tau, so that the initial values decide
            the sparsity and not eta.
        target_sparsity: Fraction of neurons to skip, reached by `SparsityController`; None leaves
            eta as it is. *Ours*.
        router: "sigmoid" (*paper*: one score per expert), or "topp" (*ours*: a softmax, of which
            the smallest set of experts with cumulative mass `top_p` runs).
        top_p: For router="topp"; in (0, 1]. 0.9, *ours*.
        router_init: "centroid" (*ours*): the rows begin as the directions of the experts' mean
            neurons, those that the grouping clusters; "random": those of `nn.Linear`.
        router_scale: Length of the rows under "centroid"; 3, *ours*: the standard deviation of the
            logits where the layer's input is normalised.
        router_bias: Initial bias, None for no bias; the paper's equation has none, 0.5 is *ours*.
            `SparsityControl` shifts it once to begin at the target.
        min_experts: Experts that run for every token whatever the scores say. 0 (*paper*).
        grouping: "kmeans" (*paper*), "random" (its ablation) or "none" (neurons as they stand).
        assign: Assignment step of the k-means, see `balanced_kmeans`; "greedy" is *ours*.
        normalize: Whether the k-means divides rows by their norm; *ours*, after MoEfication.
        seed: Keys the grouping and the routers' initial values.
        layer_weighting: "uniform": 1/(L N_l) per layer (*paper*, for equal layers); "flops": by the
            layer's share of the FLOPs (*ours*).
        layers: Which feed-forward layers to convert, by number in the order of the model, from 0 as
            in the names of its blocks; a negative number counts from the end. One that is shared by
            several blocks counts once. None converts all. *Ours*.
        pad_to_multiple: Add neurons with zero weights to a layer whose width `expert_size` does not
            divide; they compute zero and stay zero, and `mlkit.restore` takes them away. *Ours*.
        projections: Names of the linear layers in a feed-forward class that mlkit does not know:
            (gate, up, down), or (up, down) without gate.
        activation: Of `projections` or of the constructor form; None tries what reproduces the
            module's output.
        mode: Forward mode after conversion, see `set_lte_mode`. "soft": stage 1 can begin.
        debug: Raise on a NaN score; otherwise that expert is off, and counted.

    Raises:
        InvalidValueError: For a value out of range; the message names the field.

    Example:
        >>> LTEConfig(target_sparsity=0.8).lambda_at(0.65)
        0.5
        >>> LTEConfig.paper_literal().router_init
        'random'
    """

    expert_size: int = 32
    threshold: float = 0.5
    eta: float = 0.2
    lam: float = 0.5
    lam_schedule: Sequence[float] = (0.0, 0.0)
    sep_eps: float = 0.25
    target_sparsity: float | None = None
    router: Literal["sigmoid", "topp"] = "sigmoid"
    top_p: float = 0.9
    router_init: Literal["centroid", "random"] = "centroid"
    router_scale: float = 3.0
    router_bias: float | None = 0.5
    min_experts: int = 0
    grouping: Literal["kmeans", "random", "none"] = "kmeans"
    assign: Literal["greedy", "exact"] = "greedy"
    normalize: bool = True
    seed: int = 0
    layer_weighting: Literal["uniform", "flops"] = "uniform"
    layers: Sequence[int] | None = None
    pad_to_multiple: bool = False
    projections: Sequence[str] | None = None
    activation: str | None = None
    mode: Literal["dense", "soft", "hard"] = "soft"
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("expert_size", "min_experts", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidValueError(f"{name} must be an integer, got {value!r}")
        if self.expert_size < 1:
            raise InvalidValueError(f"expert_size must be at least 1, got {self.expert_size}")
        if self.min_experts < 0:
            raise InvalidValueError(f"min_experts must be at least 0, got {self.min_experts}")
        self._check_ranges()
        for name, allowed in (
            ("router", ("sigmoid", "topp")),
            ("router_init", ("centroid", "random")),
            ("grouping", ("kmeans", "random", "none")),
            ("assign", ("greedy", "exact")),
            ("layer_weighting", ("uniform", "flops")),
            ("mode", MODES),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidValueError(
                    f"{name} must be one of {allowed}, got {getattr(self, name)!r}"
                )
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise InvalidValueError(
                f"activation {self.activation!r} is unknown; "
                f"{nearest(self.activation, ACTIVATIONS)}"
            )
        if not isinstance(self.pad_to_multiple, bool):
            raise InvalidValueError(
                f"pad_to_multiple must be True or False, got {self.pad_to_multiple!r}; the "
                "multiple is that of expert_size"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", _numbers(self.layers))
        if self.projections is not None:
            object.__setattr__(self, "projections", _names(self.projections))

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("threshold", 0, 1),
            ("sep_eps", 0, None),
            ("router_scale", 0, None),
        ):
            value = _number(name, getattr(self, name))
            if not (value > low and (high is None or value < high)):
                allowed = f"in ({low}, {high})" if high is not None else f"above {low}"
                raise InvalidValueError(f"{name} must be {allowed}, got {value}")
        for name in ("eta", "lam"):
            if _number(name, getattr(self, name)) < 0:
                raise InvalidValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < _number("top_p", self.top_p) <= 1:
            raise InvalidValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.router_bias is not None:
            _number("router_bias", self.router_bias)
        if self.target_sparsity is not None:
            target = _number("target_sparsity", self.target_sparsity)
            if not 0 < target < 1:
                raise InvalidValueError(
                    f"target_sparsity must be in (0, 1), got {target}: the fraction of neurons to "
                    "skip, 0.8 for 80 %"
                )
        try:
            zero, ramp = (float(f) for f in self.lam_schedule)
        except (TypeError, ValueError):
            zero = ramp = -1.0
        if min(zero, ramp) < 0 or zero + ramp > 1:
            raise InvalidValueError(
                "lam_schedule must be two fractions with a sum of at most 1 (lambda zero, then its "
                f"ramp), got {self.lam_schedule!r}"
            )
        object.__setattr__(self, "lam_schedule", (zero, ramp))

    def lambda_at(self, progress: float) -> float:
        """Weight of the separability loss at a fraction of stage 1."""
        zero, ramp = self.lam_schedule
        if progress < zero:
            return 0.0
        return self.lam if ramp == 0 else self.lam * min(1.0, round((progress - zero) / ramp, 12))

    @classmethod
    def paper_literal(cls, **changes: Any) -> LTEConfig:
        """Return the paper's equations without our devices: random rows, no bias, tiny epsilon.

        It needs steps with non-finite gradients to be skipped.
        """
        literal: dict[str, Any] = {
            "router_init": "random",
            "router_bias": None,
            "sep_eps": 1e-6,
        }
        return cls(**(literal | changes))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _numbers(layers: Sequence[int]) -> tuple[int, ...]:
    try:
        numbers = () if isinstance(layers, str) else tuple(layers)
    except TypeError:
        numbers = ()
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise InvalidValueError(
            f"layers must be one or more integers, as in (0, 1, -1) or range(6), got {layers!r}"
        )
    return numbers


def _names(projections: Sequence[str]) -> tuple[str, ...]:
    names = () if isinstance(projections, str) else tuple(projections)
    if len(names) not in (2, 3) or not all(isinstance(n, str) and n for n in names):
        raise InvalidValueError(
            "projections must name the linear layers as (gate, up, down) or (up, down), "
            f"got {projections!r}"
        )
    if len(set(names)) < len(names):
        raise InvalidValueError(f"projections must differ, got {projections!r}")
    return names
