"""How the recipe `lte` reports: the table, the comparison by seed, sparsity by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlkit.data import TextSpec
from mlkit.report import Report, RunContext, paired_interval
from mlkit.sparsity.settings import LTESettings

if TYPE_CHECKING:
    from recipes.lte import Cell

__all__ = ["report_of"]

Units = list[dict[str, Any]]
"""Results of a method at a target, a unit per seed."""

Rows = Mapping[tuple[str, float], Units]


def report_of(
    run: RunContext,
    settings: LTESettings,
    data: TextSpec,
    cells: Sequence[Cell],
    times: Mapping[str, Mapping[str, float]],
) -> Report:
    """Return the report of a finished run."""
    report = Report("Learned activation sparsity (LTE)")
    rows: dict[tuple[str, float], Units] = {}
    for cell in cells:
        rows.setdefault((cell.method, cell.target), []).append(run.finished[cell.key])
    for (method, target), units in rows.items():
        name = f"{method}/{target:g}"
        report.metric(f"quality/{name}", mean(units, "quality"))
        report.metric(f"quality_std/{name}", std(units, "quality"))
        report.metric(f"ffn_sparsity/{name}", mean(units, "sparsity"))
        report.metric(f"decode_ms/{name}", times[name]["ms"])
        report.metric(f"decode_speedup/{name}", times[name]["dense_ms"] / times[name]["ms"])
        if method != "dense":
            report.metric(f"flops_fraction/{name}", mean(units, "flops_fraction"))
        if "undecided" in units[0]:
            report.metric(f"undecided/{name}", mean(units, "undecided"))
    is_accuracy = data.task == "classification"
    if "tfidf" in run.finished:
        report.metric("quality/tfidf/0", run.finished["tfidf"]["quality"])
        report.facts["TF-IDF"] = (
            f"{100 * run.finished['tfidf']['quality']:.1f} % by logistic regression on words and "
            "pairs of words"
        )
    _table(report, rows, times, is_accuracy)
    for target in settings.targets:
        _verdict(report, rows, target, is_accuracy)
    report.figure("quality_and_layers", _figure(rows, settings.targets, is_accuracy))
    _facts(report, run, settings, data)
    return report


def _table(
    report: Report, rows: Rows, times: Mapping[str, Mapping[str, float]], is_accuracy: bool
) -> None:
    quality = "accuracy %" if is_accuracy else "loss, nats per token"
    header = [
        "method", "target", quality, "FFN sparsity", "FLOPs of the blocks",
        "decode of a wide layer, ms", "against dense",
    ]  # fmt: skip
    lines = []
    for (method, target), units in rows.items():
        scale = 100 if is_accuracy else -1
        digits = 1 if is_accuracy else 3
        value = f"{scale * mean(units, 'quality'):.{digits}f}"
        if len(units) > 1:
            value += f" ± {abs(scale) * std(units, 'quality'):.{digits}f}"
        cost = times[f"{method}/{target:g}"]
        flops = 1.0 if method == "dense" else mean(units, "flops_fraction")
        lines.append(
            [
                method, f"{target:g}", value, f"{100 * mean(units, 'sparsity'):.1f} %",
                f"{100 * flops:.0f} %", f"{cost['ms']:.2f}",
                f"{cost['dense_ms'] / cost['ms']:.2f}x",
            ]
        )  # fmt: skip
    report.table("Quality, sparsity and time", header, lines)


def _verdict(report: Report, rows: Rows, target: float, is_accuracy: bool) -> None:
    """Compare LTE with every other method at a target."""
    ours = np.array([u["quality"] for u in rows["lte", target]])
    unit, scale = ("points", 100) if is_accuracy else ("nats", 1)
    for (method, other), units in rows.items():
        if method == "lte" or other not in (0.0, target):
            continue
        differences = ours - np.array([u["quality"] for u in units])
        name = f"lte-{method}/{target:g}"
        sentence = f"{target:g}: lte {scale * differences.mean():+.3f} {unit} against {method}"
        if len(differences) > 1:
            middle, low, high = paired_interval(list(differences))
            report.metric(f"quality_difference/{name}", middle)
            report.metric(f"quality_difference_low/{name}", low)
            report.metric(f"quality_difference_high/{name}", high)
            sentence += f" (95 % interval {scale * low:+.3f} to {scale * high:+.3f}, by seed)"
        else:
            report.metric(f"quality_difference/{name}", float(differences[0]))
            sentence += " (one seed)"
        report.verdict.append(sentence)
    reached = mean(rows["lte", target], "sparsity")
    layers = np.mean([u["layers"] for u in rows["lte", target]], axis=0)
    report.verdict.append(
        f"{target:g}: lte skips {100 * reached:.1f} % in the mean, by layer "
        f"{', '.join(f'{100 * share:.0f}' for share in layers)} %"
    )


def mean(units: Units, measure: str) -> float:
    """Mean of a measure over the seeds."""
    return float(np.mean([u[measure] for u in units]))


def std(units: Units, measure: str) -> float:
    """Sample standard deviation over the seeds; 0 for one seed."""
    return float(np.std([u[measure] for u in units], ddof=1)) if len(units) > 1 else 0.0


def _figure(rows: Rows, targets: Sequence[float], is_accuracy: bool) -> Any:
    """Quality against measured sparsity, and the sparsity of each layer."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4))
    left, right = drawing.subplots(1, 2)
    scale = 100 if is_accuracy else -1
    left.axhline(
        scale * mean(rows["dense", 0.0], "quality"), color="grey", linestyle="--", label="dense"
    )
    for method in dict.fromkeys(m for m, _ in rows if m != "dense"):
        cells = [rows[method, t] for t in sorted(targets)]
        left.errorbar(
            [100 * mean(u, "sparsity") for u in cells],
            [scale * mean(u, "quality") for u in cells],
            yerr=[abs(scale) * std(u, "quality") for u in cells],
            marker="o",
            capsize=3,
            label=method,
        )
    left.set(
        xlabel="FFN sparsity %", ylabel="accuracy %" if is_accuracy else "loss, nats per token"
    )
    left.legend()
    for target in targets:
        layers = 100 * np.array([u["layers"] for u in rows["lte", target]])
        positions = np.arange(layers.shape[1])
        line = right.plot(positions, layers.mean(0), marker="o", label=f"lte, target {target:g}")
        if len(layers) > 1:
            right.fill_between(
                positions, layers.min(0), layers.max(0), alpha=0.2, color=line[0].get_color()
            )
    right.set(xlabel="layer", ylabel="sparsity %", title="what LTE chose for each layer")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    return drawing


def _facts(report: Report, run: RunContext, settings: LTESettings, data: TextSpec) -> None:
    seeds = range(run.seed, run.seed + settings.num_seeds)
    sizes = settings.decode_sizes()
    report.facts |= {
        "data": f"{data.name} ({data.source()})",
        "quality": "accuracy on the test part"
        if data.task == "classification"
        else "negative mean cross entropy on the test part, nats per token",
        "seeds": ", ".join(map(str, seeds)),
        "steps": f"{settings.start_steps} dense ones, then {settings.steps} of every method",
        "batch": f"{data.batch_size} x {data.sequence_length} tokens",
        "timed layer": f"{sizes['hidden_size']} x {sizes['intermediate_size']}, float32, one "
        "token, random weights; not the recipe's model",
        "moefication": "top-k by all values of each token: no router could choose better",
    }
