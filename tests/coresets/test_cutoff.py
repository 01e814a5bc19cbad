"""Choosing the cutoff: search on validation, and the heuristic."""

import numpy as np
import pytest

from mlkit.coresets import (
    CCS,
    ArrayScore,
    ScoreTable,
    auto_cutoff,
    mislabel_fraction,
    search_cutoff,
)
from mlkit.errors import InvalidValueError


def _table(num_samples=100):
    return ScoreTable({"aum": np.linspace(-1, 1, num_samples, dtype=np.float32)})


def test_search_finds_the_best_beta_and_leaves_out_those_above_the_rate():
    tried = []

    def train(selection):
        cutoff = selection.report["cutoff"]
        tried.append(cutoff)
        return {"val_acc": 1 - abs(cutoff - 0.2)}

    found = search_cutoff(train, _table(), 0.3, selector=CCS(prune_rate=0.9, num_strata=4, seed=7))
    assert tried == [0.0, 0.1, 0.2, 0.3]
    assert found.cutoff == 0.2
    assert found.metrics[0.2] == 1
    assert len(found.selection) == 70
    assert found.selection.report["settings"]["num_strata"] == 4
    assert found.selection.report["settings"]["seed"] == 7


def test_ties_go_to_the_smaller_beta_and_min_mode_works():
    assert search_cutoff(lambda s: {"val_acc": 0.5}, _table(), 0.9).cutoff == 0.0
    found = search_cutoff(
        lambda s: {"loss": -s.report["cutoff"]}, _table(), 0.9, metric="loss", mode="min"
    )
    assert found.cutoff == 0.5


def test_search_errors():
    with pytest.raises(InvalidValueError, match=r"returned \['acc'\], not the metric 'val_acc'"):
        search_cutoff(lambda s: {"acc": 1.0}, _table(), 0.9)
    with pytest.raises(InvalidValueError, match="no cutoff to try"):
        search_cutoff(lambda s: {"val_acc": 1.0}, _table(), 0.2, betas=(0.3, 0.4))
    with pytest.raises(InvalidValueError, match="mode must be"):
        search_cutoff(lambda s: {"val_acc": 1.0}, _table(), 0.2, mode="best")


def test_mislabelled_share_from_margins():
    margins = np.concatenate([np.full(90, 0.5), np.full(10, -0.4)])
    aum = ArrayScore(margins, "low", "aum")
    assert mislabel_fraction(aum) == pytest.approx(0.1)
    # Threshold samples: ten examples under a label that fits none of them, margins up to 0.2.
    with_thresholds = np.concatenate([margins, np.linspace(-0.9, 0.2, 10)])
    samples = np.arange(100, 110)
    aum = ArrayScore(with_thresholds, "low", "aum")
    assert mislabel_fraction(aum, samples) == pytest.approx(0.1)
    with pytest.raises(InvalidValueError, match="hard when low"):
        mislabel_fraction(ArrayScore(margins, "high", "el2n"))


def test_auto_is_the_larger_of_table_and_estimate_and_never_above_the_rate():
    clean = ArrayScore(np.full(100, 0.5), "low", "aum")
    noisy = ArrayScore(np.where(np.arange(100) < 40, -0.5, 0.5), "low", "aum")
    assert auto_cutoff(0.9, clean)[0] == 0.3
    assert auto_cutoff(0.8, clean)[0] == 0.1
    assert auto_cutoff(0.9, noisy)[0] == 0.4
    assert auto_cutoff(0.25, noisy)[0] == 0.25
    assert auto_cutoff(0.9, ArrayScore(np.full(9, 0.5), "high", "el2n"))[0] == 0.3
    chosen = CCS(prune_rate=0.9, cutoff="auto").select(noisy)
    assert chosen.report["cutoff"] == 0.4
    assert chosen.report["cutoff_because"].startswith("heuristic")
    assert chosen.indices.min() >= 40
