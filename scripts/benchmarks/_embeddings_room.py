"""Processes for cases that fill the memory: one at a time, in turn, no larger than what is free."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.benchmarks._embeddings_case import Case
from scripts.benchmarks._harness import Bench, in_fresh_process, peak_rss

__all__ = ["Samples", "alternate_children", "child", "fitting"]

Samples = Mapping[str, list[float]]

_SLACK = 2 << 30
"""Bytes for the interpreter, the ids, and for others on the machine."""
_PATIENCE = 120
"""Seconds to wait for memory that others hold."""


def child(bench: Bench, target: str, **arguments: Any) -> dict[str, float]:
    """Call "module:function" of this folder in a fresh process; in a quick run, in this one."""
    module, _, function = target.partition(":")
    module = f"scripts.benchmarks.{module}"
    if not bench.quick:
        return in_fresh_process(f"{module}:{function}", **arguments)
    result = getattr(importlib.import_module(module), function)(**arguments)
    return {**result, "peak_bytes": peak_rss()}


def alternate_children(
    bench: Bench, target: str, arguments: Mapping[str, Mapping[str, Any]], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Call a function with each of the named arguments in turn, each time in a fresh process.

    Returns:
        Name to what the function returned: key to the numbers of all its calls.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in arguments}
    for _ in range(repeats):
        for name, given in arguments.items():
            for key, value in child(bench, target, **given).items():
                found[name].setdefault(key, []).append(value)
    return found


def fitting(bench: Bench, case: Case, table_bytes: int) -> Case:
    """Return the case with as many of its tables as fit into memory, after some patience.

    Args:
        bench: Told when tables are left out.
        case: As it should be.
        table_bytes: The most that a provider holds for one table.
    """
    deadline = time.monotonic() + (0 if bench.quick else _PATIENCE)
    while (room := _available()) is not None:
        tables = max(1, min(case.tables, (room - _SLACK) // table_bytes))
        if tables == case.tables:
            break
        if time.monotonic() > deadline:
            bench.note(f"{case}: {room / 1e9:.1f} GB are free: {tables} tables are measured")
            return replace(case, tables=tables)
        time.sleep(5)
    return case


def _available() -> int | None:
    """Bytes that a process could take now; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):
        return None
