"""Controllers that reach a wanted sparsity; ours, all of it.

The paper (Zheng et al. 2024, arXiv 2402.06126) has eta for this, and its figures over eta do not
carry over from one model or task to another (its figure 10). `SparsityControl` begins at the target
by a shift of all routers' biases, holds it in stage 1 by eta (`EtaController`), and reaches the
last points in stage 2, where routers are frozen, by tau itself (`ThresholdController`).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mlkit.errors import InvalidValueError
from mlkit.sparsity.module import SparseExpertMLP, lte_layers
from mlkit.sparsity.sample import LogitSample
from mlkit.sparsity.stats import LTEStats, StatsWindow, set_lte_weights

__all__ = ["EtaController", "SparsityControl", "ThresholdController"]


class EtaController:
    """Integral control on log(eta): more sparsity wanted, more eta.

    log eta <- log eta + clip(gain (target - s) - damping (s - s_before), -max_step, max_step), with
    s the measured sparsity. The second term holds against overshoot: scores move long before they
    cross the threshold. All constants are ours.

    Args:
        target: Wanted FFN sparsity in (0, 1).
        eta: Initial eta; above 0.
        gain: Change of log eta per update for an error of 1.
        damping: Change of log eta per update against a change of sparsity of 1.
        max_step: Largest change of log eta in one update.
        eta_min: Least eta.
        eta_max: Greatest eta.

    Raises:
        InvalidValueError: For a value out of range.

    Example:
        >>> controller = EtaController(0.8, eta=1.0, gain=0.5, damping=0.0)
        >>> round(controller.update(0.4), 4), controller.reason
        (1.2214, 'sparsity 0.400, wanted 0.800: eta 1 -> 1.22')
    """

    def __init__(
        self,
        target: float,
        eta: float = 1.0,
        *,
        gain: float = 0.6,
        damping: float = 8.0,
        max_step: float = 0.3,
        eta_min: float = 1e-3,
        eta_max: float = 1e3,
    ) -> None:
        if not 0 < target < 1:
            raise InvalidValueError(f"target must be in (0, 1), got {target}")
        if not 0 < eta_min <= eta <= eta_max:
            raise InvalidValueError(
                "eta must be in [eta_min, eta_max] and above 0, got "
                f"eta={eta}, eta_min={eta_min}, eta_max={eta_max}"
            )
        if not (gain > 0 and damping >= 0 and max_step > 0):
            raise InvalidValueError(
                "gain and max_step must be above 0 and damping at least 0, got "
                f"gain={gain}, damping={damping}, max_step={max_step}"
            )
        self.target, self.eta = target, eta
        self.gain, self.damping, self.max_step = gain, damping, max_step
        self.eta_min, self.eta_max = eta_min, eta_max
        self.reason = "no measurement yet"
        self._before: float | None = None

    def update(self, sparsity: float) -> float:
        """Take a measurement and return the eta to use from now on."""
        if not 0 <= sparsity <= 1:
            raise InvalidValueError(f"sparsity must be in [0, 1], got {sparsity}")
        change = 0.0 if self._before is None else sparsity - self._before
        step = self.gain * (self.target - sparsity) - self.damping * change
        step = min(max(step, -self.max_step), self.max_step)
        former, self._before = self.eta, sparsity
        self.eta = min(max(self.eta * math.exp(step), self.eta_min), self.eta_max)
        self.reason = (
            f"sparsity {sparsity:.3f}, wanted {self.target:.3f}: eta {former:.3g} -> {self.eta:.3g}"
        )
        return self.eta

    def state_dict(self) -> dict[str, Any]:
        """Return eta and the last measurement."""
        return {"eta": self.eta, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.eta, self._before = float(state["eta"]), state["before"]


class ThresholdController:
    """Moves the threshold of hard routing until the sparsity is the wanted one; for stage 2.

    Once the separability loss is on, scores stay on their side of tau whatever eta is, so the last
    points have to come from tau itself: a step on logit(tau) towards the target, 1.5 times as long
    while the sign of the error stays, half as long when it changes. All constants are ours.

    Args:
        target: Wanted FFN sparsity in (0, 1).
        limit: Initial logit of tau.
        step: First change of the logit.
        tolerance: No change while the error is smaller.

    Example:
        >>> controller = ThresholdController(0.8, step=0.5)
        >>> controller.update(0.6), controller.update(0.7), controller.update(0.9)
        (0.5, 1.25, 0.875)
    """

    def __init__(
        self, target: float, limit: float = 0.0, *, step: float = 0.25, tolerance: float = 0.01
    ) -> None:
        if not 0 < target < 1:
            raise InvalidValueError(f"target must be in (0, 1), got {target}")
        if not (step > 0 and tolerance >= 0):
            raise InvalidValueError(
                f"step must be above 0 and tolerance at least 0, got {step} and {tolerance}"
            )
        self.target, self.limit, self.tolerance = target, limit, tolerance
        self.reason = "no measurement yet"
        self._step, self._sign = step, 0

    def update(self, sparsity: float) -> float:
        """Take a measurement and return the logit of the threshold to use from now on."""
        if not 0 <= sparsity <= 1:
            raise InvalidValueError(f"sparsity must be in [0, 1], got {sparsity}")
        error, former = self.target - sparsity, self.limit
        if abs(error) > self.tolerance:
            sign = 1 if error > 0 else -1
            if self._sign:
                self._step = min(self._step * (1.5 if sign == self._sign else 0.5), 4.0)
            self._sign = sign
            self.limit += sign * self._step
        self.reason = (
            f"sparsity {sparsity:.3f}, wanted {self.target:.3f}: "
            f"logit of tau {former:.3g} -> {self.limit:.3g}"
        )
        return self.limit

    def state_dict(self) -> dict[str, Any]:
        """Return the threshold and the step."""
        return {"limit": self.limit, "step": self._step, "sign": self._sign}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.limit, self._step, self._sign = state["limit"], state["step"], state["sign"]


class SparsityControl:
    """Measure a model every few steps, and move eta or the threshold towards a sparsity.

    Call `step` after every optimizer step, on all ranks. The pass between the first two steps of a
    soft stage 1 says by how much to shift the routers' biases, the same for all layers, so that
    training goes on at the target (sigmoid routers with a bias only). From then on it moves eta
    while routing is soft, and tau once it is hard (sigmoid routers only).

    Args:
        target: Wanted FFN sparsity in (0, 1).
        interval: Optimizer steps from one measurement to the next.
        settings: Further arguments of `EtaController`.
    """

    def __init__(self, target: float, interval: int = 5, **settings: Any) -> None:
        if interval < 1:
            raise InvalidValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.eta = EtaController(target, **settings)
        self.threshold = ThresholdController(target)
        self.reason = "no measurement yet"
        self.sparsity: float | None = None
        self._steps = 0
        self._is_loaded = False
        self._window: StatsWindow | None = None
        self._start: LogitSample | None = None

    def step(self, model: nn.Module) -> bool:
        """Count a step; return whether a measurement was taken and acted upon."""
        layers = list(lte_layers(model).values())
        if self._window is None or self._is_loaded:
            set_lte_weights(model, eta=self.eta.eta)
            if self._is_loaded:
                self._set_limit(layers)
            self._window, self._is_loaded = StatsWindow(model), False
        self._steps += 1
        if self._steps == 1 and layers[0].mode == "soft" and LogitSample.fits(layers):
            self._start = LogitSample(layers)
        elif self._start is not None:
            shift = self._start.shift_biases(self.eta.target)
            self.reason = f"all biases shifted by {shift:+.3g}, to begin at the target"
            self._start = None
            self._window.skip()
            return False
        if self._steps % self.interval or layers[0].mode == "dense":
            return False
        stats: LTEStats = self._window.take(sync=True)
        self.sparsity = min(max(stats.sparsity, 0.0), 1.0)
        if layers[0].mode == "soft":
            set_lte_weights(model, eta=self.eta.update(self.sparsity))
            self.reason = self.eta.reason
        elif layers[0].config.router == "sigmoid":
            self.threshold.update(self.sparsity)
            self._set_limit(layers)
            self.reason = self.threshold.reason
        else:
            self.reason = "router='topp' has no threshold to move"
        return True

    def _set_limit(self, layers: list[SparseExpertMLP]) -> None:
        for layer in layers:
            layer.set_limit(self.threshold.limit)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both controllers."""
        return {
            "eta": self.eta.state_dict(),
            "threshold": self.threshold.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the model gets it at the next step."""
        self.eta.load_state_dict(state["eta"])
        self.threshold.load_state_dict(state["threshold"])
        self._steps, self._is_loaded = state["steps"], True
