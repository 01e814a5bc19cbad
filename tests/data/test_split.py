"""Splits by document: a keyed hash that never changes, shares that are never exceeded."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlkit.data.split import hold_out, keyed_fraction, keyed_order


def test_fraction_is_that_of_the_hash():
    digest = hashlib.sha256(b"salt\0key").hexdigest()
    assert keyed_fraction("key", "salt") == pytest.approx(int(digest, 16) / 2**256, abs=2**-52)
    assert keyed_fraction("key", "salt") != keyed_fraction("key")


def test_fractions_are_uniform():
    fractions = [keyed_fraction(str(i), "s") for i in range(10_000)]
    assert 0 <= min(fractions) < max(fractions) < 1
    counts = np.histogram(fractions, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 1000).max() < 5 * 30  # five binomial standard deviations


def test_order_depends_on_the_key_not_on_the_place():
    keys = [f"document {i}" for i in range(50)]
    there = [keys[i] for i in keyed_order(keys, "s")]
    back = [keys[::-1][i] for i in keyed_order(keys[::-1], "s")]
    assert there == back
    assert there != keys
    assert there != [keys[i] for i in keyed_order(keys, "other")]


@given(st.lists(st.integers(1, 1000), max_size=40), st.floats(0, 1), st.randoms())
def test_held_out_share_is_never_exceeded_and_nothing_more_fits(sizes, fraction, random):
    order = random.sample(range(len(sizes)), len(sizes))
    chosen = hold_out(sizes, fraction, order)
    assert chosen == sorted(set(chosen))
    left = fraction * sum(sizes) - sum(sizes[i] for i in chosen)
    assert left >= -1e-6
    assert all(sizes[i] > left - 1e-6 for i in range(len(sizes)) if i not in chosen)


def test_all_or_nothing():
    assert hold_out([3, 4], 1.0, [1, 0]) == [0, 1]
    assert hold_out([3, 4], 0.0, [1, 0]) == []
    assert hold_out([], 0.5, []) == []
