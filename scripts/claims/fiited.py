"""Claims of FIITED (arXiv 2401.04408).

The paper's industry models and its tables of AUC are not public: what can be held against it is the
shape, more than 65 % of the bytes saved at neutral quality, and row pruning behind at equal bytes.
"""

from __future__ import annotations

import re

from mlkit.report import Table
from scripts.claims._claim import Claim, Figure, Metrics

__all__ = ["CLAIMS"]

_MARGIN = 0.001


def table(metrics: Metrics) -> Table:
    """AUC by method and budget, with the bytes and the weights that it had."""
    fractions: set[str] = set()
    cells: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        match = re.fullmatch(r"auc/([^/]+)/([\d.]+)", name)
        if not match:
            continue
        method, fraction = match.groups()
        spread = metrics.get(f"auc_std/{method}/{fraction}", 0.0)
        text = f"{value:.4f} ± {spread:.4f}" if spread else f"{value:.4f}"
        weights = metrics[f"weight_fraction/{method}/{fraction}"]
        if fraction != "1":
            text += f" ({100 * weights:.0f} % of the weights)"
        cells.setdefault(method, {})[fraction] = text
        fractions.add(fraction)
    ordered = sorted(fractions, key=float, reverse=True)
    header = ["dense" if f == "1" else f"{100 * float(f):g} % of the bytes" for f in ordered]
    return Table(
        "AUC on the future, mean ± std over the seeds",
        ["method", *header],
        [[method, *(row.get(f, "") for f in ordered)] for method, row in cells.items()],
    )


def verdict(metrics: Metrics) -> str:
    """Where FIITED is above, below or not told apart from each other method."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in metrics:
        match = re.fullmatch(r"auc_difference/fiited-([^/]+)/([\d.]+)", name)
        if not match:
            continue
        method, fraction = match.groups()
        low, high = (
            metrics.get(f"auc_difference_{e}/fiited-{method}/{fraction}") for e in ("low", "high")
        )
        if low is None or high is None:
            side = "compared on one seed with"
        elif method == "dense" and low > -_MARGIN:
            side = f"not inferior (margin {_MARGIN}) to"
        else:
            side = "above" if low > 0 else "below" if high < 0 else "not told apart from"
        at = f"{100 * float(fraction):g} %"
        found.setdefault(method, {}).setdefault(side, []).append(at)
    return " ".join(
        "FIITED is "
        + ", ".join(f"{side} {method} at {' and '.join(at)}" for side, at in sides.items())
        + "."
        for method, sides in found.items()
    )


_NAMES = {
    "dense": "the dense tables",
    "fiited_prefix": "chunks in order (prefix)",
    "adaembed": "row pruning (AdaEmbed)",
    "narrow": "a smaller dimension for all",
    "hashing": "the hashing trick",
    "qr": "quotient-remainder tables",
    "mde": "mixed dimensions (MDE)",
    "cafe": "CAFE",
}

_PAPER = {
    "dense": "neutral quality at more than 65 % fewer bytes (industry models)",
    "fiited_prefix": "not compared",
    "adaembed": "more is saved than by AdaEmbed at neutral quality",
    "narrow": "not compared",
    "hashing": "not compared",
    "qr": "not compared",
    "mde": "not compared",
    "cafe": "in version 2, from memory",
}


def _figures(fractions: tuple[str, ...], headline: str) -> tuple[Figure, ...]:
    return tuple(
        Figure(
            what=f"FIITED against {_NAMES[method]}, {100 * float(fraction):g} % of the bytes",
            metric=f"auc_difference/fiited-{method}/{fraction}",
            paper=paper,
            unit="AUC",
            margin=_MARGIN if method == "dense" else None,
            is_headline=fraction == headline,
        )
        for fraction in fractions
        for method, paper in _PAPER.items()
    )


CLAIMS = [
    Claim(
        name="fiited-synthetic",
        system="fiited",
        title="65 % fewer bytes at the quality of dense tables: a synthetic stream that drifts",
        overrides=("recipe=fiited", "experiment=fiited/curve", "seed=10"),
        paper=_figures(("0.35", "0.2"), "0.35"),
        verdict=verdict,
        table=table,
    ),
    Claim(
        name="fiited-movielens",
        system="fiited",
        title="The same on MovieLens-100k, in the order of time (D = 16)",
        overrides=("recipe=fiited", "experiment=fiited/movielens100k", "seed=10"),
        paper=_figures(("0.5", "0.35"), "none"),
        verdict=verdict,
        table=table,
        needs_data="movielens100k",
    ),
]
