"""The synthetic clicks against brute force and scikit-learn: what is planted is there."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from mlkit.data.ctr import SyntheticConfig, expected_auc
from mlkit.data.ctr.synthetic import synthetic
from mlkit.errors import InvalidValueError

SMALL = {
    "num_samples": 30_000,
    "table_sizes": [50, 400, 900, 30],
    "num_interacting": 2,
    "latent_dim": 16,
}


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12, unique=True))
def test_expected_auc_is_the_mean_over_pairs(logits):
    odds = 1 / (1 + np.exp(-np.array(logits)))
    right = both = 0.0
    for i in range(len(odds)):
        for j in set(range(len(odds))) - {i}:
            mass = odds[i] * (1 - odds[j])
            both += mass
            right += mass * (odds[i] > odds[j])
    distinct = np.abs(np.subtract.outer(odds, odds))[~np.eye(len(odds), dtype=bool)]
    if distinct.min() > 1e-9:
        assert expected_auc(np.array(logits)) == pytest.approx(right / both, abs=1e-9)


@pytest.mark.parametrize("plant", ["frequency", "independent"])
def test_rate_and_auc_are_what_was_asked_for(plant):
    stream = synthetic(seed=3, plant=plant, drift_at=(), base_rate=0.1, oracle_auc=0.75, **SMALL)
    # 30,000 draws: standard errors 0.002 of the rate and 0.005 of the AUC; 3 of each
    assert stream.label.mean() == pytest.approx(0.1, abs=0.006)
    got = roc_auc_score(stream.label, stream.oracle_logits)
    assert got == pytest.approx(0.75, abs=0.015)
    assert got == pytest.approx(expected_auc(stream.oracle_logits), abs=0.015)
    assert stream.oracle_auc("test") == expected_auc(stream.oracle_logits[stream.rows("test")])


def test_log_odds_are_those_of_a_factorisation_machine_of_the_true_dimensions():
    stream = synthetic(seed=1, drift_at=(0.5,), renew_share=0.2, **SMALL)
    position = stream.drift_at[0]
    for phase, start in enumerate((0, position)):
        tables = stream._worlds[phase].tables
        rows = slice(start, start + 400)
        pairs, linear = np.zeros(400), np.zeros(400)
        for left, right in combinations(range(4), 2):
            a, b = tables[left], tables[right]
            if a.interacts and b.interacts:
                for n, ids in enumerate(stream.sparse[rows]):
                    i, j = ids[left], ids[right]
                    shared = min(
                        stream.true_dims(phase)[left][i], stream.true_dims(phase)[right][j]
                    )
                    pairs[n] += a.vectors[i, :shared] @ b.vectors[j, :shared]
        for table, ids in zip(tables, stream.sparse[rows].T, strict=True):
            linear += 0 if table.interacts else table.weights[ids]
        dense = stream.dense[rows] @ stream._worlds[phase].dense_weights
        terms = np.column_stack([pairs, linear, dense, np.ones(400)])
        fitted, *_ = np.linalg.lstsq(terms, stream.oracle_logits[rows], rcond=None)
        # float32 sums of a few hundred terms
        assert terms @ fitted == pytest.approx(stream.oracle_logits[rows], abs=1e-4)
        assert (fitted[:3] > 0).all()
        weights = fitted if phase == 0 else weights
        assert fitted == pytest.approx(weights, rel=1e-3)


def test_parts_have_their_shares_of_the_variance():
    stream = synthetic(seed=5, drift_at=(), **SMALL)
    parts = np.stack(stream._worlds[0].parts(stream.dense, stream.sparse)).astype(float)
    terms = np.vstack([parts, np.ones(len(stream.label))]).T
    weights, *_ = np.linalg.lstsq(terms, stream.oracle_logits, rcond=None)
    variances = (weights[:3, None] * parts).var(1)
    # the sampling of popular rows: some per cent at 30,000 examples
    assert variances / variances.sum() == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


def test_ids_follow_zipfs_law():
    stream = synthetic(seed=2, drift_at=(), zipf=[1.2, 0.5], **SMALL)
    for column, (size, s) in enumerate(
        zip(SMALL["table_sizes"], [1.2, 0.5, 1.2, 0.5], strict=True)
    ):
        law = np.arange(1, size + 1) ** -s
        law /= law.sum()
        frequency = stream.frequency()[column]
        assert np.sort(frequency)[::-1] == pytest.approx(law)
        share = np.bincount(stream.sparse[:, column], minlength=size) / len(stream.label)
        error = np.sqrt(law.max() / len(stream.label))
        assert np.abs(share - frequency).max() < 5 * error
        assert not np.array_equal(np.argsort(-frequency), np.arange(size))


def test_true_dimensions_go_by_frequency_or_do_not():
    by_rank = synthetic(seed=0, plant="frequency", **SMALL)
    alone = synthetic(seed=0, plant="independent", **SMALL)
    for number, interacts in enumerate([False, True, False, True]):
        dims, frequency = by_rank.true_dims()[number], by_rank.frequency()[number]
        others, others_frequency = alone.true_dims()[number], alone.frequency()[number]
        if not interacts:
            assert set(dims) == set(others) == {1}
            continue
        assert (np.diff(dims[np.argsort(-frequency)]) <= 0).all()
        assert (dims.max(), dims.min()) == (16, 2)
        assert 2 <= others.min() <= others.max() <= 16
        # of n independent pairs the rank correlation has a standard deviation of 1/sqrt(n)
        assert abs(spearmanr(others, others_frequency)[0]) < 4 / np.sqrt(len(others))


@pytest.mark.parametrize("plant", ["frequency", "independent"])
def test_a_drift_moves_ranks_and_renews_rows(plant):
    stream = synthetic(
        seed=4, plant=plant, drift_at=(0.25, 0.5), drift_share=0.3, renew_share=0.1, **SMALL
    )
    assert stream.drift_at == (7500, 15_000)
    for phase in (1, 2):
        old, new = stream._worlds[phase - 1], stream._worlds[phase]
        for number, (before, after) in enumerate(zip(old.tables, new.tables, strict=True)):
            rows = len(before.ids)
            was, now = (stream.frequency(p)[number] for p in (phase - 1, phase))
            assert np.sort(was) == pytest.approx(np.sort(now))
            moved = (was != now).sum()
            assert 0 < moved <= round(0.3 * rows)
            same_dims = np.array_equal(before.dims, after.dims)
            assert same_dims == (plant == "independent" or not before.interacts)
            kind = "vectors" if before.interacts else "weights"
            changed = getattr(before, kind) != getattr(after, kind)
            assert changed.reshape(rows, -1).any(1).sum() == round(0.1 * rows)
    hot = np.argmax(stream.frequency(2)[1])
    late = stream.sparse[15_000:, 1]
    assert np.bincount(late).argmax() == hot


def test_equal_arguments_give_equal_streams_and_seeds_differ():
    first, again, other = (synthetic(seed=seed, **SMALL) for seed in (7, 7, 8))
    assert first.source == again.source != other.source
    assert np.array_equal(first.oracle_logits, again.oracle_logits)
    assert not np.array_equal(first.sparse, other.sparse)
    assert first.source.startswith("synthetic clicks, seed 7, arrays sha256 ")
    assert (first.sparse.dtype, first.dense.dtype, first.label.dtype) == ("i4", "f4", "f4")


@pytest.mark.parametrize(("num", "drifts"), [(1, ()), (8193, (0.5,)), (17, (0.3, 0.7))])
def test_odd_lengths(num, drifts):
    stream = synthetic(
        **{**SMALL, "num_samples": num}, seed=0, drift_at=drifts, val_fraction=0, test_fraction=0
    )
    assert len(stream.label) == num
    assert np.isfinite(stream.oracle_logits).all()
    assert len(stream._worlds) == len(drifts) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plant": "freq"}, "no plant 'freq'; did you mean 'frequency'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"latent_dim": 1}, "latent_dim=1 is below min_dim=2"),
        ({"table_sizes": [5]}, r"at least two tables of at least two rows, got \[5\]"),
        ({"table_sizes": [5, 1]}, r"got \[5, 1\]"),
        ({"zipf": []}, r"exponents of at least 0, got \[\]"),
        ({"zipf": [-1]}, r"exponents of at least 0, got \[-1\]"),
        ({"num_interacting": 1}, r"num_interacting must be in 2 \.\. 26, .* got 1"),
        ({"num_interacting": 26}, "linear_share=0.2 needs a table that does not interact"),
        ({"drift_share": 1.5}, r"drift_share must be in \[0, 1\], got 1.5"),
        ({"linear_share": 0.5}, "must not exceed 1 together"),
        ({"base_rate": 0}, r"base_rate must be in \[0.01, 0.99\]"),
        ({"oracle_auc": 0.5}, r"oracle_auc in \(0.5, 0.95\], got 0.25 and 0.5"),
        (
            {"drift_at": [0.5, 0.5], "num_samples": 1000},
            r"ascending, got \[0.5, 0.5\] of 1000 examples",
        ),
        ({"drift_at": [0]}, r"in \(0, 1\), ascending, got \[0\]"),
        ({"drift_at": [1.0]}, r"got \[1.0\]"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(InvalidValueError, match=message):
        SyntheticConfig(**changes)
