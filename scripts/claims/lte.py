"""Claims of Learn-To-be-Efficient (Zheng et al., NeurIPS 2024, arXiv 2402.06126).

The paper reports curves of quality over sparsity for models that do not fit here (RoBERTa on GLUE,
GPT-2 and LLaMA-7B on text): what can be held against them is the order of the methods.
"""

from __future__ import annotations

import re

from mlkit.report import Table
from scripts.claims._claim import Claim, Figure, Metrics

__all__ = ["CLAIMS"]


def table(metrics: Metrics) -> Table:
    """Quality at the measured sparsity, by method and target."""
    targets: set[str] = set()
    cells: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        match = re.fullmatch(r"quality/([^/]+)/([\d.]+)", name)
        if not match:
            continue
        method, target = match.groups()
        spread = metrics.get(f"quality_std/{method}/{target}", 0.0)
        is_loss = value < 0
        text = f"{-value:.3f}" if is_loss else f"{100 * value:.1f}"
        if spread:
            text += f" ± {spread:.3f}" if is_loss else f" ± {100 * spread:.1f}"
        sparsity = metrics.get(f"ffn_sparsity/{method}/{target}")
        if sparsity:
            text += f" (at {100 * sparsity:.1f} %)"
        cells.setdefault(method, {})[target] = text
        targets.add(target)
    ordered = sorted(targets, key=float)
    header = ["dense" if target == "0" else f"{float(target):.0%} skipped" for target in ordered]
    kind = "Loss, nats per token" if metrics["quality/dense/0"] < 0 else "Accuracy %"
    title = f"{kind}, mean ± std over the seeds (at the measured FFN sparsity)"
    return Table(
        title,
        ["method", *header],
        [[method, *(row.get(target, "") for target in ordered)] for method, row in cells.items()],
    )


def verdict(metrics: Metrics) -> str:
    """Where LTE is above, below or not told apart from each other method."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, value in metrics.items():
        match = re.fullmatch(r"quality_difference/lte-([^/]+)/([\d.]+)", name)
        if not match:
            continue
        method, target = match.groups()
        ends = [
            metrics.get(f"quality_difference_{e}/lte-{method}/{target}") for e in ("low", "high")
        ]
        if ends[0] is None or ends[1] is None:
            side = "above (no interval)" if value > 0 else "below (no interval)"
        else:
            side = "above" if ends[0] > 0 else "below" if ends[1] < 0 else "not told apart from"
        found.setdefault(method, {}).setdefault(side, []).append(f"{float(target):.0%}")
    return " ".join(
        "LTE is "
        + ", ".join(f"{side} {method} at {' and '.join(at)}" for side, at in sides.items())
        + "."
        for method, sides in found.items()
    )


def _figure(
    method: str,
    target: str,
    paper: str,
    unit: str,
    *,
    margin: float | None = None,
    is_headline: bool = False,
) -> Figure:
    names = {
        "dense": "the dense model",
        "magnitude": "magnitude thresholds (TEAL)",
        "moefication": "the best k experts (MoEfication)",
        "random_router": "random routers",
        "fixed_router": "routers fixed at the experts' centres",
        "lte_literal": "its equations as printed",
        "lte_late": "lambda late, from random routers",
    }
    return Figure(
        what=f"LTE against {names[method]}, {float(target):.0%} of the FFN skipped",
        metric=f"quality_difference/lte-{method}/{target}",
        paper=paper,
        unit=unit,
        margin=margin,
        is_headline=is_headline,
    )


_ORDER = {
    "magnitude": "not compared; above Deja Vu, whose predictors choose neurons (figures 4 and 5)",
    "moefication": "above; MoEfication breaks at 70 to 80 % (figures 4 and 5)",
    "random_router": "above everywhere (figure on random routers)",
    "fixed_router": "not compared: the start of our routers",
}

CLAIMS = [
    Claim(
        name="lte-pydoc",
        system="lte",
        title="Trained routers lose less than other ways to skip neurons: a small Llama on "
        "Python's help texts",
        overrides=("recipe=lte", "experiment=lte/curve"),
        paper=tuple(
            _figure(method, target, paper, "nats", is_headline=target == "0.75")
            for target in ("0.5", "0.75", "0.9")
            for method, paper in _ORDER.items()
        ),
        verdict=verdict,
        table=table,
    ),
    Claim(
        name="lte-presets",
        system="lte",
        title="Settings of LTE: as printed, with lambda late, and ours (decision 005)",
        overrides=("recipe=lte", "experiment=lte/presets"),
        paper=tuple(
            _figure(method, "0.75", "none: the paper does not say how its routers start", "nats")
            for method in ("lte_literal", "lte_late", "fixed_router", "random_router")
        ),
        verdict=verdict,
        table=table,
    ),
    Claim(
        name="lte-vader-movie",
        system="lte",
        title="No loss of accuracy at 80 % FFN sparsity: MiniLM on movie reviews",
        overrides=("recipe=lte", "experiment=lte/vader_movie"),
        paper=(
            _figure(
                "dense",
                "0.8",
                "no drop at 80 to 95 % (RoBERTa on GLUE)",
                "points",
                margin=0.01,
                is_headline=True,
            ),
            *(
                _figure(method, "0.8", paper, "points", is_headline=method != "fixed_router")
                for method, paper in _ORDER.items()
            ),
        ),
        verdict=verdict,
        needs_data="vader_movie",
        table=table,
    ),
    Claim(
        name="lte-smollm2",
        system="lte",
        title="The same for SmolLM2-135M on the Brown corpus",
        overrides=("recipe=lte", "experiment=lte/smollm2", "trainer=gpu"),
        paper=(
            _figure("moefication", "0.75", _ORDER["moefication"], "nats"),
            _figure("random_router", "0.75", _ORDER["random_router"], "nats"),
        ),
        verdict=verdict,
        needs_data="smollm2_135m",
        is_heavy=True,
        table=table,
    ),
]
