"""D2 pruning against the plain argmax loop, and its properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from mlkit.coresets.counts import num_selected
from mlkit.coresets.d2 import D2, d2_select
from mlkit.coresets.keyed import keyed_hash
from mlkit.coresets.pipeline import HardCutoff, Pipeline
from mlkit.errors import InvalidValueError


def naive(hardness, neighbors, distances, m, gamma, forward="sum"):
    """The official select_batch_from_precomputed_ loop: one argmax over everything per step."""
    messages = (np.exp(-distances) * hardness[neighbors]).sum(axis=1)
    x = hardness + messages if forward == "sum" else hardness * messages
    chosen = []
    for _ in range(m):
        allowed = np.where(np.isin(np.arange(len(x)), chosen), -np.inf, x)
        i = int(np.argmax(allowed))
        chosen.append(i)
        x[neighbors[i]] -= np.exp(-gamma * distances[i]) * x[i]
    return chosen


def graph(n, k, rng, quantised=False):
    neighbors = np.array([rng.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)])
    distances = rng.random((n, k)) * 2
    return neighbors.reshape(n, k), np.round(distances) if quantised else distances


def data(n, dim=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(n), rng.normal(size=(n, dim)), rng.integers(0, 3, n)


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 6),
    share=st.floats(0, 1),
    gamma=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    forward=st.sampled_from(["sum", "product"]),
    kind=st.sampled_from(["random", "ties", "negative"]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=300, deadline=None)
def test_heap_equals_the_argmax_loop(n, k, share, gamma, forward, kind, seed):
    rng = np.random.default_rng(seed)
    neighbors, distances = graph(n, min(k, n - 1), rng, quantised=kind == "ties")
    # Whole numbers give ties; negative hardness makes reverse messages raise their neighbours.
    hardness = rng.integers(0, 3, n).astype(float) if kind == "ties" else rng.random(n)
    hardness -= 0.7 if kind == "negative" else 0.0
    m = round(share * n)
    chosen = d2_select(hardness, neighbors, distances, m, gamma=gamma, forward=forward)
    assert chosen.tolist() == naive(hardness, neighbors, distances, m, gamma, forward)


def test_heap_equals_the_argmax_loop_on_a_real_graph():
    hardness, features, _ = data(2000, dim=8)
    distances, neighbors = NearestNeighbors(n_neighbors=5).fit(features).kneighbors()
    chosen = d2_select(hardness, neighbors, distances, 600, gamma=1.0)
    assert chosen.tolist() == naive(hardness, neighbors, distances, 600, 1.0)


def test_hand_computed():
    # x = (1 + e^-1 0.5, 0.5 + e^-1 1, 0.8); taking 0 lowers 1 by e^-1 x_0, below 2.
    neighbors, distances = np.array([[1], [0], [0]]), np.array([[1.0], [1.0], [50.0]])
    chosen = d2_select(np.array([1.0, 0.5, 0.8]), neighbors, distances, 3)
    assert chosen.tolist() == [0, 2, 1]


def test_class_calls_the_graph_on_the_features():
    scores, features, _ = data(150)
    distances, neighbors = NearestNeighbors(n_neighbors=5).fit(features).kneighbors()
    rule = D2(prune_rate=0.8, gamma=0.5, class_balanced=False)
    chosen = rule.select(scores, hard="high", features=features).indices
    assert set(chosen) == set(naive(scores, neighbors, distances, 30, 0.5))


def test_low_scores_are_hard_and_shifted_to_zero():
    scores, features, _ = data(80)
    rule = D2(prune_rate=0.75, class_balanced=False)
    margin = -3 - scores  # Like AUM: low is hard; -margin - min(-margin) = scores - min(scores).
    chosen = rule.select(-margin - (-margin).min(), hard="high", features=features).indices
    assert (
        chosen.tolist() == rule.select(margin + 10, hard="low", features=features).indices.tolist()
    )


def test_cutoff_then_graph_per_class():
    scores, features, labels = data(120)
    rule = D2(prune_rate=0.7, cutoff=0.2)
    selection = rule.select(scores, hard="high", features=features, labels=labels)
    expected, cut = [], 0
    for c in range(3):
        members = np.flatnonzero(labels == c)
        drop = len(members) // 5
        cut += drop
        kept = members[np.argsort(scores[members])][: len(members) - drop]
        distances, neighbors = NearestNeighbors(n_neighbors=5).fit(features[kept]).kneighbors()
        quota = int((labels[selection.indices] == c).sum())
        expected += kept[naive(scores[kept], neighbors, distances, quota, 1.0)].tolist()
    assert sorted(expected) == selection.indices.tolist()
    assert selection.report["cut"] == cut
    assert len(selection) == 36


def test_cutoff_by_another_score():
    scores, features, _ = data(50)
    other = np.arange(50.0)
    from mlkit.coresets.scores import ArrayScore

    chosen = D2(prune_rate=0.5, cutoff=0.4, class_balanced=False).select(
        scores, hard="high", features=features, cutoff_scores=ArrayScore(other, hard="low")
    )
    assert chosen.indices.min() >= 20


@given(
    n=st.integers(1, 50),
    prune_rate=st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    cutoff=st.sampled_from([0.0, 0.1, 0.3]),
    class_balanced=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_size_and_equivariance(n, prune_rate, cutoff, class_balanced, seed):
    scores, features, _ = data(n, seed=seed)
    labels = np.zeros(n, int)
    scores, features = np.round(scores * 4), np.round(features)  # Ties and copies.
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10_000)[:n]
    rule = D2(
        prune_rate=prune_rate,
        cutoff=min(cutoff, prune_rate),
        class_balanced=class_balanced,
        seed=seed,
    )
    chosen = rule.select(scores, hard="high", features=features, labels=labels, ids=ids).indices
    assert len(chosen) == num_selected(n, prune_rate) == len(set(chosen.tolist()))
    order = rng.permutation(n)
    again = rule.select(
        scores[order], hard="high", features=features[order], labels=labels[order], ids=ids[order]
    ).indices
    assert set(ids[chosen]) == set(ids[order][again])


def test_ties_go_by_keyed_hash():
    features = 100.0 * np.arange(40)[:, None]  # Too far apart for messages.
    rule = D2(prune_rate=0.75, class_balanced=False, seed=5)
    chosen = rule.select(np.ones(40), hard="high", features=features).indices
    assert set(chosen) == set(np.argsort(keyed_hash(np.arange(40), 5))[:10])


def test_only_candidates_count():
    scores, features, labels = data(60)
    order = np.argsort(scores)
    scores, features, labels = scores[order], features[order], labels[order]
    stages = [HardCutoff(cutoff=0.5), D2(prune_rate=0.7, class_balanced=False)]
    chosen = Pipeline(stages).select(scores, hard="high", features=features).indices
    alone = D2(prune_rate=0.4, class_balanced=False).select(
        scores[:30], hard="high", features=features[:30]
    )
    assert chosen.tolist() == alone.indices.tolist()


def test_short_class_gives_its_places_away_with_a_warning():
    scores, features, _ = data(40)
    labels = np.repeat([0, 1], 20)
    scores[20:38] += 5
    stages = [HardCutoff(cutoff=0.45), D2(prune_rate=0.5)]
    with pytest.warns(UserWarning, match="fewer members left than their quota"):
        chosen = Pipeline(stages).select(scores, hard="high", features=features, labels=labels)
    assert chosen.report["class_histogram"] == {"0": 18, "1": 2}


def test_single_examples():
    one = D2(prune_rate=0.0, class_balanced=False)
    assert one.select(np.ones(1), hard="high", features=np.ones((1, 2))).indices.tolist() == [0]
    none = D2(prune_rate=0.5, class_balanced=False)
    assert len(none.select(np.ones(1), hard="high", features=np.ones((1, 2)))) == 0
    empty = np.zeros((1, 0))
    assert d2_select(np.ones(1), empty.astype(int), empty, 1).tolist() == [0]


def test_state_round_trip():
    rule = D2(prune_rate=0.5, gamma=0.1, forward="product")
    assert D2(**rule.state_dict()) == rule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"gamma": -1.0}, "gamma must be finite and at least 0, got -1.0"),
        ({"gamma": float("nan")}, "gamma must be finite"),
        ({"forward": "mean"}, "forward must be 'sum' or 'product', got 'mean'"),
        ({"cutoff": 0.6}, "cutoff must be at most prune_rate"),
        ({"cutoff": -0.1}, "cutoff must be a number in"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InvalidValueError, match=message):
        D2(**{"prune_rate": 0.5, **change})


def test_bad_input():
    scores, features, labels = data(20)
    rule = D2(prune_rate=0.5)
    with pytest.raises(InvalidValueError, match="D2 needs scores"):
        rule.select(features=features, labels=labels)
    with pytest.raises(InvalidValueError, match="D2 needs features"):
        rule.select(scores, hard="high", labels=labels)
    with pytest.raises(InvalidValueError, match="D2 needs labels"):
        rule.select(scores, hard="high", features=features)
    scores[4] = np.inf
    with pytest.raises(InvalidValueError, match=r"1 scores are infinite \(first index 4\)"):
        rule.select(scores, hard="high", features=features, labels=labels)
    features[2] = np.nan
    with pytest.raises(InvalidValueError, match=r"first index 2"):
        rule.select(labels, hard="high", features=features, labels=labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 4}, r"m must lie in \[0, 3\], got 4"),
        ({"neighbors": np.array([[1], [0], [2]])}, "1 rows are among their own neighbours"),
        ({"neighbors": np.array([[1], [0], [3]])}, r"neighbors must lie in \[0, 3\)"),
        ({"neighbors": np.array([[1, 2], [0, 2], [0, 1]])}, r"must both be \(3, k\)"),
        ({"distances": np.array([[-1.0], [1.0], [1.0]])}, "finite and not negative"),
    ],
)
def test_bad_graph(change, message):
    call = {
        "hardness": np.ones(3),
        "neighbors": np.array([[1], [0], [0]]),
        "distances": np.ones((3, 1)),
        "m": 2,
    }
    with pytest.raises(InvalidValueError, match=message):
        d2_select(**{**call, **change})
