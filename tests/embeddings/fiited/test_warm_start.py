"""Chunks of a trained table at the first round after a warm start."""

import pytest
import torch

from mlkit.embeddings import DynamicEmbedding

ROWS, DIM = 200, 8


def warm(**changes):
    weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    settings = {
        "target_density": 0.4, "warm_start": "magnitude", "schedule": "fixed", "prune_every": 2,
        "optimizer": "sgd", "lr": 0.0, "trigger": 0.0, "hysteresis": 0.0,
    } | changes  # fmt: skip
    return DynamicEmbedding.from_pretrained(weight, freeze=False, **settings)


def read(table, ids, times=1):
    for _ in range(times):
        table(ids).sum().backward()
        table.store.step()


@pytest.mark.parametrize("utility_dtype", ["float32", "uint8"])
def test_of_what_was_not_read_yet_the_smallest_leave_first(utility_dtype):
    table = warm(utility_dtype=utility_dtype)
    store = table.store
    before = store.resident(slice(0, ROWS)).clone()
    norm = table.dense_weight().view(ROWS, 4, 2).norm(dim=2)
    ids = torch.randint(ROWS, (20,), generator=torch.Generator().manual_seed(1))
    read(table, ids, 2)
    unread = torch.ones(ROWS, dtype=torch.bool)
    unread[ids] = False
    after = store.resident(slice(0, ROWS))
    had, has = before[unread], after[unread]
    left = had & ~has
    assert 0 < int(left.sum()) < 0.5 * int(had.sum())
    slack = 1.1 if utility_dtype == "uint8" else 1.0  # a code is 9 %
    assert norm[unread][left].max() <= slack * norm[unread][had & has].min()
    assert not store.is_warm


def test_what_is_read_wins_in_the_end():
    table = warm(decay=0.5)
    hot = (~table.store.resident(slice(0, ROWS)).all(1)).nonzero().squeeze(1)[:40]
    read(table, hot, 30)
    assert table.store.resident(slice(0, ROWS))[hot].all()


def test_a_checkpoint_before_the_first_round_is_still_warm():
    one, two = warm(), warm()
    two.store.reset_parameters()
    assert not two.store.is_warm
    two.load_state_dict(one.state_dict())
    assert two.store.is_warm
    ids = torch.arange(50)
    read(one, ids, 2)
    read(two, ids, 2)
    assert torch.equal(one.store.header, two.store.header)
