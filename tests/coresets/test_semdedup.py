"""SemDeDup against the official rule written as loops, and its properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.coresets.keyed import keyed_hash
from mlkit.coresets.pipeline import HardCutoff, Pipeline
from mlkit.coresets.selection import Pool
from mlkit.coresets.semdedup import SemDeDup, has_earlier_copy
from mlkit.coresets.simple import RandomSelector
from mlkit.errors import InvalidValueError


def stays(features, **settings):
    rule = SemDeDup(**settings)
    return rule._choose(Pool(len(features), features=np.asarray(features)))


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def naive(features, eps, keep, seed=0):
    """One cluster: sort by cosine to the centroid, drop what resembles anything earlier."""
    x = unit(features.astype(np.float64))
    to_centroid = x @ x.mean(axis=0)
    hashes = keyed_hash(np.arange(len(x)), seed)
    first = {"hard": to_centroid, "easy": -to_centroid, "random": np.zeros(len(x))}[keep]
    order = np.lexsort((hashes, first))
    kept = []
    for rank, i in enumerate(order):
        if all(x[i] @ x[j] <= 1 - eps for j in order[:rank]):
            kept.append(i)
    return sorted(kept)


def with_copies(n, copies, noise, seed=0, dim=6):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, dim))
    near = np.repeat(base, copies, axis=0) + noise * rng.normal(size=(n * copies, dim))
    return near.astype(np.float32)


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("eps", [0.001, 0.05, 0.3])
def test_equals_the_official_rule_in_one_cluster(keep, eps):
    features = with_copies(30, 3, noise=0.15)
    kept, report = stays(features, eps=eps, keep=keep)
    assert kept.tolist() == naive(features, eps, keep)
    assert report["removed"] == 90 - len(kept)


@pytest.mark.parametrize("num_clusters", [1, 4, None])
def test_one_of_each_group_of_copies_stays(num_clusters):
    features = with_copies(25, 4, noise=1e-4)
    kept, _ = stays(features, eps=0.001, num_clusters=num_clusters)
    assert (kept // 4).tolist() == list(range(25))


def test_keep_hard_is_far_from_the_centroid():
    angles = np.array([0.0, 0.02, 0.04, 1.5, 1.52, 1.54])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # The centroid lies at 0.77.
    assert stays(features, eps=0.01, keep="hard")[0].tolist() == [0, 5]
    assert stays(features, eps=0.01, keep="easy")[0].tolist() == [2, 3]


def test_in_a_chain_only_the_first_stays():
    # Neighbours are copies, ends are not; an earlier row counts though it is itself removed.
    angles = np.array([0.0, 0.1, 0.2])
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    eps = 1 - np.cos(0.15)
    assert has_earlier_copy(chain, eps).tolist() == [False, True, True]
    assert has_earlier_copy(chain[[0, 2, 1]], eps).tolist() == [False, False, True]


def test_blocks_do_not_change_the_result(monkeypatch):
    features = unit(with_copies(40, 3, noise=0.1).astype(np.float64))
    whole = has_earlier_copy(features, 0.05)
    monkeypatch.setattr("mlkit.coresets.semdedup._BLOCK_BYTES", 8 * 120 * 7)
    assert has_earlier_copy(features, 0.05).tolist() == whole.tolist()


def test_eps_zero_removes_nothing_not_even_exact_copies():
    features = np.repeat(np.random.default_rng(0).normal(size=(5, 33)), 20, axis=0)
    assert len(stays(features, eps=0.0)[0]) == 100


def test_length_does_not_count_and_zero_rows_stay():
    direction = np.array([1.0, 2.0, 3.0])
    features = np.stack([direction, 5 * direction, 0 * direction, 0 * direction])
    kept, _ = stays(features, eps=0.01)
    assert len(kept) == 3
    assert {2, 3} <= set(kept)


def test_default_number_of_clusters():
    features = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)
    assert stays(features, eps=1e-6)[1]["num_clusters"] == 3
    assert stays(features[:1000], eps=1e-6)[1]["num_clusters"] == 1


@given(
    n=st.integers(1, 60),
    num_clusters=st.sampled_from([None, 1, 3, 200]),
    keep=st.sampled_from(["hard", "easy", "random"]),
    eps=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equivariance(n, num_clusters, keep, eps, seed):
    rng = np.random.default_rng(seed)
    features = np.round(rng.normal(size=(n, 2)) * 2)  # Copies and zero vectors.
    ids = rng.permutation(10_000)[:n]
    rule = SemDeDup(num_clusters=num_clusters, keep=keep, eps=eps, seed=seed)
    kept, report = rule._choose(Pool(n, features=features, ids=ids))
    assert np.all(np.diff(kept) > 0)
    assert len(kept) >= 1
    assert report["removed"] == n - len(kept)
    order = rng.permutation(n)
    again, _ = rule._choose(Pool(n, features=features[order], ids=ids[order]))
    assert set(ids[kept]) == set(ids[order][again])


def test_before_a_selector():
    features = with_copies(20, 5, noise=1e-4)
    stages = [SemDeDup(eps=0.001), RandomSelector(prune_rate=0.9)]
    selection = Pipeline(stages).select(features=features)
    assert len(set((selection.indices // 5).tolist())) == 10
    assert selection.report["stages"][0] == {
        "stage": "SemDeDup",
        "left": 20,
        "seed": 0,
        "num_clusters": 1,
        "removed": 80,
    }
    with pytest.raises(InvalidValueError, match="only 20 of 100 are left"):
        Pipeline([SemDeDup(eps=0.001), RandomSelector(prune_rate=0.5)]).select(features=features)


def test_only_candidates_count():
    features = np.repeat(np.eye(3), 2, axis=0)
    stages = [HardCutoff(cutoff=0.5), SemDeDup(), RandomSelector(prune_rate=0.7)]
    scores = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])  # The second of each pair goes first.
    selection = Pipeline(stages).select(scores, hard="high", features=features)
    assert selection.report["stages"][1]["removed"] == 0


def test_nothing_left_over_is_fine():
    pool = Pool(3, candidates=np.zeros(0, dtype=np.int64), features=np.eye(3))
    assert len(SemDeDup()._choose(pool)[0]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 1.5}, "eps must be a number in"),
        ({"num_clusters": 0}, "num_clusters must be None or at least 1, got 0"),
        ({"keep": "far"}, "keep must be 'hard', 'easy' or 'random', got 'far'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InvalidValueError, match=message):
        SemDeDup(**change)


def test_bad_input():
    with pytest.raises(InvalidValueError, match="SemDeDup needs features"):
        SemDeDup()._choose(Pool(3))
    with pytest.raises(InvalidValueError, match="first index 1"):
        stays(np.array([[1.0], [np.nan]]))
