"""Id maps against Python dicts and integers: hashing, exact tables of keys, unknown ids."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, TableSpec
from mlkit.embeddings.fiited.ids import ExactIds, hash_rows, table_of
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.embeddings.fiited.tables import Tables
from mlkit.embeddings.fiited.unseen import evict_ids

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def make_store(rows=(20,), *, padding=None, id_map="exact", density=1.0, **settings):
    specs = [TableSpec(f"t{n}", r, padding) for n, r in enumerate(rows)]
    settings = {"optimizer": "sgd", "lr": 1.0, "num_chunks": 2, "prune_every": 100} | settings
    settings.setdefault("schedule", "fixed")
    config = FIITEDConfig(target_density=density, id_map=id_map, **settings)
    return DynamicEmbeddingStore(specs, 4, config)


def train(store, ids, table=0):
    lookup(store, torch.tensor(ids), tables=[table]).sum().backward()
    return store.step()


def splitmix(number, seed):
    """`mix` in Python's integers."""
    mask = (1 << 64) - 1

    def one(z):
        z = z + 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    return one(number & mask ^ one(seed)) & mask >> 1


@settings(max_examples=30)
@given(st.lists(INT64, min_size=1, max_size=20), st.integers(2, 1000), st.integers(0, 9))
def test_hashed_rows_are_the_mix_modulo_the_rows(ids, rows, seed):
    tables = Tables([TableSpec("a", rows)])
    found = hash_rows(tables, torch.tensor(ids), 0, seed)
    assert found.tolist() == [splitmix(i, seed) % rows for i in ids]


def test_hashing_leaves_the_row_of_the_padding_alone():
    tables = Tables([TableSpec("a", 5, padding_idx=2), TableSpec("b", 7)])
    ids = torch.arange(-500, 500)
    rows = hash_rows(tables, ids, 0, 0)
    assert ids[rows == 2].tolist() == [2]
    assert set(rows.tolist()) == {0, 1, 2, 3, 4}
    both = hash_rows(tables, ids.repeat(2), torch.arange(2).repeat_interleave(1000), 0)
    assert torch.equal(both[:1000], rows)
    assert torch.equal(both[1000:], hash_rows(tables, ids, 1, 0))


def test_hash_spreads_consecutive_ids():
    rows = hash_rows(Tables([TableSpec("a", 100)]), torch.arange(100_000), 0, 3)
    counts = torch.bincount(rows, minlength=100).double()
    chi2 = ((counts - 1000).square() / 1000).sum()
    assert 50 < chi2 < 160  # 99 degrees of freedom: both tails are below 1e-4


@pytest.mark.parametrize("offsets", [None, [0, 1, 3, 3, 4, 6, 6]])
def test_table_of_each_id(offsets):
    given = None if offsets is None else torch.tensor(offsets)
    found = table_of(6, 2, given, torch.device("cpu"))
    assert found.tolist() == ([0, 0, 0, 1, 1, 1])
    assert len(table_of(0, 2, torch.tensor([0]), torch.device("cpu"))) == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_exact_ids_behave_like_a_dict(data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    tables = Tables([TableSpec(str(n), s) for n, s in enumerate(sizes)], spare=True)
    exact = ExactIds(tables, torch.zeros(tables.num_rows, dtype=torch.int64), seed=0)
    small = st.integers(-30, 30) | INT64.filter(lambda i: i + (1 << 63) > 1)
    known = {}
    for _ in range(4):
        pairs = data.draw(
            st.lists(st.tuples(st.integers(0, len(sizes) - 1), small), max_size=30, unique=True)
        )
        new = sorted(p for p in pairs if p not in known)
        number, ids = torch.tensor(new, dtype=torch.int64).view(-1, 2).unbind(1)
        rows, dropped = exact.insert(ids, number)
        inserted = [p for p, d in zip(new, dropped.tolist(), strict=True) if not d]
        known |= dict(zip(inserted, rows.tolist(), strict=True))
        # No id is turned away while its table has a row.
        for table, size in enumerate(sizes):
            held = sum(t == table for t, _ in known)
            assert held <= size
            turned = any(t == table for (t, _), d in zip(new, dropped.tolist(), strict=True) if d)
            assert not turned or held == size
        assert len(set(known.values())) == len(known)
        asked = [*known, *pairs]
        number, ids = torch.tensor(asked, dtype=torch.int64).view(-1, 2).unbind(1)
        found = exact.find(ids, number).tolist()
        for (table, _), pair, row in zip(asked, asked, found, strict=True):
            assert row == known.get(pair, tables.first[table] + sizes[table]) - tables.first[table]
        gone = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if known else []
        exact.remove(torch.tensor([known.pop(p) for p in gone], dtype=torch.int64))


def test_a_large_table_fills_to_nineteen_twentieths():
    tables = Tables([TableSpec("a", 20_000)], spare=True)
    exact = ExactIds(tables, torch.zeros(tables.num_rows, dtype=torch.int64), seed=1)
    ids = torch.arange(0, 19_000 * 7, 7)
    rows, dropped = exact.insert(ids, torch.zeros_like(ids))
    assert dropped.sum() <= 20  # 0.95^128 = 0.14 % of the last ones
    assert torch.equal(exact.find(ids[~dropped], 0), rows)
    assert (exact.find(ids + 1, 0) == 20_000).all()


def test_unknown_ids_read_as_zeros_and_get_rows_after_the_step():
    store = make_store()
    ids = [-7, 1 << 60, 5, 5]
    out = lookup(store, torch.tensor(ids), tables=[0])
    assert not out.any()
    keys = store.keys.clone()
    out.sum().backward()
    assert torch.equal(store.keys, keys)  # nothing happens before the step
    store.step()
    rows = store.exact_ids.find(torch.tensor(ids), 0)
    assert (rows < 20).all()
    assert len(rows.unique()) == 3
    assert torch.equal(lookup(store, torch.tensor(ids), tables=[0]), store.read(rows))
    assert store.read(rows).any(1).all()


def test_new_ids_get_storage_where_there_is_some():
    store = make_store(density=0.5)
    train(store, [3, -3])
    rows = store.exact_ids.find(torch.tensor([3, -3]), 0)
    assert store.resident(slice(0, 20))[rows].all()
    assert store.num_resident == 4
    assert not store.read(torch.tensor(store.tables.spare_rows)).any()


def test_evaluation_learns_no_ids():
    store = make_store()
    store.eval()
    lookup(store, torch.tensor([3]), tables=[0])
    store.train()
    with torch.no_grad():
        lookup(store, torch.tensor([3]), tables=[0])
    store.step()
    assert store.exact_ids.find(torch.tensor([3]), 0).tolist() == [20]


def test_spare_rows_earn_nothing_and_count_in_a_mean():
    store = make_store((4, 3), density=1.0, optimizer="rowwise_adagrad")
    train(store, [10, 11], table=1)
    before = lookup(store, torch.tensor([10]), tables=[1]).detach()
    offsets = torch.tensor([0, 2])
    out = lookup(store, torch.tensor([10, 99]), offsets, tables=[1], mode="mean")
    assert torch.equal(out, before / 2)
    out.sum().backward()
    for row in store.tables.spare_rows:
        assert not store.utilities(slice(row, row + 1)).any()
        assert store.layout.state(store.header, 2)[row] == 0


@pytest.mark.parametrize("id_map", ["hash", "exact"])
def test_all_tables_at_once_equal_one_at_a_time(id_map):
    one, all_ = (make_store((20, 30), id_map=id_map, padding=1) for _ in range(2))
    ids = torch.tensor([5, -9, 1, 5, 1 << 40, 7])
    offsets = torch.tensor([0, 2, 3, 3, 6])
    for _ in range(3):
        parts = [
            lookup(one, ids[:3], offsets[:3], tables=[0]),
            lookup(one, ids[3:], offsets[2:] - 3, tables=[1]),
        ]
        whole = lookup(all_, ids, offsets)
        assert torch.equal(whole, torch.cat(parts, 1))
        sum(p.sum() for p in parts).backward()
        whole.sum().backward()
        one.step()
        all_.step()
    assert torch.equal(one.header, all_.header)
    assert whole.any()


def test_padding_is_an_id_for_the_user():
    store = make_store((6,), padding=4)
    train(store, [4, 100])
    assert store.exact_ids.find(torch.tensor([4]), 0).tolist() == [4]
    assert not lookup(store, torch.tensor([4]), tables=[0]).any()
    offsets = torch.tensor([0, 2])
    mean = lookup(store, torch.tensor([4, 100]), offsets, tables=[0], mode="mean")
    assert torch.equal(mean, lookup(store, torch.tensor([100]), tables=[0]))
    train(store, list(range(50, 60)))
    assert len({int(r) for r in store.exact_ids.find(torch.arange(50, 60), 0)} - {4, 6}) == 4


def test_full_table_drops_new_ids_and_says_so_once(caplog):
    store = make_store((3,))
    with caplog.at_level(logging.WARNING):
        train(store, [1, 2, 3, 4, 5])
        assert store.num_dropped == 2
        known = set((store.keys[store.keys != 0] ^ -(1 << 63)).tolist())
        lost = min({1, 2, 3, 4, 5} - known)
        train(store, [lost, lost, min(known)])
    assert store.num_dropped == 3
    assert [r.getMessage() for r in caplog.records if "num_dropped" in r.getMessage()] == [
        "table t0 (3 rows) has no row for a new id: such ids read as zeros and are counted in "
        "num_dropped; more rows, or id_map='hash', would hold them"
    ]


def test_round_makes_place_for_ids_that_were_turned_away():
    store = make_store((10,), density=0.2, prune_every=3, trigger=0.0, decay=0.5)
    train(store, list(range(10)))
    resident = store.resident(slice(0, 10)).any(1)
    hot = [i for i in range(10) if resident[store.exact_ids.find(torch.tensor([i]), 0)]]
    train(store, [*hot, 77])
    assert store.num_dropped == 1
    train(store, [*hot, 9])  # a round follows; id 9 is not among the least used
    known = store.exact_ids.find(torch.arange(10), 0) < 10
    assert int(known.sum()) == 9
    assert known[hot].all()
    assert known[9]
    gone = int((~known).nonzero())
    train(store, [77])
    row = store.exact_ids.find(torch.tensor([77]), 0)
    assert int(row) < 10
    assert store.exact_ids.find(torch.tensor([gone]), 0).tolist() == [10]


def test_ids_with_a_chunk_never_leave():
    store = make_store((10,), density=0.2)
    train(store, list(range(10)))
    resident = store.resident(slice(0, 10)).any(1)
    store.forget(resident.nonzero().squeeze(1))
    store.dropped[0] = 5
    assert evict_ids(store) == 1  # at most a tenth of the table
    assert store.exact_ids.is_used(slice(0, 10))[resident].all()
    assert int((store.exact_ids.find(torch.arange(10), 0) < 10).sum()) == 9
    assert not store.dropped.any()


def test_keys_are_counted_and_saved():
    store = make_store((50,), density=0.5)
    train(store, [3, 9, -4])
    assert store.memory_report().other_bytes == 8 * 51
    other = make_store((50,), density=0.5)
    other.load_state_dict(store.state_dict())
    ids = torch.tensor([-4, 3, 9, 8])
    assert torch.equal(lookup(other, ids, tables=[0]), lookup(store, ids, tables=[0]))


@pytest.mark.parametrize("id_map", ["identity", "hash", "exact"])
def test_lookup_compiles_into_one_graph(id_map):
    store = make_store(id_map=id_map)
    train(store, [1, 2, 3])
    ids = torch.tensor([3, 1, 1])

    def double(ids):
        return 2 * lookup(store, ids, tables=[0])

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), double(ids))
    assert compiled(ids).any()
    compiled(torch.tensor([3, 19, 0])).sum().backward()
    store.step()
    if id_map == "exact":
        assert int(store.exact_ids.find(torch.tensor([19]), 0)) < 20


@pytest.mark.parametrize("id_map", ["identity", "hash", "exact"])
def test_no_ids_at_all(id_map):
    store = make_store((5, 6), id_map=id_map)
    none = torch.zeros(0, dtype=torch.int64)
    assert lookup(store, none, tables=[1]).shape == (0, 4)
    out = lookup(store, none, torch.zeros(7, dtype=torch.int64))
    assert out.shape == (3, 8)
    assert not out.any()
    out.sum().backward()
    store.step()
    assert not store.utilities(slice(0, 11)).any()
