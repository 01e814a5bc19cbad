"""The arguments of recipe `fiited`, checked without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mlkit.embeddings.baselines.config import (
    CAFEConfig,
    HashingConfig,
    MDEConfig,
    NarrowConfig,
    QRConfig,
)
from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.memory import OPTIMIZER_STATE
from mlkit.errors import InvalidValueError, nearest

__all__ = ["METHODS", "FIITEDSettings"]

METHODS = {
    "dense": "the tables as they are",
    "fiited": "independent chunks",
    "fiited_prefix": "chunks in order: a dimension for each vector",
    "adaembed": "whole rows: FIITED with one chunk",
    "magnitude": "the norm of the values as utility: what is pruned never grows back",
    "narrow": "a smaller dimension for all",
    "hashing": "several ids share a row",
    "qr": "quotient and remainder tables",
    "mde": "a dimension for each table, by its size",
    "cafe": "rows of their own for hot ids, shared ones for cold ids",
}
"""What can be compared."""

_BASELINES: dict[str, Any] = {
    "narrow": NarrowConfig,
    "hashing": HashingConfig,
    "qr": QRConfig,
    "mde": MDEConfig,
    "cafe": CAFEConfig,
}
_CHUNKED = ("fiited", "fiited_prefix", "adaembed", "magnitude")


@dataclass(kw_only=True)
class FIITEDSettings:
    """Arguments `fiited.*` of the recipe.

    Args:
        byte_fractions: Budgets, each in (0, 1): everything that the tables take, as a fraction of
            the dense tables with the same optimizer; one number is allowed.
        methods: Some of `METHODS`; "dense" is always there.
        num_seeds: Runs to average; a seed draws the initial values, and the stream if it is
            generated.
        optimizer: Of the tables: "rowwise_adagrad", "adagrad" or "sgd".
        table_lr: Learning rate of the tables by method; "default" for the others.
        max_steps: Steps of a fit at most; None for one pass over the training part.
        min_rows: Tables with fewer rows stay as they are, with every method; the budget is that of
            the others.
        config: Arguments of `FIITEDConfig` beside its budget, optimizer and learning rate.
        baselines: Arguments of the other methods' configs, by method.
        memory_steps: Steps of the processes whose peak memory is measured.
        memory_scale: How many times the rows of the data's tables theirs have: small tables vanish
            beside what is imported.
        window: Steps of a window of forecasts, whose AUC is drawn over time.

    Raises:
        InvalidValueError: For a value out of range.

    Example:
        >>> FIITEDSettings(byte_fractions=0.35).fractions
        [0.35]
    """

    byte_fractions: float | Sequence[float]
    methods: Sequence[str] = tuple(m for m in METHODS if m != "magnitude")
    num_seeds: int = 1
    optimizer: str = "rowwise_adagrad"
    table_lr: Mapping[str, float] = field(default_factory=lambda: {"default": 0.05})
    max_steps: int | None = None
    min_rows: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory_steps: int = 8
    memory_scale: int = 1
    window: int = 100

    def __post_init__(self) -> None:
        fractions = self.fractions
        if not fractions or not all(0 < f < 1 for f in fractions):
            raise InvalidValueError(
                "fiited.byte_fractions must be fractions of the dense tables' bytes in (0, 1), "
                f"got {self.byte_fractions!r}"
            )
        if len(set(fractions)) < len(fractions):
            raise InvalidValueError(f"fiited.byte_fractions names one twice: {fractions}")
        for name, known in (("methods", METHODS), ("baselines", _BASELINES)):
            for method in getattr(self, name):
                if method not in known:
                    raise InvalidValueError(
                        f"no fiited.{name} {method!r}; {nearest(str(method), known)}"
                    )
        if "dense" not in self.methods:
            raise InvalidValueError("fiited.methods must hold 'dense', what all are compared with")
        if self.optimizer not in OPTIMIZER_STATE or self.optimizer == "adam":
            raise InvalidValueError(
                "fiited.optimizer must be rowwise_adagrad, adagrad or sgd (no sparse Adam has "
                f"the fused one's counts), got {self.optimizer!r}"
            )
        if "default" not in self.table_lr or not set(self.table_lr) <= {"default", *METHODS}:
            raise InvalidValueError(
                "fiited.table_lr must hold 'default', and methods with a rate of their own, got "
                f"{sorted(self.table_lr)}"
            )
        if min(self.table_lr.values()) <= 0:
            raise InvalidValueError(f"fiited.table_lr must be above 0, got {self.table_lr}")
        for name in ("num_seeds", "memory_steps", "memory_scale", "window"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"fiited.{name} must be at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise InvalidValueError(f"fiited.max_steps must be at least 1, got {self.max_steps}")
        for method in self.methods:
            self.conversion(method, fractions[0], 0)

    @property
    def fractions(self) -> list[float]:
        """`byte_fractions` as a list."""
        given = self.byte_fractions
        return [float(given)] if isinstance(given, int | float) else [float(f) for f in given]

    def lr(self, method: str) -> float:
        """Learning rate of a method's tables."""
        return float(self.table_lr.get(method, self.table_lr["default"]))

    def conversion(self, method: str, fraction: float, seed: int) -> Any:
        """What `mlkit.convert` gets for a method; None for the dense tables."""
        if method == "dense":
            return None
        common: dict[str, Any] = {"memory_budget": fraction, "optimizer": self.optimizer}
        common |= {"seed": seed, "min_rows": self.min_rows}
        if method not in _CHUNKED:
            config = _BASELINES[method]
            known = {f.name for f in fields(config)}
            common = {key: value for key, value in common.items() if key in known}
            return config(**{**common, **self.baselines.get(method, {})})
        arguments = {**common, "lr": self.lr(method), **self.config}
        if method == "fiited_prefix":
            arguments["prefix"] = True
        if method == "adaembed":
            arguments["num_chunks"] = 1
        if method == "magnitude":
            arguments["utility"] = "l2"
        return FIITEDConfig(**arguments)
