"""When rounds happen, ramps, the decay's scale, one-byte utilities, infinite gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, TableSpec
from mlkit.embeddings.fiited.lookup import lookup
from mlkit_kernels.dynamic_embedding.header import decode


def make_store(rows=40, dim=8, **settings):
    settings = {
        "target_density": 0.5, "optimizer": "sgd", "lr": 0.1, "num_chunks": 2, "trigger": 0.0,
        "schedule": "fixed", "prune_every": 10,
    } | settings  # fmt: skip
    return DynamicEmbeddingStore([TableSpec("item", rows)], dim, FIITEDConfig(**settings))


def train(store, rows, factor=1.0):
    (lookup(store, torch.as_tensor(rows), tables=[0]) * factor).sum().backward()
    return store.step()


# ------------------------------------------------------------------------- schedules


def test_geometric_schedule_is_that_of_itep_and_never_more_seldom_than_fixed():
    config = FIITEDConfig(target_density=0.5, prune_every=500)
    rounds = [s for s in range(1, 2001) if config.is_round(s)]
    assert rounds == [3, 6, 9, 30, 60, 90, 300, 600, 900, 1000, 1500, 2000]
    often = FIITEDConfig(target_density=0.5, prune_every=7)
    assert [s for s in range(1, 40) if often.is_round(s)] == [3, 6, 9, 14, 21, 28, 35]


@pytest.mark.parametrize(("schedule", "steps"), [("fixed", [10, 20]), ("geometric", [3, 6, 9])])
def test_rounds_run_when_the_schedule_says(schedule, steps):
    store = make_store(schedule=schedule)
    for _ in range(20):
        train(store, [1, 2])
    found = [r.step for r in store.rounds]
    assert found[: len(steps)] == steps


def test_ramp_falls_cubically_from_its_start_to_the_budget():
    config = FIITEDConfig(target_density=0.2, ramp=(10, 100), ramp_from=0.8)
    for step, left in ((0, 1), (10, 1), (60, 0.5), (85, 0.25), (110, 0), (500, 0)):
        assert config.ramp_density(step, 0.2) == pytest.approx(0.2 + 0.6 * left**3)
    assert config.ramp_density(0, 0.9) == 0.9  # a budget above the start is no ramp


@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_ramp_shrinks_pool_and_residents_at_each_round(layout):
    store = make_store(
        target_density=0.2, ramp=(0, 50), ramp_from=0.9, layout=layout, prune_every=5
    )
    generator = torch.Generator().manual_seed(0)
    begin = len(store.pool)
    for step in range(1, 61):
        train(store, torch.randint(40, (30,), generator=generator))
        assert store.num_resident <= store.target
        last = step // 5 * 5
        expected = round((0.2 + 0.7 * max(1 - last / 50, 0) ** 3) * 80)
        assert store.target == store.plan.num_chunks == expected
        assert len(store.pool) == store.plan.num_slots
    assert store.target == store.budget == 16
    assert len(store.pool) < begin / 2


def test_ramp_to_full_density_start_has_every_chunk():
    store = make_store(target_density=0.5, ramp=(0, 50), ramp_from=1.0)
    assert store.num_resident == 80
    assert store.density == 1.0


# ----------------------------------------------------------------------------- decay


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_scale_is_folded_in_before_it_grows_too_large(dtype):
    store = make_store(decay=1e-5, prune_every=2, utility_dtype=dtype, target_density=1.0)
    expected = np.zeros(40)
    for step in range(40):
        train(store, [step % 3], factor=100.0)
        expected[step % 3] += 100 * 2.0  # accesses times the norm of a chunk of four
        expected *= 1e-5 ** (1 / 2)
        assert store.update().scale < 1e13
    found = store.utilities(slice(0, 40))[:, 0].numpy()
    if dtype == "float32":
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-4)
        assert not found[3:].any()
    else:
        # 9 % from code to code; and never forgotten altogether
        assert np.argsort(-found[:3]).tolist() == np.argsort(-expected[:3]).tolist()
        assert (found[:3] > 0).all()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=80, max_size=80),
    st.floats(0, 60),
)
def test_recentring_divides_one_byte_utilities_by_a_power_of_two(codes, octaves):
    store = make_store(utility_dtype="uint8")
    stored = store.layout.utilities(store.header, 2)
    stored.copy_(torch.tensor(codes, dtype=torch.uint8).view(40, 2))
    before = decode(stored.clone(), store.exponent)
    store._log_scale = octaves * math.log(2)
    store._recentre()
    after = decode(stored, store.exponent)
    folded = octaves - store._log_scale / math.log(2)
    assert folded == pytest.approx(math.floor(folded + 1e-9)) or octaves < 4
    lowest = 2.0**store.exponent
    expected = torch.where(before > 0, (before * 2.0 ** -round(folded)).clamp_min(lowest), 0)
    torch.testing.assert_close(after, expected)
    order = before.flatten().argsort()
    assert (after.flatten()[order].diff() >= 0).all()


def test_one_byte_utilities_rank_as_float32_ones_on_a_zipf_stream():
    stores = [
        make_store(2000, 8, utility_dtype=dtype, target_density=0.3, decay=0.7)
        for dtype in ("float32", "uint8")
    ]
    generator = np.random.default_rng(0)
    probability = 1 / np.arange(1, 2001) ** 1.05
    probability /= probability.sum()
    for _ in range(150):
        ids = torch.from_numpy(generator.choice(2000, size=512, p=probability))
        grad = torch.from_numpy(generator.normal(size=(512, 8)).astype(np.float32)) / 512
        for store in stores:
            lookup(store, ids, tables=[0]).backward(grad)
            store.step()
    exact, coded = (s.utilities(slice(0, 2000)).flatten().numpy() for s in stores)
    seen = exact > 0
    assert stats.spearmanr(exact[seen], coded[seen]).statistic > 0.98
    both = [s.resident(slice(0, 2000)) for s in stores]
    agreement = (both[0] & both[1]).sum() / both[0].sum()
    assert agreement > 0.9


@pytest.mark.parametrize("factor", [1e-12, 1e-9, 1e5, 1e9])
def test_the_window_of_one_byte_utilities_follows_the_gradients(factor):
    """Losses that are means over large batches have tiny gradients."""
    stores = [
        make_store(200, 8, utility_dtype=dtype, target_density=0.3, decay=0.9)
        for dtype in ("float32", "uint8")
    ]
    generator = np.random.default_rng(0)
    probability = 1 / np.arange(1, 201) ** 1.05
    probability /= probability.sum()
    for _ in range(60):
        ids = torch.from_numpy(generator.choice(200, size=64, p=probability))
        grad = torch.from_numpy(generator.normal(size=(64, 8)).astype(np.float32)) * factor
        for store in stores:
            lookup(store, ids, tables=[0]).backward(grad)
            store.step()
    exact, coded = (s.utilities(slice(0, 200)).flatten().numpy() for s in stores)
    seen = exact > 0
    assert stats.spearmanr(exact[seen], coded[seen]).statistic > 0.97


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", None])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_gradients_that_are_not_finite_are_counted_and_earn_nothing(bad, optimizer, dtype):
    store = make_store(optimizer=optimizer, utility_dtype=dtype)
    grad = torch.ones(4, 8)
    grad[1, 3] = bad
    for _ in range(10):
        lookup(store, torch.tensor([5, 6, 7, 7]), tables=[0]).backward(grad)
        store.step()
    assert store.num_nonfinite == 10
    utility = store.utilities(slice(0, 40))
    assert utility.isfinite().all()
    assert not utility[6].any()
    assert utility[[5, 7]].all()
    assert math.isfinite(store.rounds[-1].threshold)


def test_weights_that_are_not_finite_do_not_reach_the_ranking_by_norm():
    store = make_store(utility="l2", target_density=1.0)
    store.write(torch.tensor([4]), torch.full((1, 8), math.nan))
    store.resize(70)
    assert store.num_resident == 70
    assert not store.resident(slice(4, 5)).any()
    assert math.isfinite(store.rounds[-1].threshold)


def test_without_any_utility_the_residents_stay():
    store = make_store(target_density=0.5)
    with torch.no_grad():
        store.placement.set_masks(torch.arange(20), torch.full((20,), 3))
        store.write(torch.arange(20), torch.ones(20, 8))
    before = store.header.clone()
    for _ in range(30):
        store.step()
    assert len(store.rounds) == 3
    assert torch.equal(store.header, before)
    assert torch.equal(store.read(torch.arange(20)), torch.ones(20, 8))
