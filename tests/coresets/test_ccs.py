"""CCS against the slow oracle, which was written from the paper without sight of this code."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from mlkit.coresets import CCS, ArrayScore, Stratified
from mlkit.coresets.counts import num_cut, num_selected, water_fill
from mlkit.coresets.keyed import draw, keyed_hash
from mlkit.coresets.selection import _pool
from mlkit.errors import InvalidTypeError, InvalidValueError
from tests.coresets import oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*of the examples share one of")

SCORES = hnp.arrays(
    np.float32,
    st.integers(1, 80),
    elements=st.floats(-5, 5, width=32) | st.sampled_from([0.0, 1.0, np.inf, -np.inf]),
)
RATES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95])


@settings(max_examples=300, deadline=None)
@given(
    SCORES, RATES, RATES, st.integers(1, 60), st.sampled_from(["low", "high"]), st.integers(0, 9)
)
def test_equals_oracle(scores, prune_rate, cutoff, num_strata, hard, seed):
    cutoff = min(cutoff, prune_rate)
    got = CCS(prune_rate=prune_rate, cutoff=cutoff, num_strata=num_strata, seed=seed).select(
        scores, hard=hard
    )
    want = oracle.ccs_select(scores, prune_rate, cutoff, num_strata, hard, seed)
    assert got.indices.tolist() == want["indices"]
    budgets = [s["budget"] for s in got.report["strata"]]
    assert budgets == [b for b, p in zip(want["budgets"], want["populations"], strict=True) if p]
    assert len(got) == oracle.num_kept(len(scores), prune_rate)


@settings(max_examples=100, deadline=None)
@given(SCORES, RATES, RATES, st.data())
def test_class_balanced_equals_oracle(scores, prune_rate, cutoff, data):
    cutoff = min(cutoff, prune_rate)
    labels = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores)))
    )
    got = CCS(prune_rate=prune_rate, cutoff=cutoff, num_strata=7, class_balanced=True).select(
        scores, hard="low", labels=labels
    )
    want = oracle.ccs_select_class_balanced(scores, labels, prune_rate, cutoff, 7)
    assert got.indices.tolist() == want["indices"]


@settings(max_examples=100, deadline=None)
@given(SCORES, st.permutations(range(80)), st.integers(0, 5))
def test_permuting_the_data_permutes_the_result(scores, order, seed):
    order = np.array([i for i in order if i < len(scores)])
    ids = np.arange(len(scores)) * 7 - 3
    selector = CCS(prune_rate=0.5, cutoff=0.2, num_strata=5, seed=seed)
    straight = selector.select(scores, hard="low", ids=ids)
    shuffled = selector.select(scores[order], hard="low", ids=ids[order])
    assert set(ids[straight.indices]) == set(ids[order][shuffled.indices])


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.data())
def test_budgets_are_the_water_level(populations, data):
    total = data.draw(st.integers(0, sum(populations)))
    budgets = water_fill(np.array(populations), total).tolist()
    assert budgets == oracle.water_fill(populations, total)
    assert sum(budgets) == total
    assert all(b <= p for b, p in zip(budgets, populations, strict=True))
    # Where a stratum is not taken whole, no other gets more than it but for the remainder.
    for budget, population in zip(budgets, populations, strict=True):
        assert budget == population or max(budgets) <= budget + 1


def test_counts_are_exact():
    assert num_selected(60_000, 0.9) == 6_000
    assert num_cut(10, 0.3) == 3
    for n, rate in itertools.product(range(1, 300), (0.1, 0.3, 0.7, 0.9, 0.95, 0.99)):
        assert num_selected(n, rate) == oracle.num_kept(n, rate)
        assert num_cut(n, rate) == oracle.num_cut(n, rate)


def test_keyed_hash_is_splitmix64():
    ids = np.array([0, 1, 2, 10**12, -5])
    for seed in (0, 1, 2**40, -3):
        assert keyed_hash(ids, seed).tolist() == [oracle.keyed_hash(int(i), seed) for i in ids]


def test_draw_inside_a_stratum_is_uniform():
    """Chi-square over 10,000 seeds: 3 of 8."""
    strata = np.zeros(8, dtype=np.uint8)
    counts = np.zeros(8)
    for seed in range(10_000):
        counts[draw(strata, np.array([3]), seed)] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_pairs_are_drawn_uniformly():
    """All 28 pairs of 8 equally often: the draws of two members are not tied to each other."""
    strata = np.zeros(8, dtype=np.uint8)
    pairs = [tuple(draw(strata, np.array([2]), seed)) for seed in range(10_000)]
    counts = [pairs.count(p) for p in itertools.combinations(range(8), 2)]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draw_over_many_chunks_equals_one_sort(monkeypatch):
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 7, 5_000).astype(np.uint8)
    budgets = np.array([10, 0, 300, 714, 5, 700])
    budgets = np.minimum(budgets, np.bincount(strata, minlength=7)[:6])
    whole = draw(strata, budgets, 3)
    for chunk in (1, 17, 1_000):
        if chunk == 1:
            strata, budgets = strata[:200], np.minimum(budgets, 5)
            whole = draw(strata, budgets, 3)
        monkeypatch.setattr("mlkit.coresets.keyed.CHUNK", chunk)
        assert np.array_equal(draw(strata, budgets, 3), whole)
    hashes = keyed_hash(np.arange(len(strata)), 3)
    for b, budget in enumerate(budgets):
        members = np.flatnonzero(strata == b)
        expected = members[np.argsort(hashes[members])[:budget]]
        assert sorted(expected) == [i for i in whole if strata[i] == b]


def test_same_seed_same_set_and_other_seed_other_set():
    scores = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
    first = CCS(prune_rate=0.9, seed=1).select(scores, hard="low")
    assert (
        first.report["hash"]
        == CCS(prune_rate=0.9, seed=1).select(scores, hard="low").report["hash"]
    )
    assert (
        first.report["hash"]
        != CCS(prune_rate=0.9, seed=2).select(scores, hard="low").report["hash"]
    )


@pytest.mark.parametrize("num_samples", [1, 2, 49, 50, 51])
def test_nothing_pruned_keeps_everything(num_samples):
    scores = np.linspace(-1, 1, num_samples, dtype=np.float32)
    assert CCS(prune_rate=0.0).select(scores, hard="low").indices.tolist() == list(
        range(num_samples)
    )


def test_constant_scores_are_one_stratum_drawn_at_random():
    scores = np.full(100, -3.0, dtype=np.float32)
    selection = CCS(prune_rate=0.5, cutoff=0.2, seed=4).select(scores, hard="low")
    assert len(selection) == 50
    assert selection.report["effective_num_strata"] == 1


def test_scores_that_are_not_positive_keep_their_maximum():
    scores = -np.arange(10, dtype=np.float32)
    assert CCS(prune_rate=0.0, num_strata=3).select(scores, hard="low").indices[0] == 0


def test_one_stratum_is_random_sampling_on_what_is_kept():
    scores = np.arange(1000, dtype=np.float32)
    one = CCS(prune_rate=0.5, cutoff=0.3, num_strata=1, seed=2).select(scores, hard="low")
    assert one.indices.min() >= 300
    kept = np.arange(300, 1000)
    expected = kept[np.argsort(keyed_hash(kept, 2))[:500]]
    assert one.indices.tolist() == sorted(expected.tolist())


def test_more_than_255_strata():
    scores = np.random.default_rng(0).uniform(size=2_000).astype(np.float32)
    got = CCS(prune_rate=0.5, num_strata=700).select(scores, hard="low")
    assert got.indices.tolist() == oracle.ccs_select(scores, 0.5, 0.0, 700)["indices"]


def test_another_score_decides_the_cut():
    rng = np.random.default_rng(0)
    scores, aum = rng.normal(size=(2, 500)).astype(np.float32)
    got = CCS(prune_rate=0.7, cutoff=0.3).select(
        scores, hard="high", cutoff_scores=ArrayScore(aum, "low", "aum")
    )
    want = oracle.ccs_select(scores, 0.7, 0.3, hard="high", cutoff_scores=aum, cutoff_hard="low")
    assert got.indices.tolist() == want["indices"]
    assert got.report["cut_by"] == "aum"


@pytest.mark.parametrize("seed", range(5))
def test_official_preset_has_the_official_strata(seed):
    scores = np.random.default_rng(seed).gamma(2.0, size=3_000).astype(np.float32)
    aum = ArrayScore(scores, "low", "aum")
    got = CCS(prune_rate=0.8, preset="official").select(aum)
    populations, budgets = oracle.official_budgets(scores, 600)
    kept = [(p, b) for p, b in zip(populations, budgets, strict=True) if p]
    assert [(s["population"], s["budget"]) for s in got.report["strata"]] == kept
    assert sum(populations) == len(scores)


def test_official_preset_refuses_what_it_would_lose():
    with pytest.raises(InvalidValueError, match="preset='official' loses examples"):
        CCS(prune_rate=0.5, preset="official").select(ArrayScore(-np.arange(9.0), "low", "aum"))
    with pytest.raises(InvalidValueError, match=r"cutoff_scores=table\['aum'\]"):
        CCS(prune_rate=0.5, preset="official").select(np.arange(9.0), hard="high")


def test_an_outlier_makes_ccs_random_and_clipping_cures_it():
    scores = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    scores[7] = 1e6
    with pytest.warns(UserWarning, match="100% .* 2 non-empty strata.*binning='quantile-clipped'"):
        CCS(prune_rate=0.9).select(scores, hard="low")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipped = Stratified(prune_rate=0.9, binning="quantile-clipped").select(scores, hard="low")
    assert clipped.report["effective_num_strata"] == 50
    inside = np.delete(scores, 7)
    assert clipped.report["strata"][-1]["high"] < inside.max() + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_rate": 1.0}, r"prune_rate must be a number in \[0, 1\), got 1.0"),
        ({"prune_rate": -0.1}, r"prune_rate must be a number in \[0, 1\), got -0.1"),
        ({"prune_rate": float("nan")}, "prune_rate must be a number"),
        ({"prune_rate": "half"}, "prune_rate must be a number"),
        ({"prune_rate": 0.3, "cutoff": 0.4}, "cutoff must be at most prune_rate, got cutoff=0.4"),
        ({"prune_rate": 0.3, "cutoff": -1}, r"cutoff must be a number in \[0, 1\]"),
        ({"prune_rate": 0.3, "cutoff": "best"}, "cutoff must be a number or 'auto'"),
        ({"prune_rate": 0.3, "num_strata": 0}, "num_strata must be at least 1, got 0"),
        ({"prune_rate": 0.3, "preset": "mine"}, "preset must be 'paper' or 'official'"),
        ({"prune_rate": 0.3, "binning": "log"}, "binning must be 'equal-width'"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        CCS(**arguments)


def test_bad_inputs():
    selector = CCS(prune_rate=0.5)
    scores = np.arange(10.0)
    with pytest.raises(InvalidValueError, match="hard='low' or hard='high'"):
        selector.select(scores)
    with pytest.raises(InvalidValueError, match="contradicts the score 'aum'"):
        selector.select(ArrayScore(scores, "low", "aum"), hard="high")
    broken = scores.copy()
    broken[[3, 5]] = np.nan
    with pytest.raises(InvalidValueError, match=r"2 of 10 scores are NaN \(first index 3\)"):
        selector.select(broken, hard="low")
    with pytest.raises(InvalidValueError, match=r"lengths differ: .*'scores': 10, 'labels': 9"):
        selector.select(scores, hard="low", labels=np.zeros(9, dtype=int))
    with pytest.raises(InvalidValueError, match="CCS needs labels"):
        CCS(prune_rate=0.5, class_balanced=True).select(scores, hard="low")
    with pytest.raises(InvalidValueError, match="the data set is empty"):
        selector.select(np.zeros(0), hard="low")
    with pytest.raises(InvalidValueError, match="scores must be 1-dimensional"):
        selector.select(np.zeros((2, 2)), hard="low")
    with pytest.raises(InvalidTypeError, match="two passes"):
        selector.select(iter([1.0]), hard="low")
    with pytest.raises(InvalidValueError, match="hard must be 'low' or 'high'"):
        selector.select(scores, hard="hardest")
    with pytest.raises(InvalidValueError, match="unseen must be"):
        selector.select(scores, hard="low", unseen="ignore")


def test_examples_never_visited():
    values = np.arange(10, dtype=np.float32)
    values[[2, 7]] = np.nan
    unseen = np.isnan(values)
    score = ArrayScore(values, "low", "aum", unseen)
    selector = CCS(prune_rate=0.5, cutoff=0.2, num_strata=1)
    with pytest.raises(InvalidValueError, match=r"2 of 10 examples have no score 'aum' .*index 2"):
        selector.select(score)
    assert not {2, 7} & set(selector.select(score, unseen="drop").indices.tolist())
    # The hardest score is 0: with ids 0, 2 and 7 tied there, the cut takes two of the three.
    hard = selector.select(score, unseen="hard")
    assert len({0, 2, 7} & set(hard.indices.tolist())) <= 1
    easy = selector.select(score, unseen="easy")
    assert not {0, 1} & set(easy.indices.tolist())
    with pytest.raises(InvalidValueError, match="only 8 of 10 are left"):
        CCS(prune_rate=0.1).select(score, unseen="drop")


def test_report_explains_the_choice(tmp_path):
    scores = np.linspace(0, 1, 200, dtype=np.float32)
    labels = np.arange(200) % 3
    selection = CCS(prune_rate=0.5, cutoff=0.1, num_strata=4).select(
        scores, hard="high", labels=labels
    )
    report = selection.report
    assert sum(s["population"] for s in report["strata"]) == 180
    assert sum(s["budget"] for s in report["strata"]) == 100
    assert report["cut"] == 20
    assert report["cutoff_score"] == pytest.approx(180 / 199)
    assert sum(report["class_histogram"].values()) == 100
    assert "cut: 20" in selection.explain()
    assert "25 of 45" in selection.explain()
    selection.save(tmp_path / "selection.safetensors")
    loaded = type(selection).load(tmp_path / "selection.safetensors")
    assert loaded.indices.tolist() == selection.indices.tolist()
    assert loaded.report == report


def test_altered_selection_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    from mlkit.coresets import Selection

    path = tmp_path / "selection.safetensors"
    CCS(prune_rate=0.5).select(np.arange(4.0), hard="low").save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + b"\x07" + data[-7:])
    with pytest.raises(InvalidValueError, match="do not match the hash"):
        Selection.load(path)
    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(InvalidValueError, match="is not a Selection file"):
        Selection.load(path)


def test_settings_round_trip():
    first = CCS(prune_rate=0.9, cutoff=0.3, num_strata=7, seed=5)
    other = CCS(prune_rate=0.1)
    other.load_state_dict(first.state_dict())
    assert other == first
    with pytest.raises(InvalidValueError, match="cutoff must be at most"):
        other.load_state_dict({**first.state_dict(), "cutoff": 0.95})
    assert other == first


def test_torch_tensors_of_any_float_type():
    import torch

    scores = torch.linspace(-1, 1, 100)
    plain = CCS(prune_rate=0.5).select(scores.numpy(), hard="low")
    assert np.array_equal(CCS(prune_rate=0.5).select(scores, hard="low").indices, plain.indices)
    half = CCS(prune_rate=0.5).select(scores.to(torch.bfloat16).requires_grad_(), hard="low")
    assert len(half) == 50


def test_pool_is_checked_once():
    pool = _pool(np.arange(3.0), "low", None, None, None, None, None, "error")
    assert pool.num_samples == 3
