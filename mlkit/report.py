"""One run's results on disk: `RunContext` keeps finished units, `Report` the metrics and tables.

No torch here: a run directory can be read and a configuration refused before torch is imported.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlkit.errors import InvalidValueError, RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Report",
    "RunContext",
    "Table",
    "is_global_zero",
    "paired_interval",
    "read_json",
    "write_json",
]

log = logging.getLogger(__name__)


_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_global_zero() -> bool:
    """True in the one process that writes: rank 0, or a run of a single process.

    Launchers set different variables (torchrun, Lightning on one or several nodes, Slurm); rank 0
    is the process for which all that are set are 0.
    """
    return all(int(os.environ.get(name) or 0) == 0 for name in _RANK_VARIABLES)


def _wait_for_all_ranks() -> None:
    """Let the files that rank 0 wrote be there before another rank reads them."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available():
        group = torch.distributed
        if group.is_initialized() and group.get_world_size() > 1:
            group.barrier()


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        RunError: If it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged ({error}); delete it to compute it again") from error


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % Student interval.

    Args:
        differences: One per seed, at least two.

    Example:
        >>> [round(x, 3) for x in paired_interval([0.01, 0.02, 0.03])]
        [0.02, -0.005, 0.045]
    """
    from scipy import stats

    mean = math.fsum(differences) / len(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Table:
    """Rows of text under column names.

    Args:
        title: What the table shows.
        columns: Column names.
        rows: Cells as text, one list per row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass
class Report:
    """What a recipe found out.

    Args:
        title: Heading of `report.md`.
        metrics: Name to number: what `metrics.json` holds. Fractions lie in [0, 1].
        facts: What was run: data source and hash, seeds, steps.
        verdict: Sentences that compare with the baselines.
    """

    title: str
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)
    _tables: list[Table] = field(default_factory=list)
    _figures: dict[str, Figure] = field(default_factory=dict)

    def metric(self, name: str, value: float) -> None:
        """Record a number.

        Raises:
            InvalidValueError: If it is not finite, or the name was used before.
        """
        if not math.isfinite(value):
            raise InvalidValueError(f"metric {name!r} must be finite, got {value}")
        if name in self.metrics:
            raise InvalidValueError(f"metric {name!r} was recorded before")
        self.metrics[name] = float(value)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table; it appears in `report.md` and at the end on the terminal.

        Raises:
            InvalidValueError: If a row has not one cell per column.
        """
        cells = [list(map(str, row)) for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise InvalidValueError(
                    f"table {title!r}: a row has {len(row)} cells for {len(columns)} columns: {row}"
                )
        self._tables.append(Table(title, list(columns), cells))

    def figure(self, name: str, figure: Figure) -> None:
        """Add a matplotlib figure; it is written as `<name>.png`."""
        self._figures[name] = figure

    def write(self, directory: Path) -> None:
        """Write `metrics.json`, `report.md` and the figures."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in self._figures.items():
            figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight")
        partial = directory / "report.md.partial"
        partial.write_text(self.markdown())
        partial.replace(directory / "report.md")
        write_json(directory / "metrics.json", self.metrics)

    def markdown(self) -> str:
        """The report as Markdown."""
        parts = [f"# {self.title}"]
        if self.verdict:
            parts.append("\n".join(f"- {line}" for line in self.verdict))
        parts += [f"## {t.title}\n\n{t.markdown()}" for t in self._tables]
        parts += [f"![{name}]({name}.png)" for name in self._figures]
        if self.facts:
            facts = Table("", ["what", "value"], [[k, v] for k, v in self.facts.items()])
            parts.append(f"## What was run\n\n{facts.markdown()}")
        return "\n\n".join(parts) + "\n"

    def show(self) -> None:
        """Print the tables and the verdict."""
        from rich.console import Console
        from rich.table import Table as RichTable

        console = Console()
        for table in self._tables:
            grid = RichTable(title=table.title)
            for number, column in enumerate(table.columns):
                grid.add_column(column, justify="left" if number == 0 else "right")
            for row in table.rows:
                grid.add_row(*row)
            console.print(grid)
        for line in self.verdict:
            console.print(line, highlight=False, markup=False)


@dataclass
class RunContext:
    """Where a recipe runs: its directory, seed and loggers, and the units already finished.

    Args:
        directory: The run directory.
        seed: The run's seed; a recipe with several seeds counts up from it.
        loggers: Lightning loggers for the run's own measurements.
    """

    directory: Path
    seed: int = 0
    loggers: Sequence[Any] = ()
    _step: int = 0

    def __post_init__(self) -> None:
        # Read once: the processes of a distributed run must agree on what is left to do.
        units = self.directory / "units"
        self._finished = {
            path.relative_to(units).with_suffix("").as_posix(): read_json(path)
            for path in sorted(units.rglob("*.json"))
        }
        if self._finished:
            log.info("resuming %s: %d units are done", self.directory, len(self._finished))
        for key, result in self._finished.items():  # a logger that starts anew has them too
            self._log_unit(key, result)

    @property
    def finished(self) -> Mapping[str, dict[str, Any]]:
        """Results of all finished units by key."""
        return self._finished

    def unit(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the stored result of a unit of work, or compute and store it.

        A unit is what an interrupted run does not repeat: one fit, one search. Its result is kept
        in `units/<key>.json`, written whole or not at all.

        Args:
            key: Path-like name, unique in the run.
            compute: Gives a JSON-ready mapping.
        """
        if key not in self._finished:
            started = time.perf_counter()
            result = {**compute(), "seconds": round(time.perf_counter() - started, 3)}
            if is_global_zero():
                write_json(self.directory / "units" / f"{key}.json", result)
            _wait_for_all_ranks()
            self._finished[key] = result
            self._log_unit(key, result)
        return self._finished[key]

    def _log_unit(self, key: str, result: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        self.log({f"{key}/{k}": float(v) for k, v in numbers.items()})

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send numbers to the run's loggers, one step further each time."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=self._step)
            logger.save()
        self._step += 1
