"""Beta sampling against exact successive sampling and scipy's density, and its properties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chisquare

from mlkit.coresets.beta_sampling import BetaSampling, beta_parameters, log_weights
from mlkit.coresets.counts import num_selected
from mlkit.coresets.pipeline import HardCutoff, Pipeline
from mlkit.coresets.scores import ArrayScore, ScoreTable
from mlkit.errors import InvalidValueError


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(n), rng.random(n)


def official_weights(scores, confidence, prune_rate, c=4.0, num_hardest=10):
    """behaapyy/dual-pruning, beta_sampling: parameters and joint density."""
    mean = confidence[np.argsort(scores)[-num_hardest:]].mean()
    b = 15 * (1 - mean) * (1 - prune_rate**c)
    return beta.pdf(confidence, 16 - b, b) * scores


def successive(weights, m):
    """Probability of every subset of size m when drawn one by one in proportion to the weights."""
    result = {}
    for order in itertools.permutations(range(len(weights)), m):
        left, probability = weights.sum(), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        result[frozenset(order)] = result.get(frozenset(order), 0.0) + probability
    return result


def test_weights_are_the_official_ones():
    scores, confidence = data(200)
    a, b = beta_parameters(confidence[np.argsort(scores)[-10:]].mean(), 0.6, 4.0, 16.0)
    ours, official = (
        log_weights(scores, confidence, a, b),
        official_weights(scores, confidence, 0.6),
    )
    # Equal up to the constant that normalises the density.
    np.testing.assert_allclose(np.diff(ours), np.diff(np.log(official)), rtol=1e-9, atol=1e-9)


def test_draw_is_successive_sampling_with_these_weights():
    scores = np.array([0.9, 0.5, 0.7, 0.2, 0.4])
    confidence = np.array([0.3, 0.5, 0.6, 0.8, 0.9])
    expected = successive(official_weights(scores, confidence, 0.6, num_hardest=2), 2)
    rounds = 4000
    seen = dict.fromkeys(expected, 0)
    for seed in range(rounds):
        rule = BetaSampling(prune_rate=0.6, num_hardest=2, seed=seed)
        seen[frozenset(rule.select(scores, hard="high", confidence=confidence).indices)] += 1
    keys = list(expected)
    # Seeds are fixed, so this either always passes or never; 0.001 is what chance would allow.
    result = chisquare([seen[k] for k in keys], [rounds * expected[k] for k in keys])
    assert result.pvalue > 0.001


def test_high_pruning_moves_to_easy_examples():
    rng = np.random.default_rng(0)
    confidence = rng.random(5000)
    scores = 1.05 - confidence  # Low confidence is hard.
    means = [
        confidence[
            BetaSampling(prune_rate=r).select(scores, hard="high", confidence=confidence).indices
        ].mean()
        for r in (0.7, 0.9, 0.97)
    ]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.3


def test_report_holds_the_parameters():
    scores, confidence = data(100)
    report = BetaSampling(prune_rate=0.5).select(scores, hard="high", confidence=confidence).report
    assert report["mean_hard"] == pytest.approx(confidence[np.argsort(scores)[-10:]].mean())
    assert report["a"] + report["b"] == 16
    assert report["b"] == pytest.approx(15 * (1 - report["mean_hard"]) * (1 - 0.5**4))


def test_weight_zero_comes_last():
    scores = np.array([0.0] * 8 + [1.0, 1.0])
    confidence = np.full(10, 0.5)
    for seed in range(20):
        some = BetaSampling(prune_rate=0.6, seed=seed).select(
            scores, hard="high", confidence=confidence
        )
        assert {8, 9} <= set(some.indices)
        assert len(some) == 4


@pytest.mark.parametrize("confidence", [0.0, 1.0])
@pytest.mark.parametrize("prune_rate", [0.0, 0.5, 0.99])
def test_confidence_at_the_ends(confidence, prune_rate):
    scores = np.linspace(0, 1, 300)
    chosen = BetaSampling(prune_rate=prune_rate).select(
        scores, hard="high", confidence=np.full(300, confidence)
    )
    assert len(chosen) == num_selected(300, prune_rate)


def test_low_scores_are_hard_and_shifted_to_zero():
    scores, confidence = data(60)
    rule = BetaSampling(prune_rate=0.5)
    low = rule.select(5 - scores, hard="low", confidence=confidence).indices
    high = rule.select(scores - scores.min(), hard="high", confidence=confidence).indices
    assert low.tolist() == high.tolist()


@given(
    n=st.integers(1, 60),
    prune_rate=st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    class_balanced=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_size_and_equivariance(n, prune_rate, class_balanced, seed):
    rng = np.random.default_rng(seed)
    scores, confidence = np.round(rng.random(n) * 3), np.round(rng.random(n) * 4) / 4
    labels, ids = rng.integers(0, 3, n), rng.permutation(10_000)[:n]
    rule = BetaSampling(prune_rate=prune_rate, class_balanced=class_balanced, seed=seed)
    chosen = rule.select(scores, hard="high", confidence=confidence, labels=labels, ids=ids).indices
    assert len(chosen) == num_selected(n, prune_rate) == len(set(chosen.tolist()))
    order = rng.permutation(n)
    again = rule.select(
        scores[order],
        hard="high",
        confidence=confidence[order],
        labels=labels[order],
        ids=ids[order],
    ).indices
    assert set(ids[chosen]) == set(ids[order][again])


def test_only_candidates_count():
    scores, confidence = np.arange(60.0), data(60)[1]
    stages = [HardCutoff(cutoff=0.5), BetaSampling(prune_rate=0.7)]
    chosen = Pipeline(stages).select(scores, hard="high", confidence=confidence)
    assert chosen.indices.max() < 30
    assert chosen.report["stages"][1]["mean_hard"] == pytest.approx(confidence[20:30].mean())


def test_class_quotas():
    scores, confidence = data(100)
    labels = np.repeat([0, 1], [80, 20])
    rule = BetaSampling(prune_rate=0.5, class_balanced=True)
    chosen = rule.select(scores, hard="high", confidence=confidence, labels=labels)
    assert chosen.report["class_histogram"] == {"0": 40, "1": 10}
    stages = [HardCutoff(cutoff=0.15), rule]
    hardest = np.where(labels == 1, scores + 1, scores)
    with pytest.warns(UserWarning, match="fewer members left than their quota"):
        chosen = Pipeline(stages).select(hardest, hard="high", confidence=confidence, labels=labels)
    assert chosen.report["class_histogram"] == {"0": 45, "1": 5}


def test_confidence_from_a_score_table():
    scores, confidence = data(50)
    table = ScoreTable({"dual": scores, "confidence": confidence})
    rule = BetaSampling(prune_rate=0.5)
    chosen = rule.select(table["dual"], confidence=table["confidence"]).indices
    same = rule.select(
        scores.astype(np.float32), hard="high", confidence=confidence.astype(np.float32)
    )
    assert chosen.tolist() == same.indices.tolist()


def test_confidence_of_unseen_examples():
    scores, confidence = data(50)
    visits = np.ones(50, int)
    visits[[3, 9]] = 0
    scores[[3, 9]] = confidence[[3, 9]] = np.nan
    table = ScoreTable({"dual": scores, "confidence": confidence}, visits=visits)
    rule = BetaSampling(prune_rate=0.5)
    with pytest.raises(InvalidValueError, match="never visited"):
        rule.select(table["dual"], confidence=table["confidence"])
    dropped = rule.select(table["dual"], confidence=table["confidence"], unseen="drop")
    assert len(dropped) == 25
    assert not {3, 9} & set(dropped.indices)
    plain = rule.select(table["dual"], confidence=confidence, unseen="drop")
    assert plain.indices.tolist() == dropped.indices.tolist()
    assert len(rule.select(table["dual"], confidence=table["confidence"], unseen="hard")) == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": 0.0}, "c must be finite and above 0, got 0.0"),
        ({"num_hardest": 0}, "num_hardest must be at least 1, got 0"),
        ({"concentration": 1.0}, "concentration must be finite and above 1, got 1.0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InvalidValueError, match=message):
        BetaSampling(**{"prune_rate": 0.5, **change})


def test_bad_input():
    scores, confidence = data(20)
    rule = BetaSampling(prune_rate=0.5)
    with pytest.raises(InvalidValueError, match="BetaSampling needs scores"):
        rule.select(confidence=confidence)
    with pytest.raises(InvalidValueError, match="BetaSampling needs confidence"):
        rule.select(scores, hard="high")
    with pytest.raises(InvalidValueError, match="lengths differ"):
        rule.select(scores, hard="high", confidence=confidence[:5])
    for wrong in (1.5, -0.1, np.nan):
        bad = confidence.copy()
        bad[7] = wrong
        with pytest.raises(InvalidValueError, match=r"confidence must lie in \[0, 1\], got 1 .*7"):
            rule.select(scores, hard="high", confidence=bad)
    with pytest.raises(InvalidValueError, match="scores are NaN"):
        rule.select(scores, hard="high", confidence=ArrayScore(bad, hard="low"))
    scores[4] = np.inf
    with pytest.raises(InvalidValueError, match=r"1 scores are infinite \(first index 4\)"):
        rule.select(scores, hard="high", confidence=confidence)
