"""Checkpoints: at the same budget, at another one, on meta; a resumed run is the same run."""

import copy
import io
import pickle

import pytest
import torch

from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, TableSpec
from mlkit.embeddings.fiited.lookup import lookup

ROWS, DIM = 60, 8


def make_store(optimizer="adagrad", density=0.4, *, device=None, dtype=None, **settings):
    settings = {
        "lr": 0.1, "schedule": "fixed", "prune_every": 4, "trigger": 0.0, "decay": 0.5,
    } | settings  # fmt: skip
    config = FIITEDConfig(target_density=density, optimizer=optimizer, **settings)
    specs = [TableSpec("user", 35, padding_idx=3), TableSpec("item", 25)]
    return DynamicEmbeddingStore(specs, DIM, config, device=device, dtype=dtype)


def batches(count):
    """Ids of both tables whose favourites change on the way, and gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(count):
        hot = 20 * (step > count // 2)
        ids = [(torch.randint(20, (12,), generator=generator) + hot) % n for n in (35, 25)]
        found.append((torch.cat(ids), torch.randn(12, 2 * DIM, generator=generator)))
    return found


def train(store, data):
    store.train()
    for ids, grad in data:
        out = lookup(store, ids)
        if store.config.optimizer is None:
            for known, _ in store._optimizers:
                known.zero_grad()
        out.backward(grad.to(out.dtype))
        if store.config.optimizer is None:
            torch.nn.utils.clip_grad_norm_([store.pool], 3.0)
            for known, _ in store._optimizers:
                known.step()
        else:
            store.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one, two):
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert one.rounds[-1] == two.rounds[-1]


VARIANTS = [
    {},
    {"layout": "chunk"},
    {"optimizer": "adam", "utility_dtype": "uint8"},
    {"optimizer": "rowwise_adagrad", "dtype": torch.bfloat16},
    {"id_map": "exact"},
    {"prefix": True, "density": 0.7, "admission": "init"},
    {"ramp": (2, 30), "ramp_from": 0.8},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("stop", [7, 12])
def test_resumed_run_is_the_same_run_bit_by_bit(variant, stop):
    whole, half, rest = (make_store(**variant) for _ in range(3))
    data = batches(24)
    train(whole, data)
    train(half, data[:stop])
    rest.load_state_dict(through_a_file(half.state_dict()))
    train(rest, data[stop:])
    assert_same(whole, rest)
    assert sum(r.evicted for r in whole.rounds) > 0


@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_unfused_run_resumes_bit_by_bit_with_its_optimizer(layout):
    def start():
        store = make_store(None, layout=layout)
        store.register_optimizer(torch.optim.Adam(store.parameters(), lr=0.1))
        return store

    whole, half, rest = start(), start(), start()
    data = batches(24)
    train(whole, data)
    train(half, data[:11])
    rest.load_state_dict(through_a_file(half.state_dict()))
    (old, _), (new, _) = half._optimizers[0], rest._optimizers[0]
    new.load_state_dict(through_a_file(old.state_dict()))
    train(rest, data[11:])
    assert_same(whole, rest)
    moments = [s._optimizers[0][0].state[s.pool]["exp_avg"] for s in (whole, rest)]
    assert torch.equal(*moments)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_goes_on_as_the_original(copied):
    store = make_store()
    data = batches(16)
    train(store, data[:9])
    other = copied(store)
    assert other.handle != store.handle
    train(store, data[9:])
    train(other, data[9:])
    assert_same(store, other)


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("density", [0.15, 0.4, 0.9])
def test_checkpoint_loads_at_another_budget(density, layout):
    store = make_store(layout=layout)
    train(store, batches(16))
    other = make_store(density=density, layout=layout)
    other.load_state_dict(store.state_dict())
    assert other.num_resident <= other.target == other.budget == other.plan.num_chunks
    assert len(other.pool) == len(other.sum) == other.plan.num_slots
    rows = torch.arange(ROWS)
    kept = other.resident(slice(0, ROWS))
    had = store.resident(slice(0, ROWS))
    assert not (kept & ~had).any()
    if density >= 0.4:
        assert torch.equal(kept, had)
    else:
        assert int(kept.sum()) == other.budget
        utilities = store.utilities(slice(0, ROWS))
        # normalize="p95" ranks within a table as the utilities do
        for table in range(2):
            part = store.tables.rows_of(table)
            stays, goes = kept[part], had[part] & ~kept[part]
            if goes.any() and stays.any():
                assert utilities[part][goes].max() <= utilities[part][stays].min()
    values, wide = (s.read(rows).view(ROWS, 4, -1) for s in (other, store))
    assert torch.equal(values[kept], wide[kept])
    slots = [s.placement.slots(rows) for s in (other, store)]
    assert torch.equal(other.sum[slots[0][kept]], store.sum[slots[1][kept]])
    train(other, batches(10))


def test_utilities_keep_their_age():
    store, other = make_store(prune_every=1000), make_store(prune_every=1000)
    train(store, batches(5))
    other.load_state_dict(store.state_dict())
    assert torch.equal(other.utilities(slice(0, ROWS)), store.utilities(slice(0, ROWS)))
    other.step()
    decayed = store.utilities(slice(0, ROWS)) * 0.5 ** (1 / 1000)
    torch.testing.assert_close(other.utilities(slice(0, ROWS)), decayed)


@pytest.mark.parametrize("density", [0.2, 0.4, 0.9])
def test_load_on_meta_by_assignment(density):
    store = make_store()
    train(store, batches(10))
    other = make_store(density=density, device="meta")
    other.load_state_dict(copy.deepcopy(store.state_dict()), assign=True)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    real = make_store(density=density)
    real.load_state_dict(store.state_dict())
    data = batches(18)[10:]
    train(other, data)
    train(real, data)
    assert_same(real, other)


def test_meta_store_becomes_real():
    store, other = make_store(density=1.0), make_store(density=1.0, device="meta")
    assert other.state_dict()["pool"].is_meta
    other.to_empty(device="cpu")
    other.reset_parameters()
    train(store, batches(9))
    train(other, batches(9))
    assert_same(store, other)


def test_following_store_takes_the_budget_of_the_checkpoint():
    store, other = make_store(), make_store()
    train(store, batches(9))
    store.retarget(0.2)
    other.follow_checkpoints = True
    other.load_state_dict(through_a_file(store.state_dict()))
    assert other.budget == other.target == store.budget
    data = batches(20)[9:]
    train(store, data)
    train(other, data)
    assert_same(store, other)


def test_checkpoint_in_a_ramp_that_is_over_keeps_the_budget():
    store = make_store(ramp=(0, 8), ramp_from=0.9)
    train(store, batches(13))
    assert store.target == store.budget
    other = make_store(ramp=(0, 8), ramp_from=0.9)
    assert other.target > other.budget
    other.load_state_dict(store.state_dict())
    assert other.target == other.budget == other.plan.num_chunks


def test_two_stores_of_a_model_load_under_their_names():
    model = torch.nn.ModuleDict({"a": make_store(), "b": make_store(density=0.6)})
    train(model["a"], batches(6))
    train(model["b"], batches(9))
    other = torch.nn.ModuleDict({"a": make_store(), "b": make_store(density=0.6)})
    other.load_state_dict(through_a_file(model.state_dict()))
    for name in model:
        assert other[name].steps == model[name].steps
        assert torch.equal(other[name].pool, model[name].pool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "chunk"}, "layout is 'slab' there and 'chunk' here"),
        ({"num_chunks": 2}, "num_chunks is 4 there and 2 here"),
        ({"optimizer": "adam"}, "optimizer is 'adagrad' there and 'adam' here"),
        ({"utility_dtype": "uint8"}, "utility_dtype is 'float32' there and 'uint8' here"),
        ({"id_map": "exact"}, "id_map is 'identity' there and 'exact' here"),
        ({"id_map": "hash", "seed": 5}, "id_map .* here; seed is 0 there and 5 here"),
    ],
    ids=str,
)
def test_checkpoint_of_another_kind_says_how_and_changes_nothing(change, message):
    other, store = make_store(), make_store(**change)
    train(other, batches(2))
    before = {name: value.clone() for name, value in store.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"\(user, item\) does not fit: {message}"):
        store.load_state_dict(other.state_dict())
    for name, value in store.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_checkpoint_of_other_tables_is_refused():
    config = FIITEDConfig(target_density=0.5)
    specs = [TableSpec("user", 35), TableSpec("item", 25)]
    state = DynamicEmbeddingStore(specs, DIM, config).state_dict()
    with pytest.raises(RuntimeError, match="rows of table 0 is 35 there and 25 here"):
        DynamicEmbeddingStore(specs[::-1], DIM, config).load_state_dict(state)
    with pytest.raises(RuntimeError, match="num_tables is 2 there and 1 here"):
        DynamicEmbeddingStore(specs[:1], DIM, config).load_state_dict(state)
    renamed = [TableSpec("visitor", 35), TableSpec("page", 25)]
    DynamicEmbeddingStore(renamed, DIM, config).load_state_dict(state)
