"""Splits by time and batches of a stream in memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlkit.data.ctr import CTRData
from mlkit.data.ctr.columns import data_of_columns
from mlkit.data.ctr.stream import split_ends
from mlkit.errors import InvalidValueError


def data(num=11, **changes):
    rng = np.random.default_rng(0)
    arguments = {
        "name": "small",
        "source": "here",
        "dense": rng.standard_normal((num, 2), dtype=np.float32),
        "sparse": rng.integers(0, [5, 3], (num, 2)),
        "label": rng.integers(0, 2, num).astype(np.float32),
        "table_sizes": [5, 3],
        "table_names": ["user", "item"],
        "ends": (7, 8),
    }
    return CTRData(**{**arguments, **changes})


@given(st.integers(1, 40), st.integers(1, 50))
def test_batches_are_the_part_in_its_order(num, batch_size):
    whole = data(num, ends=(num // 2, num // 2 + num // 4))
    joined = []
    for split in ("train", "val", "test"):
        batches = list(whole.batches(split, batch_size))
        assert all(len(batch.label) == batch_size for batch in batches[:-1])
        assert sum(len(batch.label) for batch in batches) == whole.num_samples(split)
        joined += batches
    for name in ("dense", "sparse", "label"):
        got = np.concatenate([getattr(batch, name) for batch in joined])
        assert np.array_equal(got, getattr(whole, name))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=60).map(sorted),
    st.floats(0, 0.4),
    st.floats(0, 0.4),
)
def test_no_instant_is_in_two_parts_and_parts_are_no_shorter_than_told(times, val, test):
    num, instants = len(times), np.array(times)
    latest = num - round(test * num)
    while latest < num and latest > 0 and times[latest - 1] == times[latest]:
        latest -= 1
    latest -= round(val * num)
    if latest < num and times[max(latest, 0)] == times[0]:
        with pytest.raises(InvalidValueError, match="leave nothing of"):
            split_ends(num, val, test, times=instants)
        return
    train_end, val_end = split_ends(num, val, test, times=instants)
    assert 0 < train_end <= val_end <= num
    assert num - val_end >= round(test * num)
    assert val_end - train_end >= round(val * num)
    for end in (train_end, val_end):
        assert end in (0, num) or times[end - 1] < times[end]


def test_last_day_is_the_test_part():
    assert split_ends(100, 0.1, "last_day", days=[0, 40, 90]) == (80, 90)
    with pytest.raises(InvalidValueError, match="last_day needs two days, and the data name 1"):
        split_ends(100, 0.1, "last_day", days=[0])


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((-0.1, 0.1), r"val_fraction must be a number in \[0, 1\), got -0.1"),
        ((0.1, 1), r"test_fraction must be a number in \[0, 1\) or last_day, got 1"),
        ((0.1, "last"), "or last_day, got 'last'"),
        (("last_day", 0.1), r"val_fraction must be a number in \[0, 1\), got 'last_day'"),
        ((0.5, 0.5), "leave nothing of 10 examples for training"),
    ],
)
def test_shares_out_of_range_are_refused(fractions, message):
    with pytest.raises(InvalidValueError, match=message):
        split_ends(10, *fractions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.zeros(3, np.float32)}, "11 rows of dense features, 11 of ids and 3 labels"),
        ({"table_sizes": [5]}, "2 columns of ids, 1 sizes and 2 names"),
        ({"sparse": np.full((11, 2), 3)}, r"table 'item' has the ids 0 \.\. 2, got 3"),
        ({"sparse": np.full((11, 2), -1)}, r"table 'user' has the ids 0 \.\. 4, got -1"),
        ({"ends": (8, 7)}, r"the parts of 11 examples cannot end at \(8, 7\)"),
        ({"ends": (8, 12)}, r"cannot end at \(8, 12\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InvalidValueError, match=message):
        data(**changes)


def test_unknown_part_and_empty_batches_are_refused():
    with pytest.raises(InvalidValueError, match="no part 'valid' of the data; did you mean 'val'"):
        data().batches("valid", 2)
    with pytest.raises(InvalidValueError, match="batch_size must be at least 1, got 0"):
        data().batches("train", 0)


def test_columns_are_numbered_and_put_in_the_order_of_time():
    made = data_of_columns(
        name="x",
        licence="none",
        seconds=[86_400 * 2 + 5, 10, 86_400 * 2 + 5, 86_400],
        columns={"who": ["b", "a", "c", "a"], "what": np.array([7, 7, 9, 8])},
        dense=np.arange(4.0)[:, None],
        label=np.array([True, False, False, True]),
        val_fraction=0.25,
        test_fraction="last_day",
    )
    assert made.dense[:, 0].tolist() == [1, 3, 0, 2]
    assert made.sparse.tolist() == [[0, 0], [0, 1], [1, 0], [2, 2]]
    assert made.label.tolist() == [0, 1, 1, 0]
    assert made.table_sizes == (3, 3)
    assert made.ends == (1, 2)
    assert "licence: none" in made.source
