"""What holds after any sequence of steps, rounds, resizes and loads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from mlkit.embeddings.fiited.allocator import SlotStack
from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.embeddings.fiited.placement import Placement
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.embeddings.fiited.tables import TableSpec
from mlkit.errors import InvalidValueError
from mlkit_kernels.dynamic_embedding import HeaderLayout
from tests.embeddings.fiited.oracle import itep_rounds

QUICK = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def check_storage(store: DynamicEmbeddingStore) -> None:
    """Chunks and used slots are one to one; free and used slots are all slots, each once."""
    slots = store.placement.slots(torch.arange(store.tables.num_rows))
    used = slots[slots >= 0]
    assert len(torch.unique(used)) == len(used) == store.num_resident
    assert not len(used) or int(used.max()) < len(store.pool) == store.plan.num_slots
    check_allocator(store.placement, slots)
    assert store.num_resident <= store.target
    report = store.memory_report()
    assert report.total_bytes <= store.plan.total_bytes
    for padding in store.tables.padding_rows:
        assert bool((slots[padding] < 0).all())
    if store.config.prefix:
        resident = slots >= 0
        assert bool((resident[:, 1:] <= resident[:, :-1]).all())


def check_allocator(placement: Placement, slots: Tensor) -> None:
    allocator, used = placement._allocator, slots[slots >= 0]
    if isinstance(allocator, SlotStack):
        free = allocator._stack[: allocator.num_free].long()
        assert sorted([*free.tolist(), *used.tolist()]) == list(range(len(allocator._stack)))
        return
    page_slots, per_row = allocator.page_slots, slots.shape[1]
    pages = allocator._pages[: allocator.num_free_pages].long()
    holders: dict[int, set[int]] = {int(p): {0} for p in pages}
    held = [p * page_slots + i for p in pages.tolist() for i in range(page_slots)]
    for size in range(1, per_row + 1):
        units = allocator.free_units(size)
        rows = slots[(slots >= 0).sum(1) == size]
        bases = rows.amax(1) - size + 1 if len(rows) else units[:0]
        for base in [*units.tolist(), *bases.tolist()]:
            assert base % page_slots % size == 0
            holders.setdefault(base // page_slots, set()).add(size)
            held += range(base, base + size)
    assert sorted(held) == list(range(len(allocator.page_class) * page_slots))
    for page, classes in holders.items():
        assert classes == {int(allocator.page_class[page])}


def train(store: DynamicEmbeddingStore, rng: np.random.Generator, hot: int, size: int) -> None:
    """One step whose ids crowd around `hot`."""
    root = store.anchor if store.config.optimizer else store.pool
    root.grad = None
    loss = torch.zeros(())
    for table, spec in enumerate(store.tables.specs):
        ids = (hot + np.minimum(rng.zipf(1.3, size), 1 << 20)) % spec.num_embeddings
        out = lookup(store, torch.tensor(ids), tables=[table])
        grad = rng.normal(size=out.shape) * np.exp(rng.normal(size=(1, out.shape[1])))
        loss = loss + (out * torch.tensor(grad, dtype=torch.float32)).sum()
    loss.backward()
    store.step()


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> FIITEDConfig:
    values: dict[str, Any] = {
        "num_chunks": draw(st.integers(1, 8)),
        "layout": draw(st.sampled_from(["slab", "slab", "chunk"])),
        "prefix": draw(st.booleans()),
        "hysteresis": draw(st.sampled_from([0.0, 0.05, 0.5])),
        "trigger": draw(st.sampled_from([0.0, 0.05])),
        "optimizer": draw(st.sampled_from(["sgd", "rowwise_adagrad", "adagrad", "adam"])),
        "utility": draw(st.sampled_from(["freq_grad", "freq", "grad", "l2"])),
        "utility_dtype": draw(st.sampled_from(["float32", "uint8"])),
        "utility_every": draw(st.sampled_from([1, 1, 3])),
        "normalize": draw(st.sampled_from(["p95", "none", "per_table"])),
        "admission": draw(st.sampled_from(["zeros", "init"])),
        "schedule": "fixed",
        "prune_every": draw(st.integers(1, 3)),
        "decay": draw(st.sampled_from([1.0, 0.9, 0.3, 1e-6])),
        "eps": 1e-3,
    }
    values["target_density"] = draw(st.sampled_from([0.06, 0.1, 0.3, 0.7, 1.0]))
    return FIITEDConfig(**{**values, **fixed})


SPECS = [TableSpec("a", 29), TableSpec("b", 5, padding_idx=2), TableSpec("c", 17, padding_idx=0)]


class StoreMachine(RuleBasedStateMachine):
    """Steps, rounds, resizes, checkpoints, compactions, in any order."""

    @initialize(config=configs(), seed=st.integers(0, 2**16))
    def start(self, config: FIITEDConfig, seed: int) -> None:
        self.store = DynamicEmbeddingStore(SPECS, 2 * config.num_chunks, config)
        self.rng = np.random.default_rng(seed)

    @rule(hot=st.integers(0, 40), size=st.integers(1, 30), steps=st.integers(1, 4))
    def train(self, hot: int, size: int, steps: int) -> None:
        for _ in range(steps):
            train(self.store, self.rng, hot, size)

    @rule()
    def prune(self) -> None:
        self.store.prune_now(force=True)

    @rule(share=st.floats(0.01, 1))
    def resize(self, share: float) -> None:
        chunks = max(len(SPECS), round(share * self.store._most))
        self.store.resize(chunks)
        assert self.store.target == chunks

    @rule()
    def compact(self) -> None:
        with Unchanged(self.store):
            self.store.placement.compact()

    @rule()
    def read_anew(self) -> None:
        """Free lists that are made from the header serve as well as those that grew."""
        with Unchanged(self.store):
            self.store._placement = None

    @rule(share=st.floats(0.02, 1))
    def load_at_another_budget(self, share: float) -> None:
        old = self.store
        config = copy.copy(old.config)
        object.__setattr__(config, "target_density", share)
        try:
            new = DynamicEmbeddingStore(SPECS, old.embedding_dim, config)
        except InvalidValueError:
            assert share * old.num_chunks < len(SPECS), "a chunk of each table is the least"
            return
        own = new.target
        new.load_state_dict(old.state_dict())
        assert (new.target, new.steps) == (own, old.steps)
        rows = torch.arange(old.tables.num_rows)
        was, now = old.placement.slots(rows) >= 0, new.placement.slots(rows) >= 0
        assert bool((now <= was).all())
        assert now.sum() == min(own, was.sum()) or old.config.normalize == "per_table"
        kept = now.repeat_interleave(2, 1)
        assert torch.equal(new.read(rows), torch.where(kept, old.read(rows), 0))
        self.store = new

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "store"):
            check_storage(self.store)


class Unchanged:
    """Values, states and utilities of all chunks are what they were, wherever they are."""

    def __init__(self, store: DynamicEmbeddingStore) -> None:
        self.store = store

    def content(self) -> list[Tensor]:
        store = self.store
        slots = store.placement.slots(torch.arange(store.tables.num_rows))
        resident = slots >= 0
        return [
            resident,
            *(c[slots[resident]].clone() for c in store.columns()),
            store.utilities(slice(0, store.tables.num_rows)).clone(),
        ]

    def __enter__(self) -> None:
        self.before = self.content()

    def __exit__(self, *_: object) -> None:
        for a, b in zip(self.before, self.content(), strict=True):
            assert torch.equal(a, b)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(QUICK, max_examples=15, stateful_step_count=8)


@QUICK
@given(data=st.data(), seed=st.integers(0, 999))
def test_both_layouts_decide_alike_to_the_bit(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs(layout="slab"))
    other = copy.copy(config)
    object.__setattr__(other, "layout", "chunk")
    stores = [DynamicEmbeddingStore(SPECS, 2 * c.num_chunks, c) for c in (config, other)]
    for store in stores:
        rng = np.random.default_rng(seed)
        for step in range(10):
            train(store, rng, 7 * (step // 4), 12)
            if step == 5:
                store.resize(max(len(SPECS), store.target * 2 // 3))
    a, b = stores
    rows, every = torch.arange(a.tables.num_rows), slice(0, a.tables.num_rows)
    assert torch.equal(a.resident(every), b.resident(every))
    assert torch.equal(a.read(rows), b.read(rows))
    assert torch.equal(a.utilities(every), b.utilities(every))
    assert a.rounds == b.rounds
    where = [s.placement.slots(rows) for s in stores]
    for x, y in zip(a.states, b.states, strict=True):
        assert torch.equal(x[where[0][where[0] >= 0]], y[where[1][where[1] >= 0]])


class PlacementMachine(RuleBasedStateMachine):
    """Masks at random in a slab pool that is as tight as the plan allows."""

    @initialize(per_row=st.integers(1, 8), rows=st.integers(1, 60), share=st.floats(0.02, 1))
    def start(self, per_row: int, rows: int, share: float) -> None:
        self.most = max(1, int(share * rows * per_row))
        self.plan_of(per_row, rows)
        layout = HeaderLayout(1, 0, 0, 4)
        self.header = torch.zeros(rows, layout.words(per_row), dtype=torch.int32)
        self.pool = torch.zeros(self.plan.num_slots, 2)
        self.state = torch.zeros(self.plan.num_slots)  # as a chunk's count of steps: one number
        self.placement = Placement(
            self.header,
            layout,
            per_row,
            self.plan.num_slots,
            self.plan.page_slots,
            lambda: [self.pool, self.state],
        )
        self.wanted = np.zeros((rows, per_row), bool)
        self.value = np.zeros((rows, per_row))
        self.next = 1.0

    def plan_of(self, per_row: int, rows: int) -> None:
        from mlkit.embeddings.fiited.budget import plan

        config = FIITEDConfig(target_density=1.0, num_chunks=per_row)
        self.plan = plan(config, rows, per_row, chunks=self.most)

    @rule(seed=st.integers(0, 2**16), share=st.floats(0, 1), kind=st.integers(0, 3))
    def set_masks(self, seed: int, share: float, kind: int) -> None:
        rng = np.random.default_rng(seed)
        rows, per_row = self.wanted.shape
        chosen = np.flatnonzero(rng.random(rows) < share)
        rng.shuffle(chosen)
        masks = rng.random((len(chosen), per_row)) < rng.random()
        if kind == 1:  # one size for all
            masks = np.arange(per_row) < rng.integers(0, per_row + 1)
            masks = np.broadcast_to(masks, (len(chosen), per_row)).copy()
        wanted = self.wanted.copy()
        wanted[chosen] = masks
        excess = wanted.sum() - self.most
        for row in chosen:  # what a round never asks for: more chunks than there may be
            for k in range(per_row):
                if excess > 0 and wanted[row, k]:
                    wanted[row, k] = False
                    excess -= 1
        if excess > 0:
            return
        bits = (wanted[chosen] << np.arange(per_row)).sum(1)
        self.placement.set_masks(torch.tensor(chosen), torch.tensor(bits))
        self.value[~wanted] = 0
        self.value[wanted & ~self.wanted] = 0
        self.wanted = wanted
        self.check()
        # new numbers, so that a chunk that is moved wrongly shows
        slots = self.placement.slots(torch.arange(rows)).numpy()
        numbers = self.next + np.arange(wanted.sum())
        self.next += wanted.sum()
        self.value[wanted] = numbers
        at = torch.tensor(slots[wanted])
        self.pool[at, 1] = self.state[at] = torch.tensor(numbers, dtype=torch.float32)

    @rule()
    def compact(self) -> None:
        self.placement.compact()
        for size in range(1, self.wanted.shape[1] + 1):
            free = self.placement._allocator.free_units(size)
            assert len(free) * size < self.plan.page_slots

    @rule()
    def tidy(self) -> None:
        self.placement.tidy(self.plan.most_free_units)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "placement"):
            self.check()

    def check(self) -> None:
        slots = self.placement.slots(torch.arange(len(self.wanted)))
        np.testing.assert_array_equal((slots >= 0).numpy(), self.wanted)
        assert self.placement.num_resident == self.wanted.sum()
        at = slots[slots >= 0]
        np.testing.assert_array_equal(self.pool[at, 1].numpy(), self.value[self.wanted])
        np.testing.assert_array_equal(self.state[at].numpy(), self.value[self.wanted])
        check_allocator(self.placement, slots)


TestPlacement = PlacementMachine.TestCase
TestPlacement.settings = settings(QUICK, max_examples=30, stateful_step_count=10)


@pytest.mark.parametrize("per_row", [1, 3, 4, 5, 7, 8])
def test_churn_in_a_tight_slab_pool_never_runs_out_of_pages(per_row: int) -> None:
    """The pool has as few pages as the plan grants, and every step turns sizes over."""
    rows = 40
    for most in (1, per_row + 1, rows * per_row // 3):
        machine = PlacementMachine()
        machine.start(per_row, rows, most / (rows * per_row))
        for seed in range(30):
            machine.set_masks(seed, 0.8 if seed % 3 else 1.0, seed % 2)


def test_regrowth_after_a_change_of_the_stream() -> None:
    """The new hot set is resident within two rounds, and outputs do not jump when it comes."""
    config = FIITEDConfig(
        target_density=0.25,
        optimizer="adagrad",
        lr=0.1,
        eps=1e-3,
        schedule="fixed",
        prune_every=10,
        decay=0.1,
        trigger=0.0,
        normalize="none",
    )
    store = DynamicEmbeddingStore([TableSpec("t", 80)], 16, config)
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(80)

    def step(low: int) -> None:
        ids = torch.randint(low, low + 20, (60,), generator=generator)
        out = lookup(store, ids, tables=[0])
        (out * torch.randn(out.shape, generator=generator)).sum().backward()

    for _ in range(40):
        step(0)
        store.step()
    assert store.resident(slice(0, 20)).all()
    assert store.num_resident == store.target
    for _ in range(20):
        step(40)
        before, was = store.read(every), store.resident(slice(0, 80))
        store.step()
        now = store.resident(slice(0, 80))
        came, stays = (m.repeat_interleave(4, 1) for m in (~was & now, was == now))
        assert bool((store.read(every)[came] == 0).all())
        assert torch.equal(before[stays], store.read(every)[stays])
    assert store.resident(slice(40, 60)).float().mean() > 0.95


@QUICK
@given(
    seed=st.integers(0, 999),
    per_row=st.integers(1, 8),
    prefix=st.booleans(),
    h=st.sampled_from([0.0, 0.2]),
)
def test_a_round_selects_what_topk_selects(seed: int, per_row: int, prefix: bool, h: float) -> None:
    config = FIITEDConfig(
        target_density=0.3,
        num_chunks=per_row,
        hysteresis=h,
        normalize="none",
        prefix=prefix,
        optimizer="sgd",
    )
    store = DynamicEmbeddingStore(SPECS, per_row, config)
    rows, every = torch.arange(store.tables.num_rows), slice(0, store.tables.num_rows)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        utility = torch.rand(len(rows), per_row, generator=generator).exp()
        utility[store.tables.padding_rows] = 0
        store.put_utilities(rows, utility)
        held = store.resident(every).flatten()
        store.prune_now(force=True)
        score = (utility.cummin(1).values if prefix else utility).flatten()
        best = torch.topk(score, store.target)
        now = store.resident(every).flatten()
        if h == 0:
            chosen = torch.zeros_like(now)
            chosen[best.indices] = True
            # prefix gives chunks of a row equal scores: of those, any may be the last
            tau = best.values[-1]
            assert torch.equal(now & (score > tau), chosen & (score > tau))
            assert now.sum() == store.target
            assert not bool((now & (score < tau)).any())
        else:
            tau = best.values[-1]
            assert not bool((held & ~now & (score >= tau)).any())
            assert not bool((~held & now & (score < tau * (1 + h) * (1 - 1e-6))).any())
        if prefix:
            assert bool((now.view(-1, per_row)[:, 1:] <= now.view(-1, per_row)[:, :-1]).all())


@pytest.mark.parametrize("every", [1, 2, 29, 30, 77, 300, 1000, 1001])
def test_geometric_rounds_are_those_of_itep(every: int) -> None:
    config = FIITEDConfig(target_density=0.5, prune_every=every)
    assert [n for n in range(1, 5001) if config.is_round(n)] == itep_rounds(5000, every)


def test_itep_rounds_by_hand() -> None:
    config = FIITEDConfig(target_density=0.5, prune_every=1001)
    expected = [3, 6, 9, 30, 60, 90, 300, 600, 900, 1001, 2002, 3003]
    assert [n for n in range(1, 3500) if config.is_round(n)] == expected


@pytest.mark.parametrize("decay", [1e-3, 1e-10, 1e-30])
@pytest.mark.parametrize("utility_dtype", ["float32", "uint8"])
def test_a_steep_decay_leaves_finite_utilities(decay: float, utility_dtype: Any) -> None:
    config = FIITEDConfig(
        target_density=0.3,
        optimizer="sgd",
        decay=decay,
        prune_every=4,
        schedule="fixed",
        utility_dtype=utility_dtype,
    )
    store = DynamicEmbeddingStore(SPECS, 8, config)
    rng = np.random.default_rng(0)
    for _ in range(20):
        train(store, rng, 0, 20)
        found = store.utilities(slice(0, store.tables.num_rows))
        assert bool(found.isfinite().all())
        assert bool((found > 0).any())
    check_storage(store)
    assert len(store.rounds) > 0


def test_a_ramp_goes_on_where_a_checkpoint_left_it() -> None:
    config = FIITEDConfig(
        target_density=0.2,
        ramp=(2, 10),
        ramp_from=0.9,
        optimizer="adagrad",
        schedule="fixed",
        prune_every=4,
        trigger=0.0,
        eps=1e-3,
    )
    for stop in (6, 14):  # within the ramp, and after it
        whole, first, second = (DynamicEmbeddingStore(SPECS, 8, config) for _ in range(3))
        rngs = [np.random.default_rng(1) for _ in range(2)]
        for _ in range(22):
            train(whole, rngs[0], 0, 9)
        for _ in range(stop):
            train(first, rngs[1], 0, 9)
        second.load_state_dict(first.state_dict())
        assert second.target == first.target
        for _ in range(22 - stop):
            train(second, rngs[1], 0, 9)
        rows = torch.arange(whole.tables.num_rows)
        assert torch.equal(whole.read(rows), second.read(rows))
        assert second.plan == whole.plan
        check_storage(second)


def test_residents_that_earned_nothing_make_room() -> None:
    """A table that begins full: as many chunks as were read since then fit, and they get in."""
    config = FIITEDConfig(target_density=1.0, optimizer="sgd", trigger=0.0, prune_every=3)
    store = DynamicEmbeddingStore([TableSpec("t", 40)], 8, config)
    store.resize(80)
    lost = ~store.resident(slice(0, 40)).any(1)
    assert int(lost.sum()) == 20
    ids = lost.nonzero().squeeze(1)[:7]
    for _ in range(3):
        lookup(store, ids, tables=[0]).sum().backward()
        store.step()
    assert bool(store.resident(slice(0, 40))[ids].all())
    assert store.num_resident == 80


def test_shares_of_tables_are_exact() -> None:
    """29 % of 100 is 29, though 0.29 * 100 in floating point is less."""
    config = FIITEDConfig(
        target_density=0.29, optimizer="sgd", normalize="per_table", num_chunks=1, hysteresis=0.0
    )
    store = DynamicEmbeddingStore([TableSpec("a", 100), TableSpec("b", 100)], 2, config)
    store.put_utilities(torch.arange(200), torch.arange(1.0, 201).unsqueeze(1))
    store.prune_now(force=True)
    counts = [int(store.resident(store.tables.rows_of(t)).sum()) for t in range(2)]
    assert counts == [29, 29]
