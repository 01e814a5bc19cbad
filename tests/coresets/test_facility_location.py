"""Facility location against brute-force greedy and the exhaustive optimum, and its properties."""

import importlib.util
import itertools
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances

from mlkit.coresets.counts import num_selected
from mlkit.coresets.facility_location import FacilityLocation, lazy_greedy, similarities
from mlkit.coresets.pipeline import HardCutoff, Pipeline
from mlkit.errors import InvalidValueError, MissingDependencyError


def value(similarity, chosen):
    return float(similarity[list(chosen)].max(axis=0).sum(dtype=np.float64)) if len(chosen) else 0.0


def brute_force(similarity, m):
    chosen = []
    for _ in range(m):
        left = [i for i in range(len(similarity)) if i not in chosen]
        chosen.append(max(left, key=lambda i: value(similarity, [*chosen, i])))
    return chosen


def random_similarity(n, seed):
    similarity = np.random.default_rng(seed).random((n, n)).astype(np.float32)
    return np.maximum(similarity, similarity.T)


@given(n=st.integers(1, 25), share=st.floats(0, 1), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_lazy_equals_brute_force_greedy(n, share, seed):
    similarity, m = random_similarity(n, seed), round(share * n)
    chosen, reached = lazy_greedy(similarity, m)
    expected = brute_force(similarity, m)
    # Marginal sums and whole sums round differently: compare sets by value, to float32 precision.
    assert len(set(chosen.tolist())) == m
    assert reached == pytest.approx(value(similarity, expected), rel=1e-5)
    assert reached == pytest.approx(value(similarity, chosen), rel=1e-6)


@given(n=st.integers(1, 25), share=st.floats(0, 1), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_lazy_equals_eager_exactly_with_ties(n, share, seed):
    # Whole numbers: every sum is exact, and gains are often equal.
    similarity = np.round(random_similarity(n, seed) * 3)
    m = round(share * n)
    covered, expected = np.zeros(n), []
    for _ in range(m):
        gains = np.maximum(similarity - covered, 0).sum(axis=1)
        gains[expected] = -1
        expected.append(int(np.argmax(gains)))
        covered = np.maximum(covered, similarity[expected[-1]])
    assert lazy_greedy(similarity, m)[0].tolist() == expected


def test_greedy_reaches_1_minus_1_over_e_of_the_optimum():
    for seed in range(30):
        similarity = random_similarity(9, seed)
        best = max(value(similarity, s) for s in itertools.combinations(range(9), 3))
        assert lazy_greedy(similarity, 3)[1] >= (1 - 1 / np.e) * best


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_similarities_against_sklearn(offset):
    features = (np.random.default_rng(0).normal(size=(70, 5)) + offset).astype(np.float32)
    distances = pairwise_distances(features.astype(np.float64))
    # float32 result: half a unit in the last place of the largest distance, and its rounding.
    np.testing.assert_allclose(
        similarities(features, "l2"), distances.max() - distances, atol=distances.max() * 2e-7
    )
    cosine = 2 - pairwise_distances(features.astype(np.float64), metric="cosine")
    np.testing.assert_allclose(similarities(features, "cosine"), cosine, atol=4e-7)


def test_blocks_do_not_change_similarities(monkeypatch):
    features = np.random.default_rng(0).normal(size=(50, 5))
    whole = similarities(features, "l2")
    monkeypatch.setattr("mlkit.coresets.facility_location._BLOCK_BYTES", 8 * 50 * 7)
    np.testing.assert_allclose(similarities(features, "l2"), whole, rtol=1e-6, atol=1e-6)


def test_one_of_each_cluster():
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    features = np.repeat(centres, 10, axis=0) + np.random.default_rng(0).normal(size=(40, 2))
    chosen = FacilityLocation(prune_rate=0.9).select(features=features)
    assert (chosen.indices // 10).tolist() == [0, 1, 2, 3]
    similarity = similarities(features, "l2")
    assert chosen.report["objective"] == pytest.approx(value(similarity, chosen.indices), rel=1e-6)


def test_per_class():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 3)), np.repeat([0, 1], [40, 20])
    chosen = FacilityLocation(prune_rate=0.8, class_balanced=True).select(
        features=features, labels=labels
    )
    assert chosen.report["class_histogram"] == {"0": 8, "1": 4}
    alone = FacilityLocation(prune_rate=0.8).select(features=features[:40])
    assert chosen.indices[:8].tolist() == alone.indices.tolist()


@given(
    n=st.integers(1, 40),
    prune_rate=st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    metric=st.sampled_from(["l2", "cosine"]),
    class_balanced=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_size_and_equivariance(n, prune_rate, metric, class_balanced, seed):
    rng = np.random.default_rng(seed)
    features = np.round(rng.normal(size=(n, 2)))  # Ties, copies and zero vectors.
    labels, ids = rng.integers(0, 2, n), rng.permutation(10_000)[:n]
    rule = FacilityLocation(
        prune_rate=prune_rate, metric=metric, class_balanced=class_balanced, seed=seed
    )
    chosen = rule.select(features=features, labels=labels, ids=ids).indices
    assert len(chosen) == num_selected(n, prune_rate) == len(set(chosen.tolist()))
    order = rng.permutation(n)
    again = rule.select(features=features[order], labels=labels[order], ids=ids[order]).indices
    assert set(ids[chosen]) == set(ids[order][again])


def test_only_candidates_count():
    features = np.random.default_rng(0).normal(size=(60, 3))
    stages = [HardCutoff(cutoff=0.5), FacilityLocation(prune_rate=0.7)]
    chosen = Pipeline(stages).select(np.arange(60.0), hard="high", features=features).indices
    alone = FacilityLocation(prune_rate=0.4).select(features=features[:30]).indices
    assert chosen.tolist() == alone.tolist()


def test_short_class_gives_its_places_away_with_a_warning():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    stages = [HardCutoff(cutoff=0.5), FacilityLocation(prune_rate=0.6, class_balanced=True)]
    with pytest.warns(UserWarning, match="fewer members left than their quota"):
        chosen = Pipeline(stages).select(
            np.arange(40.0), hard="high", features=rng.normal(size=(40, 2)), labels=labels
        )
    assert chosen.report["class_histogram"] == {"0": 16}


def test_memory_is_checked_before_it_is_taken():
    rule = FacilityLocation(prune_rate=0.5, max_bytes=4 * 30**2)
    rng = np.random.default_rng(0)
    assert len(rule.select(features=rng.normal(size=(30, 2)))) == 15
    with pytest.raises(InvalidValueError, match=r"31 examples take 3844 bytes .* max_bytes=3600"):
        rule.select(features=rng.normal(size=(31, 2)))
    huge = np.broadcast_to(np.float32(0), (100_000, 2))
    with pytest.raises(
        InvalidValueError, match=r"100000 examples take 40000000000 bytes \(37.3 GiB"
    ):
        FacilityLocation(prune_rate=0.5).select(features=huge)


def test_apricot_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "apricot", None)
    rule = FacilityLocation(prune_rate=0.5, backend="apricot")
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlkit-torch\[apricot\]'"):
        rule.select(features=np.eye(4))


def test_apricot_is_given_the_similarities_and_gives_the_ranking(monkeypatch):
    class FacilityLocationSelection:
        def __init__(self, n_samples, metric, optimizer):
            assert (metric, optimizer) == ("precomputed", "lazy")
            self.n_samples = n_samples

        def fit(self, similarity):
            assert similarity.dtype == np.float64
            self.ranking = np.array(brute_force(similarity, self.n_samples))

    module = types.SimpleNamespace(FacilityLocationSelection=FacilityLocationSelection)
    monkeypatch.setitem(sys.modules, "apricot", module)
    features = np.random.default_rng(0).normal(size=(30, 2))
    native, apricot = (
        FacilityLocation(prune_rate=0.8, backend=backend).select(features=features)
        for backend in ("auto", "apricot")
    )
    assert apricot.indices.tolist() == native.indices.tolist()
    assert apricot.report["objective"] == pytest.approx(native.report["objective"])
    assert (native.report["backend"], apricot.report["backend"]) == ("native", "apricot")


@pytest.mark.skipif(importlib.util.find_spec("apricot") is None, reason="needs the extra 'apricot'")
@pytest.mark.filterwarnings("ignore")
def test_apricot_reaches_the_same_value():
    features = np.random.default_rng(0).normal(size=(200, 5))
    reports = [
        FacilityLocation(prune_rate=0.9, backend=backend).select(features=features).report
        for backend in ("native", "apricot")
    ]
    assert reports[0]["objective"] == pytest.approx(reports[1]["objective"], rel=1e-6)


def test_bad_input():
    with pytest.raises(InvalidValueError, match="backend must be 'auto', 'apricot' or 'native'"):
        FacilityLocation(prune_rate=0.5, backend="numba")
    with pytest.raises(InvalidValueError, match="metric must be 'l2' or 'cosine', got 'l1'"):
        FacilityLocation(prune_rate=0.5, metric="l1")
    with pytest.raises(InvalidValueError, match="max_bytes must be above 0, got 0"):
        FacilityLocation(prune_rate=0.5, max_bytes=0)
    with pytest.raises(InvalidValueError, match="FacilityLocation needs features"):
        FacilityLocation(prune_rate=0.5).select(num_samples=4)
    with pytest.raises(InvalidValueError, match="FacilityLocation needs labels"):
        FacilityLocation(prune_rate=0.5, class_balanced=True).select(features=np.eye(4))
    with pytest.raises(InvalidValueError, match=r"first index 2"):
        FacilityLocation(prune_rate=0.5).select(features=np.diag([1.0, 1.0, np.nan]))
