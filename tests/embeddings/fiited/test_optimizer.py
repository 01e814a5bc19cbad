"""The fused optimizer against torch.optim on dense embeddings; accumulation; what is refused."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from mlkit.embeddings import (
    DynamicEmbeddingStore,
    FIITEDConfig,
    FusedEmbeddingOptimizer,
    TableSpec,
    dynamic_stores,
)
from mlkit.embeddings.fiited.lookup import lookup

ROWS, DIM = 30, 8


def make_store(optimizer="sgd", density=1.0, **settings):
    settings = {"lr": 0.1, "schedule": "fixed", "prune_every": 5, "trigger": 0.0} | settings
    config = FIITEDConfig(target_density=density, optimizer=optimizer, **settings)
    return DynamicEmbeddingStore([TableSpec("item", ROWS)], DIM, config)


def dense_copy(store):
    return nn.Embedding.from_pretrained(store.read(torch.arange(ROWS)), freeze=False)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(ROWS, (7,), generator=generator), torch.randn(7, DIM, generator=generator))
        for _ in range(count)
    ]


def loss_of(output, target):
    return (output - target).square().mean()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = make_store()
        self.again = self.first
        self.second = make_store("adagrad", lr=0.5)
        self.unfused = make_store(None)
        self.linear = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
    ],
)
def test_scheduled_training_equals_torch_optim(name, reference):
    store = make_store(name)
    dense = dense_copy(store)
    ours, theirs = FusedEmbeddingOptimizer(store), reference(dense.parameters())
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (ours, theirs)]
    for ids, target in batches(7):
        for optimizer, output in ((ours, lookup(store, ids, tables=[0])), (theirs, dense(ids))):
            optimizer.zero_grad()
            loss_of(output, target).backward()
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    # Sums of gradients are taken in another order: a few roundings of float32 for each step.
    torch.testing.assert_close(store.read(torch.arange(ROWS)), dense.weight, rtol=1e-5, atol=1e-6)
    assert ours.param_groups[0]["lr"] == pytest.approx(0.0125)
    assert store.steps == 7


def test_eps_and_betas_follow_the_group():
    one, two = make_store("adam", eps=0.5, betas=(0.5, 0.7)), make_store("adam")
    FusedEmbeddingOptimizer(one)
    optimizer = FusedEmbeddingOptimizer(two, eps=0.1, betas=(0.1, 0.2))
    optimizer.param_groups[0] |= {"eps": 0.5, "betas": (0.5, 0.7)}
    for ids, target in batches(2):
        for store in (one, two):
            loss_of(lookup(store, ids, tables=[0]), target).backward()
            store.step()
    assert torch.equal(one.pool, two.pool)


def test_learning_rate_may_be_a_tensor():
    store = make_store()
    optimizer = FusedEmbeddingOptimizer(store)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    before = store.pool.clone()
    lookup(store, torch.arange(5), tables=[0]).sum().backward()
    assert torch.equal(store.pool, before)


def test_step_runs_the_closure_once_and_steps_every_store_once():
    model = Mixed()
    optimizer = FusedEmbeddingOptimizer(model)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = lookup(model.first, torch.arange(3), tables=[0]).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).requires_grad
    assert calls == [True]
    assert [model.first.steps, model.second.steps, model.unfused.steps] == [1, 1, 0]


def test_stores_of_a_model_once_each_in_order():
    model = Mixed()
    assert dynamic_stores(model) == [model.first, model.second, model.unfused]
    optimizer = FusedEmbeddingOptimizer(model)
    assert optimizer.stores == (model.first, model.second)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert [g["lr"] for g in FusedEmbeddingOptimizer(model, lr=0.3).param_groups] == [0.3, 0.3]


def test_state_goes_on_with_its_schedule():
    def start():
        store = make_store("adagrad")
        optimizer = FusedEmbeddingOptimizer(store)
        return store, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    def run(store, optimizer, schedule, data):
        for ids, target in data:
            loss_of(lookup(store, ids, tables=[0]), target).backward()
            optimizer.step()
            schedule.step()

    whole, half, rest = start(), start(), start()
    run(*whole, batches(8))
    run(*half, batches(8)[:4])
    for old, new in zip(half, rest, strict=True):
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file))
    run(*rest, batches(8)[4:])
    assert torch.equal(rest[0].pool, whole[0].pool)
    assert rest[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_drives_the_copied_store(copied):
    store = make_store()
    other = copied(FusedEmbeddingOptimizer(store, lr=0.0))
    (theirs,) = other.stores
    assert theirs is not store
    assert theirs.driver is other
    lookup(theirs, torch.arange(3), tables=[0]).sum().backward()
    other.step()
    assert torch.equal(theirs.pool, store.pool)
    assert (theirs.steps, store.steps) == (1, 0)


# ------------------------------------------------------------------ accumulation


def test_fused_accumulation_is_two_updates_and_one_step():
    store = make_store()
    dense = dense_copy(store)
    optimizer = FusedEmbeddingOptimizer(store)
    reference = torch.optim.SGD(dense.parameters(), lr=0.1)
    for ids, target in batches(2):
        loss_of(lookup(store, ids, tables=[0]), target).backward()
        reference.zero_grad()
        loss_of(dense(ids), target).backward()
        reference.step()
    optimizer.step()
    torch.testing.assert_close(store.read(torch.arange(ROWS)), dense.weight, rtol=1e-5, atol=1e-6)
    assert store.steps == 1


def test_unfused_accumulation_is_one_update_with_the_sum():
    store = make_store(None)
    dense = dense_copy(store)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (store, dense)]
    store.register_optimizer(optimizers[0])
    for ids, target in batches(2):
        loss_of(lookup(store, ids, tables=[0]), target).backward()
        loss_of(dense(ids), target).backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(store.read(torch.arange(ROWS)), dense.weight, rtol=1e-5, atol=1e-6)
    assert store.steps == 1


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", None])
def test_utilities_of_both_passes_add_up(optimizer):
    store = make_store(optimizer, num_chunks=2, decay=1.0)
    if optimizer is None:
        store.register_optimizer(torch.optim.SGD(store.parameters(), lr=0.1))
    ids, ones = torch.tensor([3, 3, 4]), torch.ones(3, DIM)
    for scale in (1.0, 2.0):
        lookup(store, ids, tables=[0]).backward(scale * ones)
    # accesses times norm of the row's gradient: 2 * |2 * 1| * sqrt(4) and twice that
    expected = torch.tensor([[8.0 + 16.0] * 2, [2.0 + 4.0] * 2])
    torch.testing.assert_close(store.utilities(slice(3, 5)), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
def test_new_row_takes_all_gradients_of_its_first_step(optimizer):
    """A row without a place yet ends as one that had its initial values all the time."""
    store, placed = (make_store(optimizer, density) for density in (0.5, 1.0))
    for ids in ([4, 9], [9, 4, 11], [9]):
        for each in (store, placed):
            grad = torch.arange(len(ids) * DIM).view(len(ids), DIM) / 10
            lookup(each, torch.tensor(ids), tables=[0]).backward(grad)
    store.step()
    placed.step()
    rows = torch.tensor([4, 9, 11])
    assert store.resident(slice(0, ROWS))[rows].all()
    torch.testing.assert_close(store.read(rows), placed.read(rows))
    if optimizer == "rowwise_adagrad":
        torch.testing.assert_close(
            *(s.layout.state(s.header, s.config.num_chunks)[rows] for s in (store, placed))
        )


def test_loss_scale_does_not_change_utilities():
    plain, scaled = make_store(None, density=0.5), make_store(None, density=0.5)
    for store, scale in ((plain, 1.0), (scaled, 1024.0)):
        store.register_optimizer(torch.optim.SGD(store.parameters(), lr=0.1))
        store.grad_scale = scale
        for ids, target in batches(2):
            (loss_of(lookup(store, ids, tables=[0]), target) * scale).backward()
    assert torch.equal(plain.header, scaled.header)
    assert torch.equal(1024 * plain.pool.grad, scaled.pool.grad)


# -------------------------------------------------------------------- registration


def test_registered_once_and_unregistered():
    store = make_store(None)
    optimizer = torch.optim.SGD(store.parameters(), lr=0.1)
    assert store.register_optimizer(optimizer)
    assert not store.register_optimizer(optimizer)
    optimizer.step()
    assert store.steps == 1
    store.unregister_optimizer(optimizer)
    optimizer.step()
    assert store.steps == 1


def test_training_without_steps_warns_once(caplog):
    def run(density, *, steps, accumulate=1):
        store = make_store(None, density=density)
        optimizer = torch.optim.SGD([store.pool], lr=0.1)
        for number in range(4):
            lookup(store, torch.arange(5)).sum().backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if steps:
                    store.step()
        return [r.getMessage()[:46] for r in caplog.records]

    with caplog.at_level(logging.WARNING):
        assert run(1.0, steps=False) == []
        assert run(0.5, steps=True) == []
        assert run(0.5, steps=True, accumulate=2) == []
        assert run(0.5, steps=False) == ["item was trained without store.step(): new row"]


def test_round_without_a_known_optimizer_warns_once(caplog):
    store = make_store(None, density=0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(15):
            store.step()
    assert [r.getMessage()[:46] for r in caplog.records] == [
        "a round ran for item, whose optimizer is not k"
    ]
    caplog.clear()
    fused = make_store(density=0.5)
    for _ in range(15):
        fused.step()
    assert not caplog.records


def test_reused_slots_have_no_stale_momentum():
    store = make_store(None, density=0.5, num_chunks=1, decay=0.01)
    optimizer = torch.optim.SGD(store.parameters(), lr=0.1, momentum=0.9)
    store.register_optimizer(optimizer)

    factor = torch.arange(1.0, 16).unsqueeze(1)

    def train(rows, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (lookup(store, rows, tables=[0]) * factor).sum().backward()
            optimizer.step()

    old, new = torch.arange(15), torch.arange(15, 30)
    train(old, 5)
    train(new, 4)
    assert not store.resident(slice(15, 30)).any()
    momentum = optimizer.state[store.pool]["momentum_buffer"]
    assert momentum[store.placement.slots(old)].all()
    store.prune_now()
    # All but the one at the threshold, which the hysteresis keeps out.
    slots = store.placement.slots(new)[1:]
    assert (slots >= 0).all()
    assert not momentum[slots].any()
    stays = store.placement.slots(old)
    assert int((stays >= 0).sum()) == 1
    assert momentum[stays[stays >= 0]].all()


# --------------------------------------------------------------------------- refused


def test_what_is_refused():
    model = Mixed()
    with pytest.raises(TypeError, match="takes a model or a store, got list"):
        FusedEmbeddingOptimizer(list(model.parameters()))
    with pytest.raises(ValueError, match="Linear has no dynamic embedding with a fused optimizer"):
        FusedEmbeddingOptimizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        FusedEmbeddingOptimizer(model, lr=-1)
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got \(1, 0\)"):
        FusedEmbeddingOptimizer(model, betas=(1, 0))
    optimizer = FusedEmbeddingOptimizer(model)
    with pytest.raises(TypeError, match="groups of a FusedEmbeddingOptimizer are the stores"):
        optimizer.add_param_group({"params": list(model.linear.parameters())})
    FusedEmbeddingOptimizer(model.first)
    with pytest.raises(RuntimeError, match="another FusedEmbeddingOptimizer .* item after this"):
        optimizer.step()
    with pytest.raises(ValueError, match="SGD does not train the pool of item"):
        model.unfused.register_optimizer(torch.optim.SGD(model.linear.parameters(), lr=1))
