"""Measure one subject against its peers: ``python scripts/bench.py ccs [--json FILE]``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mlkit.errors import MlkitError, nearest  # noqa: E402
from mlkit.report import write_json  # noqa: E402
from scripts.benchmarks._harness import (  # noqa: E402
    Bench,
    Row,
    alternate,
    in_fresh_process,
    limit_threads,
)
from scripts.provenance import provenance  # noqa: E402

__all__ = ["Bench", "Row", "alternate", "in_fresh_process", "main", "subjects"]


def subjects() -> list[str]:
    """Names of the subjects, found by file name."""
    files = (ROOT / "scripts" / "benchmarks").glob("*.py")
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    parser.add_argument("name", nargs="?", help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that it works")
    parser.add_argument("--threads", type=int, default=1, help="of every provider (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the subjects")
    arguments = parser.parse_args(argv)
    known = subjects()
    if arguments.list:
        print("\n".join(known))
        return 0
    if arguments.name not in known:
        asked = "name a benchmark" if arguments.name is None else f"no benchmark {arguments.name!r}"
        hint = nearest(arguments.name or "", known)
        listing = "known: " + ", ".join(known)
        print(f"{asked}; {hint if hint == listing else f'{hint} ({listing})'}", file=sys.stderr)
        return 2
    limit_threads(arguments.threads)
    try:
        rows = _run(arguments.name, Bench(quick=arguments.quick))
    except MlkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _show(arguments.name, rows)
    if arguments.json:
        content = {
            "subject": arguments.name,
            **provenance(),
            "threads": arguments.threads,
            "quick": arguments.quick,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_json(arguments.json, content)
    return 0


def _run(name: str, bench: Bench) -> list[Row]:
    rows = []
    for row in importlib.import_module(f"scripts.benchmarks.{name}").rows(bench):
        rows.append(row)
        print(f"{row.case}: {row.metric} {number(row.value)} {row.unit}", file=sys.stderr)
    return rows


def _show(name: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{name}: ratio > 1 means that mlkit is better; p20 to p80 in brackets"
    table = Table(title=title, title_justify="left")
    for column in ("case", "metric", "mlkit", "peer", "peer's", "ratio", "limit", "limit ratio"):
        is_text = column in ("case", "metric", "peer")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(table)


def cells(row: Row) -> list[str]:
    """A row as text: case, metric, value, peer, its value, ratio, limit, limit ratio."""
    return [
        row.case,
        row.metric,
        f"{number(row.value)} {row.unit}{_interval(row.spread)}",
        row.peer or "",
        number(row.peer_value) + _interval(row.peer_spread),
        number(row.ratio),
        number(row.limit),
        number(row.limit_ratio),
    ]


def _interval(spread: Sequence[float] | None) -> str:
    return "" if spread is None else f" [{number(spread[0])}, {number(spread[1])}]"


def number(value: float | None) -> str:
    """Three significant digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
