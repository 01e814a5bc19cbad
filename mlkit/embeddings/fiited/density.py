"""The density by accuracy: as few chunks as a metric of validation allows.

Our decision; the paper fixes the ratio of pruning beforehand.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from mlkit.errors import InvalidValueError

__all__ = ["AutoDensity"]


class AutoDensity:
    """Lowers a density one step at a time while a metric stays near that of the dense model.

    After each validation, call `update`. While the metric is within `max_drop` of the reference,
    the density goes down by `step`. When it is not, the last step is taken back and the search is
    over. Before the first metric within the bound (a model that still learns) it stays as it is.

    Args:
        reference: The metric of the dense model, on the same data.
        max_drop: How much worse the metric may be, in its own unit, at least 0.
        step: By how much the density falls at a time, in (0, 1).
        lowest: The density that it does not fall below, in (0, 1].
        mode: "max" if more is better, such as an AUC; "min" for a loss.

    Raises:
        InvalidValueError: For a value out of range.

    Example:
        >>> auto = AutoDensity(reference=0.800, max_drop=0.001, step=0.25)
        >>> density = 1.0
        >>> for auc in (0.800, 0.7995, 0.798):
        ...     density = auto.update(auc, density)
        >>> density, auto.is_settled
        (0.75, True)
    """

    def __init__(
        self,
        reference: float,
        max_drop: float = 0.001,
        *,
        step: float = 0.05,
        lowest: float = 0.05,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if not math.isfinite(reference):
            raise InvalidValueError(f"reference must be a finite number, got {reference}")
        if not (math.isfinite(max_drop) and max_drop >= 0):
            raise InvalidValueError(f"max_drop must be a number of at least 0, got {max_drop}")
        if not 0 < step < 1:
            raise InvalidValueError(f"step must be in (0, 1), got {step}")
        if not 0 < lowest <= 1:
            raise InvalidValueError(f"lowest must be in (0, 1], got {lowest}")
        if mode not in ("max", "min"):
            raise InvalidValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.reference, self.max_drop, self.mode = reference, max_drop, mode
        self.step, self.lowest = step, lowest
        self.accepted: float | None = None
        """The lowest density whose metric was within the bound so far."""
        self.is_settled = False
        """Whether the search is over."""

    def update(self, metric: float, density: float) -> float:
        """Return the density to go on with.

        Args:
            metric: Of this validation; a NaN is never within the bound.
            density: At which it was measured.
        """
        if self.is_settled:
            return density
        drop = self.reference - metric if self.mode == "max" else metric - self.reference
        if drop <= self.max_drop:
            self.accepted = density
            self.is_settled = density <= self.lowest
            return density if self.is_settled else max(density - self.step, self.lowest)
        if self.accepted is None:
            return density
        self.is_settled = True
        return self.accepted

    def state_dict(self) -> dict[str, Any]:
        """Return where the search is."""
        return {"accepted": self.accepted, "is_settled": self.is_settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a `state_dict` was."""
        self.accepted, self.is_settled = state["accepted"], state["is_settled"]
