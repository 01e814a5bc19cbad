"""What a conversion found and did: candidates, costs, and the report that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Candidate", "ConversionReport", "ConversionRow", "Cost"]


@dataclass(frozen=True)
class Candidate:
    """A module that a converter knows.

    Args:
        name: Its name in the model.
        kind: Name of its class.
        refusal: Why it cannot be converted; None if it can.
        left_out: Why the config does not ask for it; None if it does. Not an error, unless nothing
            remains.
    """

    name: str
    kind: str
    refusal: str | None = None
    left_out: str | None = None


@dataclass(frozen=True)
class Cost:
    """What a module holds and does.

    Args:
        parameters: Number of parameters.
        nbytes: Their bytes.
        flops: Floating-point operations per token or lookup, 2 per multiply-add.
    """

    parameters: int = 0
    nbytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.nbytes + other.nbytes,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class ConversionRow:
    """One line of a `ConversionReport`: what became of a module, and why."""

    name: str
    kind: str
    result: str
    reason: str = ""
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; prints as a table.

    FLOPs are those of a model that uses everything it has; what a trained sparse model saves is
    for the statistics of its room to say.
    """

    config: Any
    rows: tuple[ConversionRow, ...]

    @property
    def replaced(self) -> list[str]:
        """Names of the converted modules."""
        return [row.name for row in self.rows if row.result == "replaced"]

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the known modules that stay as they were, with the reason."""
        return {row.name: row.reason for row in self.rows if row.result == "skipped"}

    @property
    def before(self) -> Cost:
        """Sum over the replaced modules before conversion."""
        return sum((row.before for row in self.rows), Cost())

    @property
    def after(self) -> Cost:
        """Sum over the replaced modules after conversion."""
        return sum((row.after for row in self.rows), Cost())

    def __str__(self) -> str:
        head = ("module", "class", "result", "parameters", "bytes", "FLOPs/token", "why")
        total = ConversionRow(f"{len(self.replaced)} replaced", "", "", "", self.before, self.after)
        lines = [head, *(_cells(row) for row in (*self.rows, total))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _cells(row: ConversionRow) -> tuple[str, ...]:
    pairs = [
        (row.before.parameters, row.after.parameters),
        (row.before.nbytes, row.after.nbytes),
        (row.before.flops, row.after.flops),
    ]
    costs = ("" if row.result == "skipped" else f"{a:,} -> {b:,}" for a, b in pairs)
    return (row.name, row.kind, row.result, *costs, row.reason)
