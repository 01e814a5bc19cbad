"""Claims of Coverage-centric Coreset Selection (Zheng et al., ICLR 2023, arXiv 2210.15809).

"from memory": tables of the paper that could not be read again; "abstract" figures are quoted.
"""

from __future__ import annotations

import re

from mlkit.report import Table
from scripts.claims._claim import Claim, Figure, Metrics

__all__ = ["CLAIMS"]


def verdict(metrics: Metrics) -> str:
    """Where CCS is above, below or not told apart from each other method."""
    measure = "test_accuracy_difference"
    found: dict[str, dict[str, list[str]]] = {}
    for name, value in metrics.items():
        match = re.fullmatch(rf"{measure}/ccs-([^/]+)/([\d.]+)", name)
        if not match:
            continue
        method, rate = match.groups()
        low = metrics.get(f"{measure}_low/ccs-{method}/{rate}")
        high = metrics.get(f"{measure}_high/ccs-{method}/{rate}")
        if low is None or high is None:
            outcome = f"{100 * value:+.1f} points (no interval) from"
        else:
            outcome = "above" if low > 0 else "below" if high < 0 else "not told apart from"
        found.setdefault(method, {}).setdefault(outcome, []).append(rate)
    sentences = [
        "CCS is "
        + ", ".join(f"{outcome} {method} at {_list(rates)}" for outcome, rates in sides.items())
        + " pruned."
        for method, sides in found.items()
    ]
    return " ".join(sentences) or "One seed has no interval: see the table."


def table(metrics: Metrics) -> Table:
    """Test accuracy by method and pruning rate."""
    cells: dict[str, dict[str, str]] = {}
    rates: set[str] = set()
    for name, value in metrics.items():
        match = re.fullmatch(r"test_accuracy/([^/]+)/([\d.]+)", name)
        if not match:
            continue
        method, rate = match.groups()
        std = metrics.get(f"test_accuracy_std/{method}/{rate}")
        spread = "" if std is None else f" ± {100 * std:.1f}"
        cutoff = metrics.get(f"cutoff/{method}/{rate}")
        beta = "" if cutoff is None else f" (cutoff {cutoff:g})"
        cells.setdefault(method, {})[rate] = f"{100 * value:.1f}{spread}{beta}"
        rates.add(rate)
    ordered = sorted(rates, key=float)
    header = ["nothing pruned" if rate == "0" else f"{rate} pruned" for rate in ordered]
    rows = [[method, *(row.get(rate, "") for rate in ordered)] for method, row in cells.items()]
    return Table("Test accuracy %, mean ± std over the seeds", ["method", *header], rows)


def _list(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _figure(method: str, rate: str, paper: str) -> Figure:
    name = {"random": "a random subset", "hardest": "the hardest by AUM"}[method]
    return Figure(
        what=f"CCS against {name}, {rate} pruned",
        metric=f"test_accuracy_difference/ccs-{method}/{rate}",
        paper=paper,
        terms=(f"test_accuracy/ccs/{rate}", f"test_accuracy/{method}/{rate}"),
        is_headline=rate == "0.9",
    )


_CIFAR10 = (
    _figure("random", "0.7", "+2.1 points (CIFAR10; from memory)"),
    _figure("hardest", "0.7", "+1.6 points (CIFAR10; from memory)"),
    _figure("random", "0.9", "+7.04 points (CIFAR10; abstract)"),
    _figure("hardest", "0.9", "+58.0 points (CIFAR10; from memory)"),
)

_BEYOND = (
    _figure("random", "0.95", "none: beyond the paper's rates"),
    _figure("hardest", "0.95", "none: beyond the paper's rates"),
)

CLAIMS = [
    Claim(
        name="ccs-digits",
        system="ccs",
        title="CCS holds up at high pruning rates, where the hardest examples alone fail: digits",
        overrides=("recipe=ccs",),
        paper=(*_CIFAR10, *_BEYOND),
        verdict=verdict,
        table=table,
    ),
    Claim(
        name="ccs-digits-label-noise",
        system="ccs",
        title="The same with a tenth of the training labels redrawn: digits",
        overrides=("recipe=ccs", "data.label_noise=0.1"),
        paper=(*_CIFAR10, *_BEYOND),
        verdict=verdict,
        table=table,
    ),
    Claim(
        name="ccs-selectors",
        system="ccs",
        title="Every selector of the room on the same scores, features and budget: digits",
        overrides=("recipe=ccs", "experiment=ccs/selectors"),
        paper=(*_CIFAR10[2:], *_BEYOND),
        verdict=verdict,
        table=table,
    ),
    Claim(
        name="ccs-fashion-mnist",
        system="ccs",
        title="The same on the complete Fashion-MNIST",
        overrides=("recipe=ccs", "experiment=ccs/fashion_mnist"),
        paper=(*_CIFAR10[2:], *_BEYOND),
        verdict=verdict,
        needs_data="fashion_mnist",
        table=table,
    ),
    Claim(
        name="ccs-cifar10",
        system="ccs",
        title="The paper's CIFAR10 table, ResNet-18",
        overrides=("recipe=ccs", "experiment=ccs/cifar10", "trainer=gpu"),
        paper=_CIFAR10,
        verdict=verdict,
        needs_data="cifar10",
        is_heavy=True,
        table=table,
    ),
    Claim(
        name="ccs-cifar100",
        system="ccs",
        title="The paper's CIFAR100 table, ResNet-18",
        overrides=("recipe=ccs", "experiment=ccs/cifar100", "trainer=gpu"),
        paper=(
            _figure("random", "0.7", "+3.6 points (CIFAR100; from memory)"),
            _figure("hardest", "0.7", "+38.3 points (CIFAR100; from memory)"),
            _figure("random", "0.9", "+9 to +12 points (CIFAR100; from memory)"),
            _figure("hardest", "0.9", "+45 to +48 points (CIFAR100; from memory)"),
        ),
        verdict=verdict,
        needs_data="cifar100",
        is_heavy=True,
        table=table,
    ),
]
