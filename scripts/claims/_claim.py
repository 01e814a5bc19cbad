"""What a paper claims, and the run of ours to hold against it.

A system's claims are the list `CLAIMS` in `scripts/claims/<system>.py`; modules whose names begin
with an underscore are shared parts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlkit.report import Table

__all__ = ["Claim", "Figure", "Metrics", "all_claims"]

Metrics = Mapping[str, float]
"""What a run's `metrics.json` holds."""


@dataclass(frozen=True)
class Figure:
    """A difference that a paper reports, and the metric of ours to hold against it.

    The metric's 95 % interval is looked up under its first part with `_low` and `_high` appended:
    for "test_accuracy_difference/ccs-random/0.9" that is
    "test_accuracy_difference_low/ccs-random/0.9".

    Args:
        what: What is compared.
        metric: Name in `metrics.json` of a difference of fractions.
        terms: Where that is not recorded (a single seed): the two metrics whose difference it is.
        paper: The paper's figure with its setting and where it is known from.
        sign: Direction of the paper's difference: 1 above, -1 below.
        margin: Where the paper finds no difference: what ours may be below, as a fraction; the
            lower end of the interval counts, if there is one.
        unit: "points" of fractions, "x" for a ratio, or another unit, in which the metric is.
        is_headline: Shown in the README as well.
    """

    what: str
    metric: str
    paper: str
    terms: tuple[str, str] | None = None
    sign: int = 1
    margin: float | None = None
    unit: str = "points"
    is_headline: bool = False

    def value(self, metrics: Metrics) -> float | None:
        """Ours; None if it was not measured."""
        if self.metric in metrics or self.terms is None:
            return metrics.get(self.metric)
        above, below = (metrics.get(name) for name in self.terms)
        return None if above is None or below is None else above - below

    def interval(self, metrics: Metrics) -> tuple[float, float] | None:
        """The 95 % interval of ours, if the run recorded one."""
        measure, _, rest = self.metric.partition("/")
        low, high = (metrics.get(f"{measure}_{end}/{rest}") for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def text(self, value: float) -> str:
        """A difference as text, without its unit."""
        if self.unit == "x":
            return f"{value:.2f}"
        if self.unit == "points":
            return f"{100 * value:+.1f}"
        return f"{value:+.4f}" if self.unit == "AUC" else f"{value:+.3f}"

    def verdict(self, metrics: Metrics) -> str:
        """Whether ours points where the paper's figure does."""
        value, interval = self.value(metrics), self.interval(metrics)
        if value is None:
            return "not measured"
        if self.margin is not None:
            allowed = self.text(self.margin).lstrip("+")
            least = value if interval is None else interval[0]
            where = "within" if least >= -self.margin else "not within"
            return f"{where} {allowed} {self.unit} of it"
        neutral = 1.0 if self.unit == "x" else 0.0
        if interval is None:
            agrees = (value - neutral) * self.sign > 0
            return f"{'same' if agrees else 'not the same'} direction, no interval"
        low, high = sorted(self.sign * (end - neutral) for end in interval)
        if low > 0:
            return "same direction"
        return "opposite direction" if high < 0 else "no difference shown"


@dataclass(frozen=True)
class Claim:
    """A paper's claim with the run that tests it.

    Args:
        name: Name of the run directory and of the stored result: "<system>-...".
        system: The system it belongs to.
        title: The claim in a line, with the data.
        overrides: Arguments of `train.py`.
        paper: The paper's figures.
        verdict: Says in a sentence what the metrics show.
        needs_data: Name of the data set that has to be fetched or brought, None if it ships.
        is_heavy: Run only with `--all`: needs a GPU and data that cannot be fetched.
        table: The metrics as a table; none if left out.
    """

    name: str
    system: str
    title: str
    overrides: tuple[str, ...]
    paper: tuple[Figure, ...]
    verdict: Callable[[Metrics], str]
    needs_data: str | None = None
    is_heavy: bool = False
    table: Callable[[Metrics], Table] | None = None

    @property
    def run_directory(self) -> str:
        """Where the run lives, relative to the clone; the same each time, so that it resumes."""
        return f"outputs/reproduce/{self.name}"

    @property
    def arguments(self) -> list[str]:
        """The command line after `python`."""
        return ["train.py", *self.overrides, f"hydra.run.dir={self.run_directory}"]


def all_claims() -> list[Claim]:
    """The claims of all systems, found by file name."""
    claims: list[Claim] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith("_"):
            claims += importlib.import_module(f"scripts.claims.{path.stem}").CLAIMS
    return claims
