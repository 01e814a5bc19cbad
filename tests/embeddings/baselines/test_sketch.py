"""HotSketch against a loop over single insertions, and against exact counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.embeddings.baselines.sketch import HotSketch
from mlkit.embeddings.id_hash import hash_ids
from mlkit.errors import InvalidValueError


class SlowSketch:
    """Space-Saving in buckets, one id at a time."""

    def __init__(self, buckets, seed):
        self.seed, self.buckets = seed, [[] for _ in range(buckets)]

    def place(self, one):
        return int(hash_ids(torch.tensor([one]), self.seed, len(self.buckets)))

    def insert(self, one, importance, protected):
        bucket = self.buckets[self.place(one)]
        for entry in bucket:
            if entry[0] == one:
                entry[1] += importance
                return
        if len(bucket) < 4:
            bucket.append([one, importance])
            return
        free = [entry for entry in bucket if entry[0] not in protected]
        if free:
            weakest = min(free, key=lambda entry: entry[1])
            weakest[0] = one
            weakest[1] += importance


@settings(deadline=None, max_examples=40)
@given(
    buckets=st.integers(1, 5),
    seed=st.integers(0, 5),
    batches=st.lists(
        st.dictionaries(st.integers(0, 40), st.integers(1, 50), min_size=1, max_size=20),
        min_size=1,
        max_size=5,
    ),
    owners=st.sets(st.integers(0, 40), max_size=10),
)
def test_batches_equal_single_insertions(buckets, seed, batches, owners):
    """In the order that is documented: known ids first, then new ones by importance.

    Importances are whole numbers and made distinct, so that no tie decides.
    """
    sketch, slow = HotSketch(buckets, seed=seed), SlowSketch(buckets, seed)
    protected: set[int] = set()
    for number, batch in enumerate(batches):
        ids = sorted(batch)
        value = {i: batch[i] + 100 * k + 10_000 * number for k, i in enumerate(ids)}
        known = {entry[0] for bucket in slow.buckets for entry in bucket}
        for one in sorted(ids, key=lambda i: (i not in known, value[i])):
            slow.insert(one, value[one], protected)
        sketch.insert(torch.tensor(ids), torch.tensor([float(value[i]) for i in ids]))
        for one in owners:
            found, bucket, slot = sketch.locate(torch.tensor([one]))
            if found:
                sketch.rows[bucket, slot] = 1
                protected.add(one)
        for bucket, keys, scores in zip(slow.buckets, sketch.keys, sketch.scores, strict=True):
            held = {int(k): float(s) for k, s in zip(keys, scores, strict=True) if k >= 0}
            assert held == {one: float(score) for one, score in bucket}


def test_heavy_hitters_of_a_zipf_stream():
    """The 50 most frequent of 20,000 ids, by exact counts, are in 100 buckets with the top scores.

    Space-Saving never underestimates an id that it holds since the beginning.
    """
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, 20_001).float() ** 1.1
    names = torch.randperm(20_000, generator=generator)
    counts = torch.zeros(20_000)
    sketch = HotSketch(100)
    for _ in range(200):
        batch = names[torch.multinomial(shares, 512, replacement=True, generator=generator)]
        ids, times = batch.unique(return_counts=True)
        counts[ids] += times
        sketch.insert(ids, times.float())
    top = counts.topk(50).indices
    found, bucket, slot = sketch.locate(top)
    assert found.float().mean() >= 0.98
    assert (sketch.scores[bucket, slot][found] >= counts[top][found]).all()
    best = sketch.keys.flatten()[sketch.scores.flatten().topk(50).indices].long()
    assert len(set(best.tolist()) & set(top.tolist())) >= 40
    assert float(sketch.scores.sum()) == 200 * 512, "what comes in stays in"


def test_owned_rows():
    sketch = HotSketch(3)
    sketch.insert(torch.tensor([5, 9]), torch.tensor([1.0, 2.0]))
    _, bucket, slot = sketch.locate(torch.tensor([9]))
    sketch.rows[bucket, slot] = 7
    assert sketch.owned_rows(torch.tensor([[9, 5], [1, 9]])).tolist() == [[7, -1], [-1, 7]]
    sketch.reset_parameters()
    assert sketch.owned_rows(torch.tensor([9])).tolist() == [-1]


def test_ids_beyond_int32_never_match():
    """An id is compared as int64: 2^32 + 5 is not 5."""
    sketch = HotSketch(1)
    sketch.insert(torch.tensor([5]), torch.tensor([1.0]))
    assert not sketch.locate(torch.tensor([2**32 + 5]))[0]


def test_no_bucket():
    with pytest.raises(InvalidValueError, match="buckets must be at least 1, got 0"):
        HotSketch(0)
