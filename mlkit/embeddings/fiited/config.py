"""Settings of FIITED (arXiv 2401.04408), without torch.

The full text of the paper was not at hand: K, the interval of pruning, the decay and the learning
rates are *ours* unless said otherwise. "ITEP" is the in-training embedding pruning of TorchRec.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlkit.errors import InvalidTypeError, InvalidValueError, nearest

__all__ = ["CHOICES", "FIITEDConfig"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": ("geometric", "fixed"),
    "utility": ("freq_grad", "freq", "grad", "l2"),
    "utility_dtype": ("float32", "uint8"),
    "normalize": ("none", "p95", "per_table"),
    "id_map": ("identity", "hash", "exact"),
    "layout": ("slab", "chunk"),
    "optimizer": (None, "sgd", "rowwise_adagrad", "adagrad", "adam"),
    "unfused_optimizer": ("sgd", "rowwise_adagrad", "adagrad", "adam"),
    "init": ("uniform", "normal", "zeros"),
    "admission": ("zeros", "init"),
    "first_read": ("init", "zeros"),
    "warm_start": (None, "magnitude"),
}
"""Fields that take one of some values."""


@dataclass(frozen=True)
class FIITEDConfig:
    """How embedding tables spend a budget of memory.

    Exactly one of `target_density` and `memory_budget` is given.

    Args:
        target_density: Fraction of the chunks that have storage, in (0, 1].
        memory_budget: Everything that the tables may take, headers, utilities and the state of the
            optimizer included: bytes as an integer or as "2GiB", or a fraction in (0, 1] of what
            dense tables take with the same optimizer.
        num_chunks: K, the parts that a vector is cut into, 1 to 8; must divide the dimension. 1
            prunes whole rows, as AdaEmbed does.
        prefix: Keep only first chunks of a vector, so that it has a dimension in the usual sense;
            otherwise chunks are independent of each other.
        utility: "freq_grad": accesses times norm of the gradient (*paper*, as reviewed); "freq":
            accesses (ITEP); "grad"; "l2": the norm of the values, which lets nothing grow back.
        utility_dtype: "uint8" stores a logarithm in one byte instead of a float32 in four.
        utility_every: Steps between updates of the utilities; 1 is every step.
        decay: Factor of the utilities for each pruning interval, in (0, 1]. 0.98 (ITEP).
        normalize: "none" lets all tables compete as they are; "p95" divides by the 95th percentile
            of a table's utilities first (AdaEmbed, as described), which lost here (decision 008);
            "per_table" gives every table its share.
        prune_every: Steps between pruning rounds.
        schedule: "fixed", or "geometric": every 3rd step below 10, every 30th below 100, every
            300th below 1000 (ITEP), then every `prune_every`, and never more seldom than that.
        hysteresis: How far from the threshold a score must be before its chunk changes sides, as a
            fraction of the threshold, in [0, 1).
        trigger: A round is carried out if this share of chunks would change sides (AdaEmbed); 0
            always.
        ramp: (first step, steps) of a cubic descent from `ramp_from` to the target.
        ramp_from: Density at the start of a ramp, above the target: memory is over budget until
            the ramp ends.
        id_map: "identity": ids are rows; "hash": any integer, hashed to a row, collisions share it;
            "exact": any integer, a row of its own as long as there is one.
        layout: "slab" (fast: the chunks of a row lie together) or "chunk" (simple).
        optimizer: None leaves the update to a `torch.optim` optimizer; the others are fused into
            the backward pass.
        unfused_optimizer: Whose state counts in the budget where `optimizer` is None.
        lr: Learning rate of a fused optimizer.
        eps: Of fused Adagrad and Adam.
        betas: Of fused Adam.
        init: Values of a row that is read for the first time: uniform in +-1/sqrt(rows) (DLRM),
            normal with standard deviation 1 (PyTorch), or zeros.
        init_scale: Bound of "uniform" or standard deviation of "normal", instead of these.
        admission: Values of a chunk that grows back: "zeros", so that outputs do not jump, or
            "init".
        first_read: What a row that was never touched reads as in training, while there is room for
            it: "init", its initial values, or "zeros".
        warm_start: What `mlkit.convert` does with trained tables at a density below 1: None starts
            afresh; "magnitude" keeps the chunks with the largest norm.
        min_rows: `mlkit.convert` leaves tables with fewer rows as they are.
        seed: Keys initial values, hashing and random rounding.

    Raises:
        InvalidValueError: For a value out of range; the message names the field.

    Example:
        >>> FIITEDConfig(memory_budget=0.35).num_chunks
        4
    """

    target_density: float | None = None
    memory_budget: int | float | str | None = None
    num_chunks: int = 4
    prefix: bool = False
    utility: Literal["freq_grad", "freq", "grad", "l2"] = "freq_grad"
    utility_dtype: Literal["float32", "uint8"] = "float32"
    utility_every: int = 1
    decay: float = 0.98
    normalize: Literal["none", "p95", "per_table"] = "none"
    prune_every: int = 1000
    schedule: Literal["geometric", "fixed"] = "geometric"
    hysteresis: float = 0.05
    trigger: float = 0.05
    ramp: Sequence[int] | None = None
    ramp_from: float | None = None
    id_map: Literal["identity", "hash", "exact"] = "identity"
    layout: Literal["slab", "chunk"] = "slab"
    optimizer: Literal["sgd", "rowwise_adagrad", "adagrad", "adam"] | None = None
    unfused_optimizer: Literal["sgd", "rowwise_adagrad", "adagrad", "adam"] = "sgd"
    lr: float = 0.01
    eps: float = 1e-8
    betas: Sequence[float] = (0.9, 0.999)
    init: Literal["uniform", "normal", "zeros"] = "uniform"
    init_scale: float | None = None
    admission: Literal["zeros", "init"] = "zeros"
    first_read: Literal["init", "zeros"] = "init"
    warm_start: Literal["magnitude"] | None = None
    min_rows: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                hint = nearest(str(value), [str(a) for a in allowed])
                raise InvalidValueError(f"{name} must be one of {allowed}, got {value!r}; {hint}")
        self._check_budget()
        if not 1 <= self._integer("num_chunks") <= 8:
            raise InvalidValueError(f"num_chunks must be in 1..8, got {self.num_chunks}")
        for name, low in (("prune_every", 1), ("utility_every", 1), ("min_rows", 0)):
            if self._integer(name) < low:
                raise InvalidValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        self._integer("seed")
        if not 0 < self._number("decay") <= 1:
            raise InvalidValueError(f"decay must be in (0, 1], got {self.decay}")
        for name in ("hysteresis", "trigger"):
            if not 0 <= self._number(name) < 1:
                raise InvalidValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("lr", "eps"):
            if self._number(name) < 0:
                raise InvalidValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.init_scale is not None and self._number("init_scale") < 0:
            raise InvalidValueError(f"init_scale must be at least 0, got {self.init_scale}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InvalidValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        self._check_ramp()

    def _check_budget(self) -> None:
        if (self.target_density is None) == (self.memory_budget is None):
            both = "both" if self.memory_budget is not None else "neither"
            raise InvalidValueError(
                f"give exactly one of target_density and memory_budget, got {both}"
            )
        if self.target_density is not None and not 0 < self._number("target_density") <= 1:
            raise InvalidValueError(f"target_density must be in (0, 1], got {self.target_density}")

    def _check_ramp(self) -> None:
        if (self.ramp is None) != (self.ramp_from is None):
            raise InvalidValueError(
                "ramp and ramp_from belong together: a ramp begins above the budget, and "
                f"ramp_from says where; got ramp={self.ramp!r}, ramp_from={self.ramp_from!r}"
            )
        if self.ramp is None:
            return
        if len(self.ramp) != 2 or not all(isinstance(n, int) and n >= 0 for n in self.ramp):
            raise InvalidValueError(f"ramp must be (first step, steps), got {self.ramp!r}")
        if not 0 < self._number("ramp_from") <= 1:
            raise InvalidValueError(f"ramp_from must be in (0, 1], got {self.ramp_from}")
        object.__setattr__(self, "ramp", tuple(self.ramp))

    def _integer(self, name: str) -> int:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(f"{name} must be an integer, got {value!r}")
        return value

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise InvalidValueError(f"{name} must be a finite number, got {value!r}")
        return float(value)

    @property
    def decay_per_step(self) -> float:
        """Decay of one step, gamma: `decay` is that of `prune_every` steps."""
        return self.decay ** (1 / self.prune_every)

    def is_round(self, step: int) -> bool:
        """Whether a pruning round follows step `step`, from 1."""
        every = self.prune_every
        if self.schedule == "geometric":
            for limit, period in ((10, 3), (100, 30), (1000, 300)):
                if step < limit:
                    every = min(every, period)
                    break
        return step % every == 0

    def ramp_density(self, step: int, target: float) -> float:
        """Density that the ramp allows at a step, for a target density."""
        if self.ramp is None or self.ramp_from is None:
            return target
        first, steps = self.ramp
        left = 1 - min(max(step - first, 0) / max(steps, 1), 1)
        return target + max(self.ramp_from - target, 0) * left**3
