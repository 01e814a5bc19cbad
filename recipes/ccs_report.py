"""How the recipe `ccs` reports: tables, the comparison by seed, the figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlkit.coresets.settings import CCSSettings
from mlkit.report import Report, paired_interval

__all__ = ["FULL", "add_tables", "add_verdict", "figure", "mean", "record"]

FULL = "full"
"""Name of the fit on all data."""

Units = list[dict[str, Any]]
"""Results of one cell, a unit per seed."""

Cells = Mapping[tuple[str, float], Units]
"""Cells by method and pruning rate."""


def add_tables(
    report: Report,
    settings: CCSSettings,
    cells: Cells,
    full: Units,
) -> None:
    """Add accuracy and coverage, method by pruning rate."""
    rates = settings.prune_rates
    header = ["method", *(f"{r:.4g} pruned" for r in rates)]
    rows = [[FULL, percent(full), *[""] * (len(rates) - 1)]]
    rows += [[method, *(percent(cells[method, r]) for r in rates)] for method in settings.methods]
    report.table(f"Test accuracy %, mean ± std over {len(full)} seeds", header, rows)
    extra = []
    for method, node in settings.methods.items():
        line = [method]
        for rate in rates:
            cutoff = report.metrics.get(f"cutoff/{method}/{rate:g}", node.get("cutoff"))
            line.append(
                f"{report.metrics[f'coverage_auc/{method}/{rate:g}']:.3f}"
                + ("" if cutoff is None else f" (cutoff {cutoff})")
            )
        extra.append(line)
    report.table(
        "Coverage AUC (mean distance to the nearest example; lower covers better)",
        header,
        extra,
    )


def add_verdict(
    report: Report,
    settings: CCSSettings,
    cells: Cells,
    full: Units,
) -> None:
    """Compare CCS with every other method, paired by seed."""
    if "ccs" not in settings.methods or len(full) < 2:
        return
    for rate in settings.prune_rates:
        for method in settings.methods:
            if method == "ccs":
                continue
            ours = np.array([u["test"] for u in cells["ccs", rate]])
            theirs = np.array([u["test"] for u in cells[method, rate]])
            middle, low, high = paired_interval(ours - theirs)
            name = f"ccs-{method}/{rate:g}"
            report.metric(f"test_accuracy_difference/{name}", middle)
            report.metric(f"test_accuracy_difference_low/{name}", low)
            report.metric(f"test_accuracy_difference_high/{name}", high)
            report.verdict.append(
                f"{rate:g} pruned: ccs {100 * middle:+.1f} points against {method} "
                f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, paired by seed)"
            )


def mean(units: Units, measure: str) -> float:
    """Mean of a measure over the seeds."""
    return float(np.mean([u[measure] for u in units]))


def std(units: Units, measure: str) -> float:
    """Sample standard deviation over the seeds; 0 for one seed."""
    return float(np.std([u[measure] for u in units], ddof=1)) if len(units) > 1 else 0.0


def record(report: Report, name: str, units: Units) -> None:
    """Record the accuracies of a method at a rate."""
    report.metric(f"test_accuracy/{name}", mean(units, "test"))
    report.metric(f"test_accuracy_std/{name}", std(units, "test"))
    if "val" in units[0]:
        report.metric(f"val_accuracy/{name}", mean(units, "val"))


def percent(units: Units) -> str:
    """Test accuracy as text."""
    return f"{100 * mean(units, 'test'):.1f} ± {100 * std(units, 'test'):.1f}"


def figure(cells: Cells, full: Units) -> Any:
    """Accuracy and coverage against the pruning rate."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4))
    left, right = drawing.subplots(1, 2)
    left.axhline(100 * mean(full, "test"), color="grey", linestyle="--", label=FULL)
    for method in dict.fromkeys(m for m, _ in cells):
        rates = sorted(r for m, r in cells if m == method)
        units = [cells[method, r] for r in rates]
        left.errorbar(
            rates,
            [100 * mean(u, "test") for u in units],
            yerr=[100 * std(u, "test") for u in units],
            marker="o",
            capsize=3,
            label=method,
        )
        right.plot(rates, [mean(u, "coverage_auc") for u in units], marker="o", label=method)
    left.set(xlabel="share pruned", ylabel="test accuracy %", title="accuracy")
    right.set(
        xlabel="share pruned", ylabel="AUC_pr", title="coverage of test features (lower is better)"
    )
    left.legend()
    right.legend()
    return drawing
