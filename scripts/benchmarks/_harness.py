"""What every benchmark shares: rows, alternating timings, fresh processes and their memory.

A subject is a module `scripts/benchmarks/<subject>.py` with `rows(bench) -> Iterator[Row]`; modules
whose names begin with an underscore are parts of subjects.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlkit.errors import RunError

__all__ = [
    "Bench",
    "Provider",
    "Row",
    "alternate",
    "calling",
    "in_fresh_process",
    "limit_threads",
    "peak_rss",
    "spread_of",
]

Provider = Callable[[], float | None]
"""One call of what is measured; it may return seconds that it took itself."""

_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Row:
    """One measured number against a peer and a limit.

    Args:
        case: What was done, with its sizes.
        metric: What was measured of it.
        value: mlkit's number: the median where it is a time.
        unit: Its unit.
        peer: Who did the same in the same run.
        peer_value: The peer's number.
        ratio: Above 1 means that mlkit is better.
        limit: A physical bound or a stated target, in the same unit.
        limit_ratio: 1 or more means that a target is met; the share of a physical bound reached.
        spread: The 20th and 80th percentile of `value`.
        peer_spread: The same of `peer_value`.
        is_detail: One of many alike, which the README leaves out.
    """

    case: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    limit: float | None = None
    limit_ratio: float | None = None
    spread: tuple[float, float] | None = None
    peer_spread: tuple[float, float] | None = None
    is_detail: bool = False

    @classmethod
    def of(
        cls,
        case: str,
        metric: str,
        value: float,
        unit: str,
        *,
        peer: str | None = None,
        peer_value: float | None = None,
        limit: float | None = None,
        higher_is_better: bool = False,
        spread: tuple[float, float] | None = None,
        peer_spread: tuple[float, float] | None = None,
    ) -> Row:
        """Return a row with both ratios worked out; smaller values are better by default."""

        def gain(other: float | None) -> float | None:
            if other is None:
                return None
            better, worse = (value, other) if higher_is_better else (other, value)
            return better / worse

        ratios = (gain(peer_value), gain(limit))
        return cls(
            case, metric, value, unit, peer, peer_value, ratios[0], limit, ratios[1], spread,
            peer_spread,
        )  # fmt: skip


def calling(function: Callable[..., object], *arguments: Any, **keywords: Any) -> Provider:
    """Return a provider that calls the function and drops its result, so that it is timed."""

    def call() -> None:
        function(*arguments, **keywords)

    return call


def alternate(
    providers: Mapping[str, Provider], repeats: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """Call all providers in turn, A B A B ..., and return the seconds of every call.

    Alternating lets a disturbance of the machine fall on all providers alike. As in `timeit`, no
    garbage is collected meanwhile.

    Args:
        providers: Name to a call; ours first.
        repeats: Rounds that count.
        warmup: Rounds before, which do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + repeats):
            for name, call in providers.items():
                _synchronize()
                started = time.perf_counter()
                own = call()
                _synchronize()
                taken = time.perf_counter() - started
                if number >= warmup:
                    seconds[name].append(taken if own is None else own)
    finally:
        gc.enable()
    return seconds


def _synchronize() -> None:
    """Wait for the GPU if this process has used one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread_of(samples: list[float], factor: float = 1.0) -> tuple[float, float] | None:
    """The 20th and 80th percentile; None for a single sample."""
    if len(samples) == 1:
        return None
    low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low * factor, high * factor


def limit_threads(count: int) -> None:
    """Let numerical libraries that are loaded from now on use `count` threads, children included.

    On a machine that others use too, a call that splits its work waits for the slowest part: with
    one thread, times are comparable from run to run and between providers.
    """
    for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        os.environ[f"{library}_NUM_THREADS"] = str(count)


@dataclass(frozen=True)
class Bench:
    """What a subject is given.

    Args:
        quick: Shrink everything: the rows then check the code, not its speed.
    """

    quick: bool = False

    def size(self, full: int, quick: int) -> int:
        """One of two sizes, by `quick`."""
        return quick if self.quick else full

    def note(self, text: str) -> None:
        """Say something that is no row, such as a peer that is not installed."""
        print(f"note: {text}", file=sys.stderr)

    def check(self, is_true: bool, what: str) -> None:
        """Refuse to compare things that do not agree.

        Raises:
            RunError: If `is_true` is false.
        """
        if not is_true:
            raise RunError(f"the benchmark's providers disagree: {what}")

    def times(
        self,
        case: str,
        seconds: Mapping[str, list[float]],
        *,
        metric: str = "time",
        unit: str = "s",
        limit: float | None = None,
    ) -> Iterator[Row]:
        """Rows of what `alternate` returned: the first provider against each of the others.

        Args:
            case: What was done.
            seconds: Name to the seconds of every call.
            metric: What was measured of it.
            unit: "s", "ms" or "us".
            limit: In that unit.
        """
        factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
        (_, mine), *others = seconds.items()
        value, spread = statistics.median(mine) * factor, spread_of(mine, factor)
        if not others:
            yield Row.of(case, metric, value, unit, limit=limit, spread=spread)
        for peer, samples in others:
            yield Row.of(
                case,
                metric,
                value,
                unit,
                peer=peer,
                peer_value=statistics.median(samples) * factor,
                limit=limit,
                spread=spread,
                peer_spread=spread_of(samples, factor),
            )


# ------------------------------------------------------------------------------ fresh processes


def in_fresh_process(target: str, **arguments: Any) -> dict[str, float]:
    """Call a function in a new interpreter, for cases that do not fit into memory together.

    Args:
        target: "package.module:function"; the function returns a dict of numbers.
        arguments: Its arguments, JSON-ready.

    Returns:
        The function's numbers and "peak_bytes", the most memory that the process ever held.

    Raises:
        RunError: With the end of its output, if the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks._harness", target, json.dumps(arguments)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RunError(f"{target} failed in its own process (exit {done.returncode}):\n{tail}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak_rss() -> int:
    """Most memory, in bytes, that this process has held so far.

    Linux's `ru_maxrss` starts at the size of the process that started this one, so its own
    high-water mark is read instead; elsewhere `ru_maxrss` has to do.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def _child(target: str, arguments: str) -> None:
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps({**result, "peak_bytes": peak_rss()}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
