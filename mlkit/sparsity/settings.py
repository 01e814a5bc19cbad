"""The arguments of recipe `lte`, checked without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlkit.errors import InvalidValueError, nearest
from mlkit.sparsity.config import LTEConfig

__all__ = ["METHODS", "LTESettings"]

METHODS = {
    "dense": "the model as it is",
    "lte": "LTE in two stages",
    "magnitude": "TEAL's thresholds on the dense model",
    "moefication": "the best k experts of the dense model, known from all values",
    "random_router": "random routers that stay so; the model adapts to hard routing",
    "fixed_router": "routers that stay at the experts' centres; the model adapts to hard routing",
    "lte_literal": "LTE by the paper's equations as they are printed, LTEConfig.paper_literal",
    "lte_late": "LTE from random routers, nearly dense, without separability in the first half",
}
"""What can be compared. `fixed_router` is LTE without its training of the routers; the last two are
LTE with other settings, see decision 005."""

_PRESETS: dict[str, dict[str, Any]] = {
    "random_router": {"router_init": "random", "router_bias": 0.0},
    "lte_late": {
        "router_init": "random",
        "router_bias": 2.0,
        "sep_eps": 1e-3,
        "lam_schedule": (0.5, 0.3),
    },
}


@dataclass(kw_only=True)
class LTESettings:
    """Arguments `lte.*` of the recipe.

    Args:
        target_sparsity: Wanted FFN sparsities, each in (0, 1); one number is allowed.
        methods: Some of `METHODS`.
        config: Arguments of `LTEConfig` beside its target.
        num_seeds: Runs to average.
        start_steps: Optimizer steps of the dense model before any method; 0 where it is pretrained.
        start_lr: Learning rate of these.
        steps: Optimizer steps of every method after that: both stages of LTE, as many for the
            dense model that the methods without training act on.
        lr: Learning rate of these.
        stage1_fraction: Part of them that is LTE's stage 1.
        clip: Gradients are clipped to this norm.
        calibration_batches: Training batches that methods without training look at.
        decode: Sizes of the layer whose decode is timed: hidden_size, intermediate_size,
            expert_size, repeats.

    Raises:
        InvalidValueError: For a value out of range.

    Example:
        >>> LTESettings(target_sparsity=0.75).targets
        [0.75]
    """

    target_sparsity: float | Sequence[float]
    methods: Sequence[str] = ("dense", "lte", "magnitude", "moefication", "random_router")
    config: Mapping[str, Any] = field(default_factory=dict)
    num_seeds: int = 1
    start_steps: int = 0
    start_lr: float = 4e-3
    steps: int = 800
    lr: float = 2e-3
    stage1_fraction: float = 0.5
    clip: float = 1.0
    calibration_batches: int = 16
    decode: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise InvalidValueError(
                f"lte.target_sparsity must name each sparsity once, got {self.targets}"
            )
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise InvalidValueError(
                f"no lte.methods {unknown[0]!r}; {nearest(unknown[0], METHODS)}"
            )
        if "dense" not in self.methods or "lte" not in self.methods:
            raise InvalidValueError(
                f"lte.methods must have dense and lte to compare with, got {list(self.methods)}"
            )
        for key, least in (
            ("num_seeds", 1), ("start_steps", 0), ("steps", 2), ("calibration_batches", 1),
        ):  # fmt: skip
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidValueError(
                    f"lte.{key} must be an integer of at least {least}, got {value!r}"
                )
        for key in ("start_lr", "lr", "clip"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not value > 0:
                raise InvalidValueError(f"lte.{key} must be a number above 0, got {value!r}")
        fraction = self.stage1_fraction
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise InvalidValueError(f"lte.stage1_fraction must be in (0, 1), got {fraction!r}")
        for target in self.targets:
            self.lte_config("lte", target, 0)
        self.decode_sizes()

    @property
    def targets(self) -> list[float]:
        """The wanted sparsities as a list."""
        target = self.target_sparsity
        return list(target) if isinstance(target, Sequence) else [target]

    def lte_config(self, method: str, target: float, seed: int) -> LTEConfig:
        """Return the config of a method that routes.

        Raises:
            InvalidValueError: For an argument that `LTEConfig` does not have or allow.
        """
        arguments = {**self.config, "target_sparsity": target, "seed": seed}
        arguments |= _PRESETS.get(method, {})
        known = LTEConfig.__dataclass_fields__
        for name in arguments:
            if name not in known:
                raise InvalidValueError(f"no lte.config.{name}; {nearest(name, known)}")
        make = LTEConfig.paper_literal if method == "lte_literal" else LTEConfig
        return make(**arguments)

    def decode_sizes(self) -> dict[str, int]:
        """Return the sizes of the timed layer.

        Raises:
            InvalidValueError: For a size that is unknown, missing or not positive.
        """
        names = ("hidden_size", "intermediate_size", "expert_size", "repeats")
        sizes = {"hidden_size": 2048, "intermediate_size": 5632, "expert_size": 32, "repeats": 11}
        for name, value in self.decode.items():
            if name not in names:
                raise InvalidValueError(f"no lte.decode.{name}; {nearest(name, names)}")
            if not isinstance(value, int) or value < 1:
                raise InvalidValueError(f"lte.decode.{name} must be an integer above 0: {value!r}")
            sizes[name] = value
        if sizes["intermediate_size"] % sizes["expert_size"]:
            raise InvalidValueError(
                "lte.decode.expert_size must divide intermediate_size, got "
                f"{sizes['expert_size']} and {sizes['intermediate_size']}"
            )
        return sizes
