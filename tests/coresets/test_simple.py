"""TopK, RandomSelector, HardCutoff and Pipeline."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.coresets import CCS, ArrayScore, HardCutoff, Pipeline, RandomSelector, Stratified, TopK
from mlkit.coresets.counts import class_quotas
from mlkit.errors import InvalidTypeError, InvalidValueError
from tests.coresets import oracle

SCORES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.5]), min_size=1, max_size=40)
RATES = st.sampled_from([0.0, 0.3, 0.5, 0.9])


@settings(max_examples=200, deadline=None)
@given(SCORES, RATES, RATES, st.sampled_from(["hardest", "easiest"]), st.integers(0, 3))
def test_top_k_is_the_end_of_the_ranking(values, prune_rate, cutoff, which, seed):
    cutoff = min(cutoff, prune_rate)
    scores = np.array(values, dtype=np.float32)
    got = TopK(prune_rate=prune_rate, cutoff=cutoff, which=which, seed=seed).select(
        scores, hard="high"
    )
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], oracle.keyed_hash(i, seed)))[
        oracle.num_cut(len(scores), cutoff) :
    ]
    size = oracle.num_kept(len(scores), prune_rate)
    want = order[:size] if which == "hardest" else order[::-1][:size]
    assert got.indices.tolist() == sorted(want)


def test_hard_side_turns_the_ranking():
    scores = np.arange(10.0)
    assert TopK(prune_rate=0.8).select(scores, hard="high").indices.tolist() == [8, 9]
    assert TopK(prune_rate=0.8).select(scores, hard="low").indices.tolist() == [0, 1]
    assert TopK(prune_rate=0.8, which="easiest").select(scores, hard="low").indices.tolist() == [
        8,
        9,
    ]


def test_class_balance_is_right_on_imbalanced_data():
    """The official code uses the last class's count for every class."""
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    scores = np.random.default_rng(0).normal(size=100)
    for selector in (
        TopK(prune_rate=0.5, class_balanced=True),
        RandomSelector(prune_rate=0.5, class_balanced=True),
        CCS(prune_rate=0.5, class_balanced=True),
    ):
        chosen = selector.select(scores, hard="high", labels=labels)
        assert chosen.report["class_histogram"] == {"0": 35, "1": 10, "2": 5}


def test_hardest_inside_each_class():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    scores = np.array([1.0, 2, 3, 4, 10, 20, 30, 40])
    chosen = TopK(prune_rate=0.5, class_balanced=True).select(scores, hard="high", labels=labels)
    assert chosen.indices.tolist() == [2, 3, 6, 7]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_quotas_are_proportional_and_spend_everything(counts, data):
    total = data.draw(st.integers(0, sum(counts)))
    quotas = class_quotas(np.array(counts), np.array(counts), total)
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    want = oracle.class_quotas(labels, total)
    assert dict(enumerate(quotas.tolist())) == want


def test_a_class_that_falls_short_gives_its_places_away_with_a_warning():
    with pytest.warns(UserWarning, match=r"classes \[1\] have fewer members .* 3 places"):
        quotas = class_quotas(np.array([10, 10, 10]), np.array([10, 2, 10]), 15)
    assert quotas.tolist() == [7, 2, 6] or quotas.tolist() == [6, 2, 7]
    with pytest.raises(InvalidValueError, match="only 22 of 30 are left"):
        class_quotas(np.array([10, 10, 10]), np.array([10, 2, 10]), 25)


def test_random_is_uniform_and_needs_no_scores():
    counts = np.zeros(6)
    for seed in range(3_000):
        counts[RandomSelector(prune_rate=0.5, seed=seed).select(num_samples=6).indices] += 1
    assert np.allclose(counts / 3_000, 0.5, atol=0.05)


def test_cutoff_then_strata_is_ccs():
    scores = np.random.default_rng(1).normal(size=400).astype(np.float32)
    stages = [HardCutoff(cutoff=0.2, seed=3), Stratified(prune_rate=0.7, num_strata=9, seed=3)]
    pipeline = Pipeline(stages).select(scores, hard="low")
    plain = CCS(prune_rate=0.7, cutoff=0.2, num_strata=9, seed=3).select(scores, hard="low")
    assert pipeline.indices.tolist() == plain.indices.tolist()
    assert [s["left"] for s in pipeline.report["stages"]] == [320, 120]


def test_pipeline_builds_its_last_stage():
    last = partial(Stratified, num_strata=3)
    pipeline = Pipeline([HardCutoff(cutoff=0.1), last], prune_rate=0.5, seed=4)
    assert pipeline.stages[-1] == Stratified(prune_rate=0.5, num_strata=3, seed=4)
    state = pipeline.state_dict()
    other = Pipeline([HardCutoff(cutoff=0.9), Stratified], prune_rate=0.1)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.prune_rate == 0.5


def test_pipeline_refuses_what_is_no_pipeline():
    with pytest.raises(InvalidValueError, match="at least one stage"):
        Pipeline([])
    with pytest.raises(InvalidTypeError, match="followed by one selector"):
        Pipeline([HardCutoff(cutoff=0.1)])
    with pytest.raises(InvalidTypeError, match="followed by one selector"):
        Pipeline([Stratified(prune_rate=0.5), TopK(prune_rate=0.5)])
    with pytest.raises(InvalidTypeError, match="give the Pipeline a prune_rate"):
        Pipeline([HardCutoff(cutoff=0.1), Stratified])
    with pytest.raises(InvalidValueError, match="only 8 of 10 are left"):
        Pipeline([HardCutoff(cutoff=0.2), Stratified(prune_rate=0.1)]).select(
            np.arange(10.0), hard="low"
        )
    with pytest.raises(InvalidValueError, match="not \\['HardCutoff'\\]"):
        Pipeline([Stratified(prune_rate=0.5)]).load_state_dict(
            {"stages": [{"stage": "HardCutoff", "cutoff": 0.1}]}
        )


def test_pipeline_with_two_pruning_rates_is_refused():
    with pytest.raises(InvalidValueError, match="prune_rate=0.9 contradicts the last stage's 0.5"):
        Pipeline([HardCutoff(0.1), Stratified(prune_rate=0.5)], prune_rate=0.9)


def test_large_integers_keep_their_digits():
    scores = np.arange(2**24, 2**24 + 10)
    assert TopK(prune_rate=0.5).select(scores, hard="high").indices.tolist() == [5, 6, 7, 8, 9]


def test_numpy_numbers_are_no_bad_settings():
    plain = Stratified(prune_rate=0.9, num_strata=10, seed=3)
    same = Stratified(prune_rate=np.float32(0.9), num_strata=np.int64(10), seed=np.int64(3))
    scores = np.arange(100.0)
    want = plain.select(scores, hard="high").indices
    assert np.array_equal(same.select(scores, hard="high").indices, want)
    with pytest.raises(InvalidValueError, match="seed must be an integer, got 'x'"):
        Stratified(prune_rate=0.5, seed="x")


def test_examples_without_a_cutoff_score_are_dropped_too():
    scores = np.arange(10.0)
    aum = np.arange(10.0)
    aum[:4] = np.nan
    chosen = CCS(prune_rate=0.5, num_strata=1).select(
        scores,
        hard="low",
        cutoff_scores=ArrayScore(aum, "low", "aum", np.isnan(aum)),
        unseen="drop",
    )
    assert chosen.indices.min() >= 4


def test_labels_by_name_are_explained():
    with pytest.raises(InvalidValueError, match="return_inverse=True"):
        CCS(prune_rate=0.5).select(np.arange(3.0), hard="low", labels=np.array(["a", "b", "a"]))
    with pytest.raises(InvalidValueError, match="Stratified needs labels"):
        Stratified(prune_rate=0.5, class_balanced=True).select(np.arange(3.0), hard="low")


def test_hard_cutoff_uses_the_cutoff_score():
    scores, other = np.arange(10.0), ArrayScore(-np.arange(10.0), "low", "aum")
    stages = [HardCutoff(cutoff=0.5), Stratified(prune_rate=0.5)]
    chosen = Pipeline(stages).select(scores, hard="low", cutoff_scores=other)
    assert chosen.indices.tolist() == [0, 1, 2, 3, 4]


def test_bad_settings():
    with pytest.raises(InvalidValueError, match="which must be 'hardest' or 'easiest'"):
        TopK(prune_rate=0.5, which="best")
    with pytest.raises(InvalidValueError, match="cutoff must be at most prune_rate"):
        TopK(prune_rate=0.5, cutoff=0.6)
    with pytest.raises(InvalidValueError, match=r"cutoff must be a number in \[0, 1\]"):
        HardCutoff(cutoff=1.5)
    with pytest.raises(InvalidValueError, match="TopK needs scores"):
        TopK(prune_rate=0.5).select(num_samples=4)
