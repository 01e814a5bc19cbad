"""k-center greedy against a loop over all distances, and its properties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.coresets.counts import num_selected
from mlkit.coresets.k_center import KCenterGreedy, k_center_greedy
from mlkit.coresets.keyed import keyed_hash
from mlkit.coresets.pipeline import HardCutoff, Pipeline
from mlkit.errors import InvalidValueError


def naive(features, m, first):
    x = features.astype(np.float64)
    chosen = [first]
    while len(chosen) < m:
        nearest = [min(np.linalg.norm(a - x[c]) for c in chosen) for a in x]
        chosen.append(max((i for i in range(len(x)) if i not in chosen), key=lambda i: nearest[i]))
    return chosen[:m]


def radius(features, chosen):
    x = features.astype(np.float64)
    return max(min(np.linalg.norm(a - x[c]) for c in chosen) for a in x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 2, 17])
def test_equals_the_naive_loop(dtype, dim):
    features = np.random.default_rng(dim).normal(size=(90, dim)).astype(dtype)
    chosen, reached = k_center_greedy(features, 30, first=4)
    assert chosen.tolist() == naive(features, 30, 4)
    assert reached == pytest.approx(radius(features, chosen), rel=1e-4)


def test_far_from_the_origin():
    # Centring keeps the digits that norms and products would cancel.
    features = np.random.default_rng(0).normal(size=(80, 3)) + 1e4
    assert k_center_greedy(features, 25)[0].tolist() == naive(features, 25, 0)


def test_radius_is_at_most_twice_the_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        features = rng.normal(size=(9, 2))
        best = min(radius(features, s) for s in itertools.combinations(range(9), 3))
        assert k_center_greedy(features, 3)[1] <= 2 * best + 1e-9


def test_copies_come_after_everything_else():
    distinct = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    features = np.repeat(distinct, 5, axis=0)
    chosen, reached = k_center_greedy(features, 40)
    assert len({i // 5 for i in chosen[:20]}) == 20
    assert reached == 0
    # All else is at distance 0: by row.
    rest = [i for i in range(100) if i not in chosen[:20].tolist()]
    assert chosen[20:].tolist() == rest[:20]


def test_cosine_ignores_length():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4))
    rule = KCenterGreedy(prune_rate=0.7, metric="cosine", first=0)
    chosen = rule.select(features=features * rng.uniform(1, 9, (60, 1))).indices
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert sorted(chosen) == sorted(naive(unit, 18, 0))


def test_first_centre():
    features = np.random.default_rng(0).normal(size=(40, 3))
    by_hash = KCenterGreedy(prune_rate=0.8, seed=3).select(features=features)
    start = int(np.argmin(keyed_hash(np.arange(40), 3)))
    assert by_hash.report["first"] == start
    assert sorted(by_hash.indices) == sorted(naive(features, 8, start))
    given_one = KCenterGreedy(prune_rate=0.8, first=11).select(features=features)
    assert given_one.report["first"] == 11
    assert given_one.report["radius"] == pytest.approx(radius(features, given_one.indices))


@given(
    n=st.integers(1, 50),
    prune_rate=st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    metric=st.sampled_from(["l2", "cosine"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_size_and_equivariance(n, prune_rate, metric, seed):
    rng = np.random.default_rng(seed)
    features = np.round(rng.normal(size=(n, 2)))  # Ties, copies and zero vectors.
    ids = rng.permutation(10_000)[:n]
    rule = KCenterGreedy(prune_rate=prune_rate, metric=metric, seed=seed)
    chosen = rule.select(features=features, ids=ids).indices
    assert len(chosen) == num_selected(n, prune_rate) == len(set(chosen.tolist()))
    order = rng.permutation(n)
    again = rule.select(features=features[order], ids=ids[order]).indices
    assert set(ids[chosen]) == set(ids[order][again])


def test_only_candidates_count():
    features = np.random.default_rng(0).normal(size=(60, 3))
    stages = [HardCutoff(cutoff=0.5), KCenterGreedy(prune_rate=0.7)]
    chosen = Pipeline(stages).select(np.arange(60.0), hard="high", features=features).indices
    alone = KCenterGreedy(prune_rate=0.4).select(features=features[:30]).indices
    assert chosen.tolist() == alone.tolist()


def test_nothing_and_one():
    features = np.ones((1, 2))
    none = KCenterGreedy(prune_rate=0.5).select(features=features)
    assert (len(none), none.report["radius"], none.report["first"]) == (0, None, None)
    one = KCenterGreedy(prune_rate=0.0).select(features=features)
    assert (one.indices.tolist(), one.report["radius"]) == ([0], 0.0)
    assert len(k_center_greedy(np.zeros((0, 2)), 0)[0]) == 0


def test_bad_input():
    with pytest.raises(InvalidValueError, match="metric must be 'l2' or 'cosine', got 'l1'"):
        KCenterGreedy(prune_rate=0.5, metric="l1")
    with pytest.raises(InvalidValueError, match="first must be None or a position"):
        KCenterGreedy(prune_rate=0.5, first=-1)
    with pytest.raises(InvalidValueError, match="KCenterGreedy needs features"):
        KCenterGreedy(prune_rate=0.5).select(num_samples=4)
    features = np.zeros((6, 2))
    with pytest.raises(InvalidValueError, match="first=6 is not among the 6 candidates"):
        KCenterGreedy(prune_rate=0.5, first=6).select(features=features)
    features[5, 1] = np.inf
    with pytest.raises(InvalidValueError, match=r"first index 5"):
        KCenterGreedy(prune_rate=0.5).select(features=features)
