"""How the recipe `fiited` reports: the table, the comparison by seed, recovery after a drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlkit.data.ctr import CTRStream, SyntheticCTR
from mlkit.embeddings.settings import FIITEDSettings
from mlkit.report import Report, RunContext, paired_interval

if TYPE_CHECKING:
    from recipes.fiited import Cell

__all__ = ["recovery_rounds", "report_of"]

MARGIN = 0.001
"""Non-inferiority: AUC that a smaller table may lose."""

_RECOVERED = 0.01  # of the reads of hot rows: so near to the share before the drift counts as back

Units = list[dict[str, Any]]
"""Results of a method at a budget, a unit per seed."""

Rows = Mapping[tuple[str, float], Units]


def report_of(
    run: RunContext,
    settings: FIITEDSettings,
    stream: CTRStream,
    cells: Sequence[Cell],
    peaks: Mapping[str, int],
) -> Report:
    """Return the report of a finished run."""
    report = Report("Dynamic embedding dimensions (FIITED)")
    rows: dict[tuple[str, float], Units] = {}
    for cell in cells:
        rows.setdefault((cell.method, cell.fraction), []).append(run.finished[cell.key])
    for (method, fraction), units in rows.items():
        name = f"{method}/{fraction:g}"
        for measure in ("auc", "bytes", "byte_fraction", "weight_fraction", "step_ms"):
            report.metric(f"{measure}/{name}", mean(units, measure))
        report.metric(f"auc_std/{name}", std(units, "auc"))
        for measure in ("density", "all_or_nothing", "dims_given_frequency", "frequency_alone"):
            if measure in units[0]:
                report.metric(f"{measure}/{name}", mean(units, measure))
        if isinstance(stream, SyntheticCTR) and units[0].get("coverage"):
            _recovery(report, name, units, stream, settings)
    for method in settings.methods:
        report.metric(f"peak_rss_bytes/{method}", float(peaks[method]))
    _table(report, rows, peaks, settings)
    for fraction in settings.fractions:
        _verdict(report, rows, fraction)
    report.figure("auc_and_time", _figure(rows, settings, stream))
    _facts(report, run, settings, stream)
    return report


def _batch_of(drift: int, stream: SyntheticCTR, units: Units) -> float:
    steps = units[0]["num_steps"]
    return drift / stream.num_samples("train") * steps


def recovery_rounds(
    coverage: Sequence[Sequence[float]], drifts: Sequence[float]
) -> tuple[list[int], bool]:
    """Count the rounds after each drift until the share of hot reads with storage is back.

    Args:
        coverage: (step, share) after each round.
        drifts: Steps at which a drift happened.

    Returns:
        One number per drift that has a round before it and one after, and whether all came back
        before the next drift (or the end); one that did not counts the rounds that there were.
    """
    found, all_back = [], True
    ends = [*drifts, float("inf")][1:]
    for drift, end in zip(drifts, ends, strict=True):
        before = [share for step, share in coverage if step <= drift]
        after = [share for step, share in coverage if drift < step <= end]
        if not before or not after:
            continue
        back = [n for n, share in enumerate(after, 1) if share >= before[-1] - _RECOVERED]
        found.append(back[0] if back else len(after))
        all_back &= bool(back)
    return found, all_back


def _recovery(
    report: Report, name: str, units: Units, stream: SyntheticCTR, settings: FIITEDSettings
) -> None:
    drifts = [_batch_of(at, stream, units) for at in stream.drift_at]
    counts, back = [], True
    for unit in units:
        found, all_back = recovery_rounds(unit["coverage"], drifts)
        counts += found
        back &= all_back
    if counts:
        report.metric(f"recovery_rounds/{name}", float(np.mean(counts)))
        report.metric(f"recovery_rounds_most/{name}", float(max(counts)))
        report.metric(f"recovered/{name}", float(back))


def _table(report: Report, rows: Rows, peaks: Mapping[str, int], settings: FIITEDSettings) -> None:
    header = ["method", "bytes", "weights", "AUC", "AUC - dense", "ms a step", "peak MiB"]
    dense = np.array([u["auc"] for u in rows["dense", 1.0]])
    lines = []
    for (method, fraction), units in rows.items():
        value = f"{mean(units, 'auc'):.4f}"
        if len(units) > 1:
            value += f" ± {std(units, 'auc'):.4f}"
        difference = np.array([u["auc"] for u in units]) - dense
        measured = method == "dense" or fraction == settings.fractions[0]
        peak = f"{peaks[method] / 2**20:.0f}" if measured and method in peaks else ""
        lines.append(
            [
                method, f"{100 * mean(units, 'byte_fraction'):.1f} %",
                f"{100 * mean(units, 'weight_fraction'):.1f} %", value,
                "" if method == "dense" else f"{difference.mean():+.4f}",
                f"{mean(units, 'step_ms'):.1f}", peak,
            ]
        )  # fmt: skip
    report.table("Quality, bytes and time", header, lines)


def _verdict(report: Report, rows: Rows, fraction: float) -> None:
    """Compare FIITED with every other method at equal bytes, and with the dense tables."""
    for mine in ("fiited", "fiited_prefix"):
        if (mine, fraction) not in rows:
            continue
        ours = np.array([u["auc"] for u in rows[mine, fraction]])
        for (method, other), units in rows.items():
            if other not in (1.0, fraction) or method in ("fiited", mine):
                continue
            differences = ours - np.array([u["auc"] for u in units])
            name = f"{mine}-{method}/{fraction:g}"
            sentence = f"{fraction:g}: {mine} {differences.mean():+.4f} AUC against {method}"
            if len(differences) > 1:
                middle, low, high = paired_interval(list(differences))
                report.metric(f"auc_difference/{name}", middle)
                report.metric(f"auc_difference_low/{name}", low)
                report.metric(f"auc_difference_high/{name}", high)
                sentence += f" (95 % interval {low:+.4f} to {high:+.4f}, by seed)"
                if method == "dense":
                    sentence += (
                        f": {'not inferior' if low > -MARGIN else 'non-inferiority not shown'} "
                        f"at a margin of {MARGIN}"
                    )
            else:
                report.metric(f"auc_difference/{name}", float(differences[0]))
                sentence += " (one seed)"
            report.verdict.append(sentence)


def mean(units: Units, measure: str) -> float:
    """Mean of a measure over the seeds."""
    return float(np.mean([u[measure] for u in units]))


def std(units: Units, measure: str) -> float:
    """Sample standard deviation over the seeds; 0 for one seed."""
    return float(np.std([u[measure] for u in units], ddof=1)) if len(units) > 1 else 0.0


def _figure(rows: Rows, settings: FIITEDSettings, stream: CTRStream) -> Any:
    """AUC against bytes, and forecasts over time at the first budget, beside the dense tables."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4))
    left, right = drawing.subplots(1, 2)
    left.axhline(mean(rows["dense", 1.0], "auc"), color="grey", linestyle="--", label="dense")
    for method in dict.fromkeys(m for m, _ in rows if m != "dense"):
        cells = [rows[method, f] for f in sorted(settings.fractions)]
        left.errorbar(
            [100 * mean(u, "byte_fraction") for u in cells],
            [mean(u, "auc") for u in cells],
            yerr=[std(u, "auc") for u in cells],
            marker="o", capsize=3, label=method,
        )  # fmt: skip
    left.set(xlabel="bytes, % of the dense tables", ylabel="AUC on the future")
    left.legend(fontsize=7)
    dense = _windows(rows["dense", 1.0])
    for method in settings.methods:
        if method != "dense":
            windows = _windows(rows[method, settings.fractions[0]])
            length = min(len(windows), len(dense))
            steps = settings.window * np.arange(1, length + 1)
            right.plot(steps, windows[:length] - dense[:length], label=method)
    if isinstance(stream, SyntheticCTR):
        for drift in stream.drift_at:
            if drift < stream.num_samples("train"):
                right.axvline(_batch_of(drift, stream, rows["dense", 1.0]), color="grey", ls=":")
    right.axhline(0, color="grey", linestyle="--")
    right.set(
        xlabel="step", ylabel=f"AUC of forecasts - dense, at {settings.fractions[0]:.0%} of bytes"
    )
    drawing.tight_layout()
    return drawing


def _windows(units: Units) -> np.ndarray:
    length = min(len(u["windows"]) for u in units)
    return np.mean([u["windows"][:length] for u in units], axis=0)


def _facts(report: Report, run: RunContext, settings: FIITEDSettings, stream: CTRStream) -> None:
    report.facts["data"] = stream.source
    seeds = range(run.seed, run.seed + settings.num_seeds)
    report.facts["seeds"] = ", ".join(map(str, seeds))
    report.facts["tables"] = f"{len(stream.table_sizes)} with {sum(stream.table_sizes):,} rows"
    report.facts["examples"] = (
        f"{stream.num_samples('train'):,} to train on, once, in the order of time; "
        f"{stream.num_samples('test'):,} later ones to test on"
    )
    report.facts["optimizer of the tables"] = settings.optimizer
    report.facts["bytes"] = (
        "weights, optimizer state, headers, utilities, free lists, of the dense tables with the "
        "same optimizer"
    )
    report.facts["peak memory"] = (
        f"of a training process of its own, at {settings.fractions[0]:.0%} of the bytes, with "
        f"tables of {settings.memory_scale} times as many rows; imports included"
    )
