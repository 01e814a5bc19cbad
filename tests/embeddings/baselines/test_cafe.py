"""CAFE: who owns a row, when that changes, and what changes with it."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.embeddings.baselines.cafe import CAFEEmbeddingBag
from mlkit.embeddings.rowwise_adagrad import RowWiseAdagrad
from mlkit.errors import InvalidTypeError, InvalidValueError
from tests.helpers.ddp import run_ddp


def make(rows=500, dim=4, budget=8000, **more):
    torch.manual_seed(0)
    return CAFEEmbeddingBag(rows, dim, memory_budget=budget, mode="sum", **more)


def owners(bag):
    """Owned row to id; fails if a row has two owners, or is free and owned."""
    owned = bag.sketch.rows >= 0
    rows, ids = bag.sketch.rows[owned].tolist(), bag.sketch.keys[owned].tolist()
    free = bag.free[: int(bag.free_top)].tolist()
    assert sorted(rows + free) == list(range(bag.hot_rows)), "each row is owned once, or free once"
    assert len(set(ids)) == len(ids)
    return dict(zip(rows, ids, strict=True))


def train(bag, optimizer, ids, target=1.0):
    optimizer.zero_grad()
    ((bag(ids) - target) ** 2).sum().backward()
    optimizer.step()


def stream(hot, rows, generator, batch=64):
    """Half of the reads are of the hot ids."""
    cold = torch.randint(0, rows, (batch // 2,), generator=generator)
    pick = torch.randint(0, len(hot), (batch // 2,), generator=generator)
    return torch.cat([hot[pick], cold])[:, None]


@pytest.mark.parametrize("threshold", [None, 10.0])
def test_a_planted_hot_set_gets_rows_and_drift_replaces_it(threshold):
    generator = torch.Generator().manual_seed(0)
    bag = make(sparse=True, threshold=threshold, decay=0.5, decay_every=20)
    optimizer = torch.optim.SGD(bag.parameters(), lr=1e-4)
    bag.register_optimizer(optimizer)
    ids = torch.randperm(500, generator=generator)
    first, second = ids[:40], ids[40:80]
    assert bag.hot_rows >= 45
    for hot, gone in ((first, second), (second, first)):
        for _ in range(200):
            train(bag, optimizer, stream(hot, 500, generator))
        owned = set(owners(bag).values())
        assert len(owned & set(hot.tolist())) >= 38
        assert len(owned & set(gone.tolist())) <= 8
    assert int(bag.steps) == 400


def test_importance_is_the_norm_of_the_gradient():
    """Against the gradient of each position, computed by hand; a mean of one in each step."""
    bag = make(threshold=1e9, padding_idx=3)
    ids = torch.tensor([7, 3, 8, 7, 11, 3, 9])
    offsets = torch.tensor([0, 2, 2, 5])
    weights = torch.tensor([1.0, 5.0, -2.0, 0.5, 1.0, 1.0, 3.0])
    factor = torch.randn(4, 4)
    (bag(ids, offsets, per_sample_weights=weights) * factor).sum().backward()
    bag.step()
    norm = factor.norm(dim=1)
    expected = {
        7: float(norm[0] + 0.5 * norm[2]),
        8: float(2 * norm[2]),
        11: float(norm[2]),
        9: float(3 * norm[3]),
    }
    scale = 5 / sum(expected.values())  # five reads besides the padding
    found = {
        int(k): float(s)
        for k, s in zip(bag.sketch.keys.flatten(), bag.sketch.scores.flatten(), strict=True)
        if k >= 0
    }
    assert found == pytest.approx({i: v * scale for i, v in expected.items()}, rel=1e-5)


def test_importance_in_mean_mode_and_over_several_backward_passes():
    bag = CAFEEmbeddingBag(500, 4, memory_budget=8000, threshold=1e9)
    for ids in ([[1, 2]], [[1, 4]]):
        bag(torch.tensor(ids)).sum().backward()
    bag.step()
    found, bucket, slot = bag.sketch.locate(torch.tensor([1, 2, 4]))
    assert found.all()
    assert bag.sketch.scores[bucket, slot].tolist() == pytest.approx([2, 1, 1])


def test_importance_in_mean_mode_is_shared_among_the_ids_of_a_bag():
    bag = CAFEEmbeddingBag(500, 4, memory_budget=8000, threshold=1e9, padding_idx=9)
    bag(torch.tensor([1, 9, 2, 4]), torch.tensor([0, 2])).sum().backward()
    bag.step()
    _, bucket, slot = bag.sketch.locate(torch.tensor([1, 2, 4]))
    assert bag.sketch.scores[bucket, slot].tolist() == pytest.approx([1.5, 0.75, 0.75])


def test_eval_and_no_grad_earn_nothing():
    bag = make(threshold=0.1)
    with torch.no_grad():
        bag(torch.tensor([[1]]))
    bag.eval()(torch.tensor([[1]])).sum().backward()
    assert bag.step().tolist() == []
    assert (bag.sketch.keys < 0).all()


def test_promotion_copies_the_shared_row():
    """No output jumps, and afterwards the row is the id's own."""
    bag = make(threshold=1.0)
    ids = torch.tensor([[5], [6]])
    before = bag(ids)
    before.sum().backward()
    rows = bag.step()
    assert sorted(rows.tolist()) == sorted(owners(bag))
    assert set(owners(bag).values()) == {5, 6}
    assert torch.equal(bag(ids), before)
    with torch.no_grad():
        bag.weight[rows] += 1
    torch.testing.assert_close(bag(ids), before + 1)


def test_demotion_falls_back_to_the_shared_row():
    bag = make(threshold=1.0, decay=0.1, decay_every=2)
    bag(torch.tensor([[5]])).sum().backward()
    bag.step()
    assert owners(bag).keys() == {0}
    assert int(bag.physical(torch.tensor([5]))) == 0
    assert bag.step().tolist() == []
    assert owners(bag) == {}
    assert int(bag.physical(torch.tensor([5]))) >= bag.hot_rows


def test_scarce_rows_go_to_the_highest_scores():
    bag = CAFEEmbeddingBag(500, 4, memory_budget=500, mode="sum", threshold=0.01)
    room = bag.hot_rows
    ids = torch.arange(20)
    factor = torch.arange(1.0, 21.0)[:, None]
    assert 1 <= room < 10
    (bag(ids[:, None]) * factor).sum().backward()
    bag.step()
    best = bag.sketch.scores.flatten().argsort(descending=True)[:room]
    held = set(bag.sketch.keys.flatten()[best].tolist())
    assert set(owners(bag).values()) == held
    assert int(bag.free_top) == 0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad and SparseAdam
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: RowWiseAdagrad(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.SparseAdam(list(p), lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_state_is_zeroed_where_a_row_changes_hands(optimizer):
    bag = make(sparse=True, threshold=1.0, decay=0.1, decay_every=3)
    chosen = optimizer(bag.parameters())
    handle = bag.register_optimizer(chosen)
    train(bag, chosen, torch.tensor([[5]]))
    assert owners(bag) == {0: 5}
    train(bag, chosen, torch.tensor([[5]]))
    state = {k: v for k, v in chosen.state[bag.weight].items() if torch.is_tensor(v) and v.dim()}
    if not isinstance(chosen, torch.optim.SGD):
        assert state
    for value in state.values():
        assert value[0].any(), "the old owner's state"
    bag.step()  # the third step: 5 loses its row
    assert owners(bag) == {}
    train(bag, chosen, torch.tensor([[77]]))
    assert owners(bag) == {0: 77}
    for value in state.values():
        assert not value[0].any(), "the new owner's"
        assert value.any(), "others keep theirs"
    handle.remove()
    steps = int(bag.steps)
    train(bag, chosen, torch.tensor([[77]]))
    assert int(bag.steps) == steps


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([None, 0.5, 3.0]),
    decay_every=st.integers(1, 7),
    budget=st.integers(300, 3000),
)
def test_rows_have_one_owner_whatever_happens(seed, threshold, decay_every, budget):
    generator = torch.Generator().manual_seed(seed)
    bag = CAFEEmbeddingBag(
        60, 2, memory_budget=budget, threshold=threshold, decay=0.7, decay_every=decay_every
    )
    for _ in range(25):
        ids = torch.randint(0, 60, (8, 2), generator=generator)
        (bag(ids) * torch.randn(8, 2, generator=generator)).sum().backward()
        before = owners(bag)
        rows = bag.step().tolist()
        after = owners(bag)
        assert {r for r in after if after[r] != before.get(r)} <= set(rows)
        physical = bag.physical(torch.arange(60))
        own = physical < bag.hot_rows
        assert len(physical[own].unique()) == int(own.sum()), "no two ids share a row of their own"
        assert {int(physical[i]): i for i in own.nonzero().flatten().tolist()} == after
        assert bag.memory_report().total_bytes <= budget


def test_auto_threshold_uses_all_rows():
    generator = torch.Generator().manual_seed(1)
    bag = make(rows=2000, decay_every=50)
    for _ in range(50):
        bag(torch.randint(0, 2000, (256, 1), generator=generator)).sum().backward()
        bag.step()
    assert int(bag.free_top) == 0


def test_non_finite_gradients_are_counted_and_left_out():
    bag = make(threshold=0.5)
    factor = torch.tensor([[float("nan")], [1.0], [float("inf")]])
    (bag(torch.tensor([[1], [2], [3]])) * factor).sum().backward()
    bag.step()
    assert int(bag.skipped) == 2
    assert set(owners(bag).values()) == {2}
    assert bag.sketch.scores.isfinite().all()


def test_forgotten_steps_are_told(monkeypatch):
    monkeypatch.setattr("mlkit.embeddings.baselines.cafe.MAX_PENDING", 3)
    bag = make()
    for _ in range(3):
        bag(torch.tensor([[1]])).sum().backward()
    with pytest.warns(UserWarning, match="3 backward passes of a CAFE table without a step"):
        bag(torch.tensor([[1]])).sum().backward()


def test_state_copies_resume_alike():
    generator = torch.Generator().manual_seed(2)
    bag = make(decay_every=5)
    batches = [torch.randint(0, 100, (32, 1), generator=generator) for _ in range(20)]

    def run(one, some):
        for ids in some:
            one(ids).square().sum().backward()
            one.step()
            with torch.no_grad():
                one.weight -= 0.1 * one.weight.grad
            one.weight.grad = None

    run(bag, batches[:9])
    loaded = make(decay_every=5)
    loaded.load_state_dict(bag.state_dict())
    others = [loaded, copy.deepcopy(bag), pickle.loads(pickle.dumps(bag))]
    run(bag, batches[9:])
    for other in others:
        run(other, batches[9:])
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in bag.state_dict().items())
        assert owners(other) == owners(bag)


def _rank(rank, world_size):
    bag = make(threshold=1.0)
    model = torch.nn.parallel.DistributedDataParallel(bag)
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.01)
    bag.register_optimizer(optimizer)
    for number in range(4):
        ids = torch.arange(1 + rank + number) + 100 * rank  # disjoint, and of different number
        optimizer.zero_grad()
        model(ids[:, None]).square().sum().backward()
        optimizer.step()
    for tensor in (*bag.parameters(), *bag.buffers()):
        other = tensor.detach().clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, tensor)
    return sorted(owners(bag).values())


def test_two_ranks_decide_alike():
    one, two = run_ddp(_rank, 2)
    assert one == two
    assert {i // 100 for i in one} == {0, 1}, "ids of both ranks"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"hash_share": 0.0}, "hash_share must be in"),
        ({"hash_share": 1.0}, "hash_share must be in"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"decay": 0.0}, "decay must be in"),
        ({"decay": 1.1}, "decay must be in"),
        ({"decay_every": 0}, "decay_every must be at least 1, got 0"),
        ({"rows": 1 << 31}, "less than 2\\^31"),
        ({"budget": 10}, "too small for a CAFE table of dimension 4: the minimum is 120 bytes"),
    ],
)
def test_bad_settings(more, match):
    with pytest.raises(InvalidValueError, match=match):
        make(**more)


def test_bad_optimizers():
    bag = make()
    with pytest.raises(InvalidTypeError, match="must be a torch.optim.Optimizer, got str"):
        bag.register_optimizer("adam")
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InvalidValueError, match="SGD does not train the table's weight"):
        bag.register_optimizer(other)


def test_bytes_by_hand():
    """Rows of 16 + 4 bytes; 48 of sketch and 4 of the stack for each hot one; 28 of counters."""
    bag = make(budget=8000, padding_idx=0)
    report = bag.memory_report()
    rows = bag.hot_rows + bag.hashed_rows + 1
    assert report.weight_bytes == 16 * rows
    assert report.optimizer_bytes == 4 * rows
    assert report.allocator_bytes == 4 * bag.hot_rows
    assert report.other_bytes == 48 * bag.hot_rows + 28
    assert 7900 < report.total_bytes <= 8000
    assert report.dense_bytes == 500 * 20
