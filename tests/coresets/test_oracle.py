"""The oracle itself against cases worked out by hand and against brute force."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.coresets import oracle

SQRT2 = math.sqrt(2.0)


def smallest(ids: list[int], count: int, seed: int) -> list[int]:
    return sorted(sorted(ids, key=lambda i: oracle.keyed_hash(i, seed))[:count])


# Hashing and counts


def test_splitmix64_known_outputs() -> None:
    # published outputs of the generator seeded with 1234567 (and 0)
    golden = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [oracle.splitmix64(1234567 + n * golden) for n in range(3)] == expected
    assert oracle.splitmix64(0) == 0xE220A8397B1DCDAF


def test_keyed_hash_wraps_and_separates_keys() -> None:
    assert oracle.keyed_hash(-1, 3) == oracle.keyed_hash(2**64 - 1, 3)
    assert oracle.keyed_hash(5, -2) == oracle.keyed_hash(5, 2**64 - 2)
    assert oracle.keyed_hash(5, 0) == oracle.splitmix64(5 ^ 0xE220A8397B1DCDAF)
    hashes = {oracle.keyed_hash(i, seed) for i in range(200) for seed in range(5)}
    assert len(hashes) == 1000
    assert all(0 <= value < 2**64 for value in hashes)


def test_cut_key_spells_cutoff() -> None:
    assert oracle.CUT_KEY.to_bytes(6, "big") == b"cutoff"


def test_counts_are_exact() -> None:
    assert math.floor((1 - 0.9) * 60_000) == 5_999
    assert oracle.num_kept(60_000, 0.9) == 6_000
    assert oracle.num_kept(10, 0.7) == 3
    assert oracle.num_kept(7, 0.5) == 3
    assert oracle.num_kept(5, 0.0) == 5
    assert oracle.num_kept(60_000, np.float64(0.9)) == 6_000
    assert math.floor(0.29 * 100) == 28
    assert oracle.num_cut(100, 0.29) == 29
    assert oracle.num_cut(9, 0.1) == 0
    assert oracle.num_cut(10, Fraction(3, 10)) == 3


# Budgets


def brute_force_fill(populations: tuple[int, ...], m: int) -> list[int]:
    """Max-min fair share: first the best sorted budgets, then the surplus to the largest bins."""
    largest_first = sorted(range(len(populations)), key=lambda b: (populations[b], b), reverse=True)
    feasible = [
        budgets
        for budgets in itertools.product(*(range(p + 1) for p in populations))
        if sum(budgets) == m
    ]
    best = max(feasible, key=lambda g: (sorted(g), [g[b] for b in largest_first]))
    return list(best)


@pytest.mark.parametrize(("bins", "largest"), [(1, 6), (2, 6), (3, 5), (4, 3)])
def test_water_fill_is_brute_force(bins: int, largest: int) -> None:
    for populations in itertools.product(range(largest + 1), repeat=bins):
        for m in range(sum(populations) + 1):
            expected = brute_force_fill(populations, m)
            assert oracle.water_fill(populations, m) == expected, (populations, m)
            assert oracle.water_level(populations, m) == expected, (populations, m)


def test_water_fill_equals_closed_form_on_random_histograms() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        bins = int(rng.integers(1, 60))
        largest = int(rng.choice([2, 10, 200]))
        populations = [int(p) for p in rng.integers(0, largest, bins)]
        m = int(rng.integers(0, sum(populations) + 1))
        budgets = oracle.water_fill(populations, m)
        assert budgets == oracle.water_level(populations, m)
        assert sum(budgets) == m
        assert all(0 <= g <= p for g, p in zip(budgets, populations, strict=True))


def test_water_fill_by_hand() -> None:
    assert oracle.water_fill([5, 0, 1, 9], 9) == [4, 0, 1, 4]
    assert oracle.water_fill([5, 0, 1, 9], 10) == [4, 0, 1, 5]
    # equal populations: ascending bin index, so the remainder goes to the last bins
    assert oracle.water_fill([4, 4, 4], 5) == [1, 2, 2]
    assert oracle.water_fill([2, 3], 99) == oracle.water_level([2, 3], 99) == [2, 3]


# Selection


def test_ccs_by_hand() -> None:
    got = oracle.ccs_select(np.arange(10.0), prune_rate=0.5, cutoff=0.2, num_strata=2, seed=7)
    # 0 and 1 are cut; width (9 - 2) / 2 = 3.5: {2, 3, 4, 5} and {6, 7, 8, 9}; 5 = 2 + 3
    assert got["cut"] == [0, 1]
    assert (got["low"], got["high"]) == (2.0, 9.0)
    assert got["populations"] == [4, 4]
    assert got["budgets"] == [2, 3]
    assert got["indices"] == sorted(smallest([2, 3, 4, 5], 2, 7) + smallest([6, 7, 8, 9], 3, 7))


def test_ccs_hard_high_cuts_the_other_end() -> None:
    got = oracle.ccs_select(np.arange(10.0), 0.5, cutoff=0.2, num_strata=2, hard="high")
    assert got["cut"] == [8, 9]
    assert (got["low"], got["high"]) == (0.0, 7.0)
    assert got["populations"] == [4, 4]


def test_ccs_bin_edges_belong_to_the_upper_bin_and_the_last_is_closed() -> None:
    got = oracle.ccs_select([0.0, 1.0, 2.0, 3.0, 4.0], prune_rate=0.0, num_strata=4)
    assert got["populations"] == [1, 1, 1, 2]
    got = oracle.ccs_select([-4.0, -3.0, -2.0], prune_rate=0.0, num_strata=2)
    assert got["populations"] == [1, 2]


def test_ccs_scores_are_rounded_to_float32_first() -> None:
    got = oracle.ccs_select([1.0, 1.0 + 1e-12, 1.0 - 1e-12], prune_rate=0.0, num_strata=3)
    assert got["populations"] == [3, 0, 0]
    assert got["low"] == got["high"] == 1.0


def test_ccs_ties_at_the_cutoff_go_by_their_own_hash() -> None:
    scores = [0.0] + [1.0] * 8 + [2.0]
    got = oracle.ccs_select(scores, prune_rate=0.5, cutoff=0.4, num_strata=5, seed=11)
    expected = smallest(list(range(1, 9)), 3, 11 ^ 0x6375746F6666)
    assert got["cut"] == sorted([0, *expected])
    kept = [i for i in range(1, 9) if i not in expected]
    assert got["populations"] == [5, 0, 0, 0, 1]
    assert got["budgets"] == [4, 0, 0, 0, 1]
    assert got["indices"] == sorted([*smallest(kept, 4, 11), 9])


def test_ccs_constant_scores_are_a_keyed_random_draw() -> None:
    got = oracle.ccs_select([3.0] * 20, prune_rate=0.7, num_strata=4, seed=2)
    assert got["populations"] == [20, 0, 0, 0]
    assert got["indices"] == smallest(list(range(20)), 6, 2)


def test_ccs_everything_is_kept_at_rate_zero() -> None:
    got = oracle.ccs_select(np.random.default_rng(0).normal(size=37), prune_rate=0.0)
    assert got["indices"] == list(range(37))
    assert got["budgets"] == got["populations"]


def test_ccs_cutoff_by_another_score() -> None:
    other = np.arange(10.0)[::-1]
    got = oracle.ccs_select(np.arange(10.0), 0.5, cutoff=0.2, num_strata=2, cutoff_scores=other)
    assert got["cut"] == [8, 9]
    got = oracle.ccs_select(
        np.arange(10.0), 0.5, cutoff=0.2, num_strata=2, cutoff_scores=other, cutoff_hard="high"
    )
    assert got["cut"] == [0, 1]
    assert (got["low"], got["high"]) == (2.0, 9.0)


def test_ccs_infinite_scores_go_to_the_end_strata() -> None:
    got = oracle.ccs_select([-np.inf, 0.0, 1.0, 2.0, 3.0, np.inf], 0.0, num_strata=3)
    assert (got["low"], got["high"]) == (0.0, 3.0)
    assert got["populations"] == [2, 1, 3]


@pytest.mark.parametrize("hard", ["low", "high"])
@pytest.mark.parametrize("cutoff", [0.0, 0.1, 0.3, 0.9])
def test_ccs_properties(hard: oracle.Hard, cutoff: float) -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=333).round(1)
    got = oracle.ccs_select(scores, 0.9, cutoff=cutoff, num_strata=10, hard=hard, seed=4)
    assert len(got["indices"]) == len(set(got["indices"])) == sum(got["budgets"]) == 33
    assert len(got["cut"]) == oracle.num_cut(333, cutoff)
    assert sum(got["populations"]) == 333 - len(got["cut"])
    assert not set(got["cut"]) & set(got["indices"])
    if got["cut"]:
        rest = [scores[i] for i in range(333) if i not in got["cut"]]
        edge = scores[got["cut"]]
        assert max(edge) <= min(rest) if hard == "low" else min(edge) >= max(rest)

    order = rng.permutation(333)
    permuted = oracle.ccs_select(
        scores[order], 0.9, cutoff=cutoff, num_strata=10, hard=hard, seed=4, ids=order.tolist()
    )
    assert sorted(order[permuted["indices"]]) == got["indices"]
    assert sorted(order[permuted["cut"]]) == got["cut"]


def test_ccs_draw_is_uniform_over_seeds() -> None:
    counts = np.zeros(6)
    for seed in range(3000):
        counts[oracle.ccs_select([1.0] * 6, 0.5, seed=seed)["indices"]] += 1
    assert np.sum((counts - 1500) ** 2 / 1500) < 20.5  # 99.9 % point, 5 degrees of freedom


def test_ccs_sixty_thousand_at_ninety_percent() -> None:
    scores = np.random.default_rng(2).normal(size=60_000)
    assert len(oracle.ccs_select(scores, 0.9, cutoff=0.3)["indices"]) == 6_000


@pytest.mark.parametrize(
    "bad",
    [
        {"prune_rate": 1.0},
        {"prune_rate": -0.1},
        {"prune_rate": 0.2, "cutoff": 0.3},
        {"prune_rate": 0.5, "num_strata": 0},
        {"prune_rate": 0.5, "hard": "mid"},
        {"prune_rate": 0.5, "ids": [1]},
        {"prune_rate": 0.5, "cutoff_scores": [1.0]},
    ],
)
def test_ccs_bad_inputs(bad: dict) -> None:
    with pytest.raises(ValueError):
        oracle.ccs_select([1.0, 2.0], **bad)


def test_ccs_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        oracle.ccs_select([1.0, np.nan], 0.5)


# Class balance


def test_class_quotas_by_hand() -> None:
    # 10 examples, m = 4: shares 2.0, 1.2, 0.8
    assert oracle.class_quotas([0] * 5 + [1] * 3 + [2] * 2, 4) == {0: 2, 1: 1, 2: 1}
    # shares 1.5 and 1.5: the tie goes to the smaller label
    assert oracle.class_quotas([9, 9, 9, 4, 4, 4], 3) == {4: 2, 9: 1}
    assert oracle.class_quotas([0, 1, 2], 0) == {0: 0, 1: 0, 2: 0}


def test_class_balanced_by_hand() -> None:
    scores = [0, 10, 1, 11, 2, 12, 3, 13, 4, 5]
    labels = [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]
    got = oracle.ccs_select_class_balanced(
        scores, labels, prune_rate=0.5, cutoff=0.25, num_strata=2, seed=3
    )
    # m = 5: 3 of the six of class 0, 2 of the four of class 1; one of each class is cut
    assert got["quotas"] == {0: 3, 1: 2}
    assert got["cut"] == [0, 1]
    # class 0 keeps scores 1..5: {1, 2} and {3, 4, 5}; class 1 keeps 11..13: {11} and {12, 13}
    assert got["classes"][0]["populations"] == [2, 3]
    assert got["classes"][0]["budgets"] == [1, 2]
    assert got["classes"][1]["populations"] == [1, 2]
    assert got["classes"][1]["budgets"] == [1, 1]
    expected = smallest([2, 4], 1, 3) + smallest([6, 8, 9], 2, 3) + [3] + smallest([5, 7], 1, 3)
    assert got["indices"] == sorted(expected)


def test_class_balanced_quotas_always_fit() -> None:
    rng = np.random.default_rng(5)
    for trial in range(200):
        n = int(rng.integers(1, 60))
        labels = rng.integers(0, 5, n)
        rate = float(rng.integers(0, 10)) / 10
        cutoff = float(rng.integers(0, round(rate * 10) + 1)) / 10
        got = oracle.ccs_select_class_balanced(
            rng.normal(size=n), labels, rate, cutoff=cutoff, num_strata=4, seed=trial
        )
        assert len(got["indices"]) == oracle.num_kept(n, rate)
        for c, run in got["classes"].items():
            assert len(run["indices"]) == got["quotas"][c]
            assert all(labels[i] == c for i in run["indices"] + run["cut"])


def test_class_balanced_with_one_class_is_plain() -> None:
    scores = np.random.default_rng(6).normal(size=50)
    plain = oracle.ccs_select(scores, 0.8, cutoff=0.2, num_strata=7, hard="high", seed=9)
    got = oracle.ccs_select_class_balanced(
        scores, [3] * 50, 0.8, cutoff=0.2, num_strata=7, hard="high", seed=9
    )
    assert got["classes"] == {3: plain}
    assert got["indices"] == plain["indices"]


# The official code's bins


def test_official_budgets_by_hand() -> None:
    # step (4.0004 - 1) / 3 = 1.00013: the edge values 2 and 3 fall into the lower bins
    assert oracle.official_budgets([1.0, 2.0, 3.0, 4.0], 3, num_strata=3) == ([2, 1, 1], [1, 1, 1])
    assert oracle.official_budgets([2.0] * 5, 3, num_strata=4) == ([5, 0, 0, 0], [3, 0, 0, 0])


def test_official_budgets_lose_a_non_positive_maximum() -> None:
    populations, budgets = oracle.official_budgets([-3.0, -2.0, -1.0], 3, num_strata=2)
    assert populations == [1, 1]
    assert budgets == [1, 1]
    assert oracle.official_budgets([0.0, 0.0], 1, num_strata=2) == ([0, 0], [0, 0])
    assert oracle.official_budgets([-1.0, 0.0], 2, num_strata=2) == ([1, 0], [1, 0])


# Scores


def trace() -> list[oracle.Visit]:
    """Return three epochs of examples 0 and 1; 2 is never seen and 3 is seen once."""
    return [
        (0, 0, [0.5, 0.3, 0.2], [3.0, 1.0, 0.0], 0),
        (0, 1, [0.5, 0.3, 0.2], [3.0, 1.0, 0.0], 1),
        (1, 0, [0.2, 0.7, 0.1], [0.0, 2.0, -1.0], 0),
        (1, 1, [0.6, 0.2, 0.2], [2.0, 0.0, 0.0], 1),
        (1, 1, [0.0, 1.0, 0.0], [0.0, 99.0, 0.0], 1),  # padding: the epoch's second visit
        (1, 3, [0.1, 0.1, 0.8], [0.0, 0.0, 5.0], 2),
        (2, 1, [0.7, 0.1, 0.2], [4.0, 0.0, 1.0], 1),
        (2, 0, [0.6, 0.2, 0.2], [2.0, 0.5, 0.0], 0),
    ]


def test_scores_by_hand() -> None:
    windows = {"dual_window": 2, "dyn_unc_window": 2, "tdds_window": 3}
    got = oracle.scores_from_log(trace(), 4, 3, window=2, **windows)

    def check(name: str, expected: list[float]) -> None:
        assert got[name].dtype == np.float64
        np.testing.assert_allclose(got[name], expected, atol=1e-5, err_msg=name)

    nan = math.nan
    check("aum", [(0.2 - 0.5 + 0.4) / 3, (-0.2 - 0.4 - 0.6) / 3, nan, 0.7])
    check("forgetting", [1, 3, nan, 0])
    check("correctness", [2, 0, nan, 1])
    check("confidence", [1.3 / 3, 0.2, nan, 0.8])
    # deviations of 0.5, 0.2, 0.6 from 1.3 / 3: 0.06667, -0.23333, 0.16667
    check("variability", [math.sqrt(0.0866667 / 3), math.sqrt(0.02 / 3), nan, 0])
    el2n_0 = [math.sqrt(0.38), math.sqrt(1.14)]
    el2n_1 = [math.sqrt(0.25 + 0.49 + 0.04), math.sqrt(0.36 + 0.64 + 0.04)]
    check("el2n", [sum(el2n_0) / 2, sum(el2n_1) / 2, nan, math.sqrt(0.06)])
    check("el2n_sum", [sum(el2n_0), sum(el2n_1), nan, math.sqrt(0.06)])
    # p_y 0.5, 0.2, 0.6 and 0.3, 0.2, 0.1: the std of two values is their distance / sqrt(2)
    dual_0 = (0.3 / SQRT2 * 0.65 + 0.4 / SQRT2 * 0.6) / 2
    dual_1 = (0.1 / SQRT2 * 0.75 + 0.1 / SQRT2 * 0.85) / 2
    check("dual", [dual_0, dual_1, nan, nan])
    check("dyn_unc", [0.35 / SQRT2, 0.1 / SQRT2, nan, nan])
    # example 0: steps 0.845682 and 1.048349, one window: the norm is their distance / sqrt(2)
    assert got["tdds"][0] == pytest.approx(0.9 * 0.202667 / SQRT2, abs=1e-5)
    assert np.isnan(got["tdds"][2:]).all()

    got = oracle.scores_from_log(trace(), 4, 3, **windows, tdds_abs="sum", dual_visits=2)
    # steps |0.340536| and |0.547243|
    assert got["tdds"][0] == pytest.approx(0.9 * 0.206707 / SQRT2, abs=1e-5)
    assert got["dual"][0] == pytest.approx(0.3 / SQRT2 * 0.65)


def test_aum_and_forgetting_options() -> None:
    got = oracle.scores_from_log(trace(), 4, 3, space="logit", reduce="sum", never_learned="zero")
    np.testing.assert_allclose(got["aum"], [2 - 2 + 1.5, -2 - 2 - 4, math.nan, 5])
    np.testing.assert_array_equal(got["forgetting"], [1, 0, math.nan, 0])
    got = oracle.scores_from_log(trace(), 4, 3, reduce="sum")
    np.testing.assert_allclose(got["aum"], [0.1, -1.2, math.nan, 0.7])


def test_forgetting_counts_only_correct_to_wrong() -> None:
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    sequence = [right, wrong, right, right, wrong, wrong]  # 2 down, 1 up
    log = [(epoch, 0, p, p, 0) for epoch, p in enumerate(sequence)]
    assert oracle.scores_from_log(log, 1, 2)["forgetting"][0] == 2


def test_tdds_weights_of_two_windows() -> None:
    probs = [[0.5, 0.5], [0.8, 0.2], [0.6, 0.4], [0.9, 0.1]]
    log = [(epoch, 0, p, p, 0) for epoch, p in enumerate(probs)]
    a = 0.8 * math.log(1.6) + 0.2 * math.log(2.5)
    b = 0.6 * math.log(4 / 3) + 0.4 * math.log(2)
    c = 0.9 * math.log(1.5) + 0.1 * math.log(4)
    expected = 0.09 * abs(a - b) / SQRT2 + 0.9 * abs(b - c) / SQRT2
    got = oracle.scores_from_log(log, 1, 2, tdds_window=3)["tdds"][0]
    assert got == pytest.approx(expected, abs=1e-6)


def test_scores_agree_with_numpy_on_a_long_log() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(40, 5, 4))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = rng.integers(0, 4, 5)
    log = [
        (t, int(i), probs[t, i], logits[t, i], int(labels[i]))
        for t in range(40)
        for i in rng.permutation(5)
    ]
    got = oracle.scores_from_log(log, 5, 4)
    p = probs[:, np.arange(5), labels]
    view = np.lib.stride_tricks.sliding_window_view
    first = view(p[:30], 10, axis=0)
    dual = (first.std(-1, ddof=1) * (1 - first.mean(-1))).mean(0)
    np.testing.assert_allclose(got["dual"], dual)
    np.testing.assert_allclose(got["dyn_unc"], view(p, 10, axis=0).std(-1, ddof=1).mean(0))
    np.testing.assert_allclose(got["variability"], p.std(0))
    error = np.linalg.norm(probs - np.eye(4)[labels], axis=-1)
    np.testing.assert_allclose(got["el2n"], error[:10].mean(0))
    steps = np.abs(probs[1:] * (np.log(probs[1:] + 1e-8) - np.log(probs[:-1] + 1e-8))).sum(-1)
    inside = view(steps, 9, axis=0)
    norms = np.linalg.norm(inside - inside.mean(-1, keepdims=True), axis=-1)
    weights = 0.9 * 0.1 ** np.arange(len(norms) - 1, -1, -1)
    np.testing.assert_allclose(got["tdds"], weights @ norms)


# Coverage


def test_coverage_auc_by_hand() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    # distances to row 0: 0, 5, 1, 10
    assert oracle.coverage_auc(features, [0]) == pytest.approx(4.0)
    # with row 3: 0, 5, 1, 0
    assert oracle.coverage_auc(features, [0, 3]) == pytest.approx(1.5)
    assert oracle.coverage_auc(features, range(4)) == 0.0
    with pytest.raises(ValueError):
        oracle.coverage_auc(features, [])
