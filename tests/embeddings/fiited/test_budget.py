"""Bytes: what is planned, what is held, and what was allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mlkit
from mlkit.embeddings import DynamicEmbeddingBag
from mlkit.embeddings.fiited.budget import plan
from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.embeddings.fiited.tables import TableSpec
from mlkit.errors import InvalidTypeError, InvalidValueError

QUICK = settings(deadline=None, max_examples=20, derandomize=True)
SPECS = [TableSpec("a", 61), TableSpec("b", 24, padding_idx=2)]
OPTIMIZERS = [None, "sgd", "rowwise_adagrad", "adagrad", "adam"]
STATE_WORDS = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 2}


def held_bytes(store: DynamicEmbeddingStore) -> int:
    """Bytes of every tensor that hangs on the store, but for the anchor; counted by storage."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    held = {**dict(store.named_parameters()), **dict(store.named_buffers())}
    held.pop("anchor", None)
    visit([held, vars(store.placement._allocator)])
    return sum(seen.values())


def train(store: DynamicEmbeddingStore, steps: int, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        store.pool.grad = None
        loss = torch.zeros(())
        for table, spec in enumerate(store.tables.specs):
            ids = torch.tensor(rng.integers(0, spec.num_embeddings, 20))
            out = lookup(store, ids, tables=(table,))
            loss = (
                loss + (out * torch.tensor(rng.normal(size=out.shape), dtype=torch.float32)).sum()
            )
        loss.backward()
        store.step()


def by_hand(config: FIITEDConfig, rows: int, dim: int, slots: int, page: int) -> int:
    """Bytes of layout, headers and states, added up once more."""
    k = config.num_chunks
    name = config.optimizer or config.unfused_optimizer
    header = 4 * (1 if config.layout == "slab" else k)
    header += 4 * k if config.utility_dtype == "float32" else 4 * math.ceil(k / 4)
    chunk = dim // k * 4 * (1 + STATE_WORDS[name])
    if config.optimizer == "rowwise_adagrad":
        header += 4
    elif name == "rowwise_adagrad":
        chunk += 4
    if config.optimizer == "adam":
        chunk += 4
    if config.layout == "slab":
        allocator = slots // page * 5 + 4 * (slots // 64 + 9 * page)
    else:
        allocator = 4 * slots
    return rows * header + slots * chunk + allocator


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "num_chunks": draw(st.integers(1, 8)),
        "layout": draw(st.sampled_from(["slab", "chunk"])),
        "optimizer": draw(st.sampled_from(OPTIMIZERS)),
        "unfused_optimizer": draw(st.sampled_from(OPTIMIZERS[1:])),
        "utility_dtype": draw(st.sampled_from(["float32", "uint8"])),
    }


@QUICK
@given(
    fields=layouts(), width=st.integers(1, 5), rows=st.integers(1, 5000), share=st.floats(0.01, 1)
)
def test_plans_add_up(fields: dict[str, Any], width: int, rows: int, share: float) -> None:
    k = fields["num_chunks"]
    config = FIITEDConfig(target_density=1.0, **fields)
    chunks = max(1, int(share * rows * k))
    found = plan(config, rows, width * k, chunks=chunks)
    assert found.num_chunks == chunks
    page = found.page_slots
    if config.layout == "slab":
        assert all(page % c == 0 for c in range(1, k + 1))
        # rows of all sizes, packed as badly as they can be: every class leaves a page almost empty
        assert found.num_slots >= chunks + (k - 1) * (page - 1) - page
        assert found.num_slots % page == 0
    else:
        assert found.num_slots == chunks
    assert found.total_bytes == by_hand(config, rows, width * k, found.num_slots, page)
    words = STATE_WORDS[config.optimizer or config.unfused_optimizer]
    row = 4 if (config.optimizer or config.unfused_optimizer) == "rowwise_adagrad" else 0
    assert found.dense_bytes == rows * (width * k * 4 * (1 + words) + row)


@QUICK
@given(
    fields=layouts(),
    budget=st.one_of(
        st.floats(0.2, 1.0), st.integers(3000, 60000), st.integers(3, 50).map(lambda n: f"{n}KiB")
    ),
)
def test_nothing_ever_exceeds_a_byte_budget(
    fields: dict[str, Any], budget: float | int | str
) -> None:
    dim = 8 * fields["num_chunks"]
    config = FIITEDConfig(
        memory_budget=budget, **fields, schedule="fixed", prune_every=2, trigger=0.0,
        hysteresis=0.0, eps=1e-3,
    )  # fmt: skip
    least = plan(without_budget(config), 85, dim, chunks=len(SPECS))
    allowed = {float: lambda b: b * least.dense_bytes, int: lambda b: b,
               str: lambda b: int(b[:-3]) * 1024}[type(budget)](budget)  # fmt: skip
    if least.total_bytes > math.floor(allowed):
        with pytest.raises(InvalidValueError, match="give at least that"):
            DynamicEmbeddingStore(SPECS, dim, config)
        return
    store = DynamicEmbeddingStore(SPECS, dim, config)
    for part in range(2):
        train(store, 3, seed=part)
        report = store.memory_report()
        assert report.total_bytes <= store.plan.total_bytes <= allowed
        assert report.total_bytes == held_bytes(store)


def without_budget(config: FIITEDConfig) -> FIITEDConfig:
    fields = {**vars(config), "memory_budget": None, "target_density": 1.0}
    return FIITEDConfig(**fields)


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:])
def test_the_report_counts_what_is_there(layout: Any, optimizer: Any) -> None:
    config = FIITEDConfig(
        target_density=0.4,
        layout=layout,
        optimizer=optimizer,
        eps=1e-3,
        schedule="fixed",
        prune_every=2,
        trigger=0.0,
    )
    store = DynamicEmbeddingStore(SPECS, 16, config)
    train(store, 5)
    report = store.memory_report()
    assert report.total_bytes == held_bytes(store)
    assert report.weight_bytes == store.pool.untyped_storage().nbytes()
    states = sum(t.nbytes for t in store.states)
    assert report.optimizer_bytes == states + 4 * 85 * (optimizer == "rowwise_adagrad")


def test_the_state_of_a_torch_optimizer_counts() -> None:
    config = FIITEDConfig(memory_budget=0.6, unfused_optimizer="adagrad")
    store = DynamicEmbeddingStore(SPECS, 32, config)
    optimizer = torch.optim.Adagrad([store.pool])
    store.register_optimizer(optimizer)
    out = lookup(store, torch.arange(20), tables=(0,))
    out.sum().backward()
    optimizer.step()
    report = store.memory_report()
    assert report.optimizer_bytes == store.pool.nbytes
    assert report.total_bytes <= store.plan.total_bytes <= 0.6 * store.plan.dense_bytes


@pytest.mark.parametrize("fraction", [0.2, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_a_budget_is_used_up(fraction: float, layout: Any) -> None:
    """One chunk more would not fit."""
    config = FIITEDConfig(memory_budget=fraction, layout=layout, optimizer="adagrad")
    found = plan(config, 3000, 64)
    more = plan(config, 3000, 64, chunks=found.num_chunks + 1)
    assert found.total_bytes <= fraction * found.dense_bytes
    assert more.total_bytes > fraction * found.dense_bytes


def test_the_least_budget_is_named_and_works() -> None:
    config = FIITEDConfig(memory_budget=100)
    with pytest.raises(
        InvalidValueError, match=r"a chunk of each table take (\d+) bytes"
    ) as caught:
        plan(config, 85, 16)
    least = int(str(caught.value).split("each table take ")[1].split()[0])
    assert plan(FIITEDConfig(memory_budget=least), 85, 16).num_chunks >= 1
    with pytest.raises(InvalidValueError, match="give at least that"):
        plan(FIITEDConfig(memory_budget=least - 1), 85, 16)


def test_free_units_between_rounds_are_in_the_plan() -> None:
    """Many holes that a round just leaves, then new rows that open a page of another class."""
    reached = 0
    for holes in range(80, 130, 3):
        config = FIITEDConfig(
            target_density=0.15,
            optimizer="sgd",
            normalize="none",
            hysteresis=0.0,
            schedule="fixed",
            prune_every=10**6,
        )
        store = DynamicEmbeddingStore([TableSpec("t", 1000)], 4, config)
        rows, utility = torch.arange(1000), torch.zeros(1000, 4)
        utility[:600, 0] = 1
        store.put_utilities(rows, utility)
        store.prune_now(force=True)
        store.resize(1200)
        grown = torch.randperm(600, generator=torch.Generator().manual_seed(holes))[:holes]
        utility[grown, 1] = 1
        store.put_utilities(rows, utility)
        store.prune_now(force=True)
        assert store.num_resident == 600 + holes
        lookup(store, torch.tensor([900]), tables=(0,)).sum().backward()
        store.step()
        assert store.memory_report().total_bytes <= store.plan.total_bytes
        reached = max(reached, store.placement._allocator.num_free_units)
    assert reached > store.plan.most_free_units


@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_a_ramp_is_above_the_budget_only_where_it_says_so(layout: Any) -> None:
    fields: dict[str, Any] = {
        "optimizer": "sgd", "schedule": "fixed", "prune_every": 3, "layout": layout,
    }  # fmt: skip
    flat = DynamicEmbeddingStore(SPECS, 16, FIITEDConfig(memory_budget=0.75, **fields))
    ramp = DynamicEmbeddingStore(
        SPECS, 16, FIITEDConfig(memory_budget=0.75, ramp=(4, 12), ramp_from=0.9, **fields)
    )
    below = DynamicEmbeddingStore(
        SPECS, 16, FIITEDConfig(memory_budget=0.75, ramp=(4, 12), ramp_from=0.01, **fields)
    )
    allowed = 0.75 * flat.plan.dense_bytes
    targets = []
    for step in range(20):
        for store in (flat, ramp, below):
            train(store, 1, seed=step)
            assert store.memory_report().total_bytes <= store.plan.total_bytes
        assert flat.plan.total_bytes <= allowed
        assert below.plan.total_bytes <= allowed
        assert flat.target == below.target == flat.budget
        targets.append(ramp.target)
    assert targets[0] == round(0.9 * 85 * 4)
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == flat.target
    assert (
        ramp.plan.total_bytes <= allowed < plan(flat.config, 85, 16, chunks=targets[0]).total_bytes
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_budget_counts_the_bytes_of_the_weights_type(dtype: torch.dtype) -> None:
    config = FIITEDConfig(memory_budget=0.5, optimizer="sgd")
    specs = [TableSpec("a", 3000)]
    store = DynamicEmbeddingStore(specs, 64, config, dtype=dtype)
    report = store.memory_report()
    assert report.dense_weight_bytes == 3000 * 64 * dtype.itemsize
    assert 0.48 < report.byte_fraction <= 0.5
    bag = DynamicEmbeddingBag(3000, 64, target_density=0.1, optimizer="sgd", dtype=dtype)
    bag.resize(memory_budget=0.5)
    assert bag.store.target == store.target
    model = nn.Sequential(nn.EmbeddingBag(3000, 64, dtype=dtype))
    made = mlkit.convert(model, config)
    assert model[0].store.target == store.target
    assert f"{3000 * 64 * dtype.itemsize:,} -> " in str(made)


def test_stores_of_two_types_share_a_budget() -> None:
    model = nn.ModuleList([nn.Embedding(900, 32), nn.Embedding(900, 32, dtype=torch.bfloat16)])
    mlkit.convert(model, FIITEDConfig(memory_budget=0.5, optimizer="adagrad"))
    reports = [table.memory_report() for table in model]
    assert [r.dense_weight_bytes for r in reports] == [900 * 32 * 4, 900 * 32 * 2]
    assert 0.45 < (reports[0] + reports[1]).byte_fraction <= 0.5


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_a_cast_keeps_the_states_and_counts_the_new_weights(optimizer: Any) -> None:
    store = DynamicEmbeddingStore(
        SPECS, 16, FIITEDConfig(target_density=0.4, optimizer=optimizer, eps=1e-3)
    )
    train(store, 3)
    before, states = store.memory_report(), [state.clone() for state in store.states]
    store.bfloat16()
    assert store.pool.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(store.states, states, strict=True))
    after = store.memory_report()
    assert after.weight_bytes == before.weight_bytes // 2
    assert after.dense_weight_bytes == before.dense_weight_bytes // 2
    assert after.total_bytes == held_bytes(store)
    train(store, 3)
    with pytest.raises(InvalidTypeError, match="pool of a must be .*, not torch.float16"):
        store.half()


def test_a_chunk_for_each_table_is_the_least() -> None:
    specs = [TableSpec(str(n), 2) for n in range(6)]
    with pytest.raises(InvalidValueError, match=r"leaves 2 of 48 chunks to 6 tables; the least is"):
        DynamicEmbeddingStore(specs, 8, FIITEDConfig(target_density=0.05))
    store = DynamicEmbeddingStore(specs, 8, FIITEDConfig(target_density=0.125))
    assert store.target == 6
    with pytest.raises(InvalidValueError, match="the number of chunks must be in 6..48, got 5"):
        store.resize(5)
    with pytest.raises(InvalidValueError, match="a chunk of each table take"):
        DynamicEmbeddingStore(specs, 8, FIITEDConfig(memory_budget=10))
