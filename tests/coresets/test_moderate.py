"""Moderate Coreset against a loop written from the paper, and its properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.coresets.counts import num_selected
from mlkit.coresets.keyed import keyed_hash
from mlkit.coresets.moderate import Moderate, moderate_window
from mlkit.coresets.pipeline import HardCutoff, Pipeline
from mlkit.errors import InvalidValueError


def data(n, num_classes=3, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    features = rng.normal(size=(n, dim)) * (1 + labels[:, None]) + 5 * labels[:, None]
    return features.astype(np.float32), labels


def reference_distances(features, labels):
    distances = np.empty(len(features))
    for i, (feature, label) in enumerate(zip(features, labels, strict=True)):
        members = features[labels == label].astype(np.float64)
        distances[i] = np.sqrt(
            ((feature.astype(np.float64) - np.median(members, axis=0)) ** 2).sum()
        )
    return distances


def middle(distances, members, m):
    ranked = sorted(members, key=lambda i: distances[i])
    a = (len(ranked) - m) // 2
    return ranked[a : a + m]


def test_global_window_is_the_official_rule():
    features, labels = data(200)
    distances = reference_distances(features, labels)
    chosen = Moderate(prune_rate=0.7, class_balanced=False).select(features=features, labels=labels)
    # tmllab/2023_ICLR_Moderate-DS, get_prune_idx with rate = 0.3: ranks round(n/2 -+ n * rate / 2).
    official = np.argsort(distances)[round(200 * 0.35) : round(200 * 0.65)]
    assert set(chosen.indices) == set(official)


def test_window_per_class():
    features, labels = data(91)
    distances = reference_distances(features, labels)
    chosen = Moderate(prune_rate=0.6).select(features=features, labels=labels)
    expected = []
    for c in range(3):
        members = np.flatnonzero(labels == c)
        expected += middle(distances, members, int((labels[chosen.indices] == c).sum()))
    assert sorted(expected) == chosen.indices.tolist()
    assert np.all(np.abs(np.bincount(labels[chosen.indices]) - 0.4 * np.bincount(labels)) < 1)


def test_keeps_neither_the_typical_nor_the_odd():
    features = np.array([0.1, -0.1, 2.0, -2.0, 2.1, -2.1, 50.0, -50.0])[:, None]
    chosen = Moderate(prune_rate=0.5).select(features=features, labels=np.zeros(8, int))
    assert chosen.indices.tolist() == [2, 3, 4, 5]


@given(
    n=st.integers(1, 60),
    prune_rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]),
    class_balanced=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_size_and_equivariance(n, prune_rate, class_balanced, seed):
    features, labels = data(n, seed=seed)
    features = np.round(features)  # Many equal distances.
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10_000)[:n]
    rule = Moderate(prune_rate=prune_rate, class_balanced=class_balanced, seed=seed)
    chosen = rule.select(features=features, labels=labels, ids=ids).indices
    assert len(chosen) == num_selected(n, prune_rate) == len(set(chosen.tolist()))
    assert np.all(np.diff(chosen) > 0)
    order = rng.permutation(n)
    again = rule.select(features=features[order], labels=labels[order], ids=ids[order]).indices
    assert set(ids[chosen]) == set(ids[order][again])


def test_equal_distances_go_by_keyed_hash():
    features, labels = np.ones((50, 3)), np.zeros(50, int)
    for seed in (0, 1):
        chosen = Moderate(prune_rate=0.6, seed=seed).select(features=features, labels=labels)
        by_hash = np.argsort(keyed_hash(np.arange(50), seed))
        assert set(chosen.indices) == set(by_hash[15:35])


def test_only_candidates_count():
    features, labels = data(60)[0], np.arange(60) % 3
    scores = np.arange(60.0)
    stages = [HardCutoff(cutoff=0.5), Moderate(prune_rate=0.7)]
    chosen = Pipeline(stages).select(scores, hard="high", features=features, labels=labels).indices
    alone = Moderate(prune_rate=0.4).select(features=features[:30], labels=labels[:30]).indices
    assert chosen.tolist() == alone.tolist()


def test_short_class_gives_its_places_away_with_a_warning():
    features, labels = data(40, num_classes=2)
    scores = np.where(labels == 1, 1.0, 0.0)
    share = (labels == 1).mean().round(2) - 0.05
    stages = [HardCutoff(cutoff=float(share)), Moderate(prune_rate=0.5)]
    with pytest.warns(UserWarning, match="fewer members left than their quota"):
        chosen = Pipeline(stages).select(scores, hard="high", features=features, labels=labels)
    assert len(chosen) == 20


@pytest.mark.parametrize(
    ("n", "m", "expected"), [(5, 0, []), (1, 1, [0]), (4, 1, [1]), (4, 4, None)]
)
def test_window_edges(n, m, expected):
    rows = moderate_window(np.arange(n, dtype=float), m)
    assert rows.tolist() == (list(range(n)) if expected is None else expected)


def test_bad_input():
    features, labels = data(10)
    rule = Moderate(prune_rate=0.5)
    with pytest.raises(InvalidValueError, match="Moderate needs features"):
        rule.select(labels=labels)
    with pytest.raises(InvalidValueError, match="Moderate needs labels"):
        rule.select(features=features)
    features[3], features[7] = np.nan, np.inf
    with pytest.raises(
        InvalidValueError, match=r"of 2 examples are NaN or infinite \(first index 3"
    ):
        rule.select(features=features, labels=np.zeros(10, int))
    with pytest.raises(InvalidValueError, match="prune_rate must be a number in"):
        Moderate(prune_rate=1.0)
