"""The store against a dense table times a mask, over streams with many rounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.gradients import take_gradient
from mlkit.embeddings.fiited.initial import initial_values
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.embeddings.fiited.tables import TableSpec
from tests.embeddings.fiited.oracle import MaskedOracle

SIZES, PADDING, DIM = (23, 9, 14), (None, 0, 5), 24
# Float32 against float64 over some 120 updates of numbers of order one: 120 * 2^-24 = 7e-6, and
# Adagrad divides by roots of small sums.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@dataclass
class Batch:
    """One lookup: ids in bags, factors, and the gradient that its output gets."""

    ids: list[int]
    offsets: list[int]
    weights: np.ndarray | None
    grad: np.ndarray
    mode: str

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        weights = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32)
        grad = torch.tensor(self.grad, dtype=torch.float32)
        return torch.tensor(self.ids, dtype=torch.int64), torch.tensor(self.offsets), weights, grad


def stream(seed: int, steps: int, dim: int, sizes: tuple[int, ...]) -> Iterator[list[Batch]]:
    """Zipf ids whose favourites move; bags of 0 to 4; gradients that differ by row and column."""
    rng = np.random.default_rng(seed)
    scale = [np.exp(rng.normal(size=(n, dim))) for n in sizes]
    for step in range(steps):
        batches = []
        for table, rows in enumerate(sizes):
            lengths = rng.integers(0, 5, 5)
            rank = np.minimum(rng.zipf(1.4, lengths.sum()) - 1, rows - 1)
            ids = (rank * 7 + step // 30 * 5) % rows
            mode = "mean" if step % 3 == 0 else "sum"
            weights = rng.uniform(0.2, 2, len(ids)) if step % 3 == 1 else None
            offsets = [0, *np.cumsum(lengths).tolist()]
            typical = np.stack(
                [
                    scale[table][ids[a:b]].mean(0) if b > a else np.ones(dim)
                    for a, b in itertools.pairwise(offsets)
                ]
            )
            grad = rng.normal(size=(5, dim)) * typical
            # the store computes in float32, and the oracle must see the same numbers
            grad = grad.astype(np.float32).astype(np.float64)
            if weights is not None:
                weights = weights.astype(np.float32).astype(np.float64)
            batches.append(Batch(ids.tolist(), offsets, weights, grad, mode))
        yield batches


class Pair:
    """A store and its oracle, fed with the same stream."""

    def __init__(
        self,
        config: FIITEDConfig,
        dim: int,
        *,
        sparse: bool = False,
        torch_optimizer: str | None = None,
    ) -> None:
        specs = [
            TableSpec(f"t{n}", size, pad)
            for n, (size, pad) in enumerate(zip(SIZES, PADDING, strict=True))
        ]
        self.store = DynamicEmbeddingStore(specs, dim, config, sparse=sparse)
        rows = self.store.tables.num_rows
        initial = initial_values(config, self.store.tables, torch.arange(rows), dim)
        real = [n - (p is not None) for n, p in zip(SIZES, PADDING, strict=True)]
        target = self.store.target
        shares = [target * n // sum(real) for n in real]
        self.oracle = MaskedOracle(
            config, SIZES, PADDING, initial.numpy(), target, shares, torch_optimizer
        )
        self.optimizer: Any = None
        if torch_optimizer is not None:
            kinds = {
                "sgd": (torch.optim.SGD, {}),
                "adagrad": (torch.optim.Adagrad, {"eps": config.eps}),
                "sparse_adam": (torch.optim.SparseAdam, {"eps": config.eps}),
            }
            kind, kwargs = kinds[torch_optimizer]
            self.optimizer = kind([self.store.pool], lr=config.lr, **kwargs)
            self.store.register_optimizer(self.optimizer)

    def step(
        self, batches: list[Batch], *, together: bool = False, target: int | None = None
    ) -> None:
        store = self.store
        out, root = [], store.anchor if store.config.optimizer else store.pool
        if together:
            ids = torch.tensor([i for b in batches for i in b.ids], dtype=torch.int64)
            starts = np.cumsum([0, *(len(b.ids) for b in batches)]).tolist()
            offsets = [s + o for s, b in zip(starts, batches, strict=False) for o in b.offsets[:-1]]
            found = lookup(store, ids, torch.tensor([*offsets, len(ids)]))
            parts = list(found.chunk(len(batches), 1))
        else:
            parts = []
            for table, batch in enumerate(batches):
                ids, offsets, weights, _ = batch.tensors()
                parts.append(lookup(store, ids, offsets, weights, tables=[table], mode=batch.mode))
        for table, (batch, found) in enumerate(zip(batches, parts, strict=True)):
            out.append((found * batch.tensors()[3]).sum())
            expected = self.oracle.lookup(
                table, batch.ids, batch.offsets, batch.weights, batch.mode
            )
            np.testing.assert_allclose(found.detach().numpy(), expected, **TOLERANCE)
        root.grad = None
        sum(out).backward()
        for table, batch in enumerate(batches):
            self.oracle.backward(
                table, batch.ids, batch.offsets, batch.grad, batch.weights, batch.mode
            )
        if self.optimizer is not None:
            self.optimizer.step()
            stats = (
                store.rounds[-1] if store.rounds and store.rounds[-1].step == store.steps else None
            )
        else:
            stats = store.step()
        outcome = self.oracle.step(target)
        if outcome is not None and outcome.carried_out:
            assert stats is not None
            assert (stats.evicted, stats.admitted) == (len(outcome.evicted), len(outcome.admitted))
        else:
            assert stats is None

    def compare(self) -> None:
        store, oracle = self.store, self.oracle
        every = slice(0, store.tables.num_rows)
        np.testing.assert_array_equal(store.resident(every).numpy(), oracle.mask)
        decayed = oracle.utility * store.config.decay_per_step
        np.testing.assert_allclose(store.utilities(every).numpy(), decayed, rtol=1e-4, atol=1e-6)
        values = store.read(torch.arange(store.tables.num_rows)).numpy()
        visible = (oracle.weight * oracle.mask[:, :, None]).reshape(len(values), -1)
        np.testing.assert_allclose(values, visible, **TOLERANCE)


CASES = {
    "slab sgd": {"layout": "slab", "optimizer": "sgd"},
    "chunk sgd": {"layout": "chunk", "optimizer": "sgd"},
    "rowwise": {"optimizer": "rowwise_adagrad", "eps": 1e-4},
    "adagrad": {"optimizer": "adagrad", "eps": 1e-3},
    "adagrad chunk": {"optimizer": "adagrad", "eps": 1e-3, "layout": "chunk"},
    "adam": {"optimizer": "adam", "eps": 1e-3},
    "one chunk": {"num_chunks": 1, "optimizer": "sgd"},
    "eight chunks": {"num_chunks": 8, "optimizer": "adam", "eps": 1e-3, "target_density": 0.3},
    "three chunks, prefix": {"num_chunks": 3, "optimizer": "sgd", "prefix": True},
    "prefix chunk layout": {
        "optimizer": "rowwise_adagrad",
        "eps": 1e-3,
        "prefix": True,
        "layout": "chunk",
    },
    "not normalised": {"optimizer": "sgd", "normalize": "none", "hysteresis": 0.3},
    "per table": {"optimizer": "sgd", "normalize": "per_table"},
    "geometric": {"optimizer": "sgd", "schedule": "geometric", "prune_every": 11},
    "trigger": {"optimizer": "sgd", "trigger": 0.25},
    "no hysteresis": {"optimizer": "sgd", "hysteresis": 0.0},
    "quick decay": {"optimizer": "sgd", "decay": 0.05, "hysteresis": 0.0},
    "accesses": {"optimizer": "sgd", "utility": "freq", "decay": 1.0, "normalize": "none"},
    "accesses, no hysteresis": {
        "optimizer": "sgd",
        "utility": "freq",
        "decay": 1.0,
        "normalize": "none",
        "hysteresis": 0.0,
    },
    "gradient alone, sampled": {"optimizer": "sgd", "utility": "grad", "utility_every": 3},
    "norms": {"optimizer": "adagrad", "eps": 1e-3, "utility": "l2"},
    "initial values again": {"optimizer": "sgd", "admission": "init"},
    "a chunk of each table": {"optimizer": "sgd", "target_density": 0.017, "hysteresis": 0.0},
    "more than half": {"optimizer": "adagrad", "eps": 1e-3, "target_density": 0.55},
}


def config_of(**changes: Any) -> FIITEDConfig:
    base = {
        "target_density": 0.35,
        "num_chunks": 4,
        "schedule": "fixed",
        "prune_every": 4,
        "trigger": 0.0,
        "lr": 0.05,
        "decay": 0.8,
        "init_scale": 0.5,
        "first_read": "zeros",
    }
    return FIITEDConfig(**{**base, **changes})


def run(config: FIITEDConfig, seed: int, steps: int, **kwargs: Any) -> Pair:
    pair = Pair(config, DIM, **kwargs)
    for number, batches in enumerate(stream(seed, steps, DIM, SIZES)):
        pair.step(batches)
        if number % 20 == 19:
            pair.compare()
    pair.compare()
    return pair


@pytest.mark.parametrize("name", CASES)
def test_fused_follows_the_dense_table(name: str) -> None:
    pair = run(config_of(**CASES[name]), len(name), 25)
    assert sum(r.admitted for r in pair.store.rounds) > 0 or name == "norms"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", CASES)
def test_fused_follows_the_dense_table_for_long(name: str, seed: int) -> None:
    run(config_of(**CASES[name]), seed, 300)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    ("kind", "sparse", "layout"),
    [
        ("sgd", False, "slab"),
        ("sgd", True, "chunk"),
        ("adagrad", False, "chunk"),
        ("adagrad", True, "slab"),
        ("sparse_adam", True, "slab"),
        ("sparse_adam", True, "chunk"),
    ],
)
def test_torch_optimizers_follow_the_dense_table(kind: str, sparse: bool, layout: str) -> None:
    unfused = {"sgd": "sgd", "adagrad": "adagrad", "sparse_adam": "adam"}[kind]
    config = config_of(optimizer=None, unfused_optimizer=unfused, layout=layout, eps=1e-3)
    pair = run(config, 7, 22, sparse=sparse, torch_optimizer=kind)
    assert sum(r.admitted for r in pair.store.rounds) > 0


def test_all_tables_in_one_lookup() -> None:
    config = config_of(optimizer="rowwise_adagrad", eps=1e-3)
    pair = Pair(config, DIM)
    for batches in stream(3, 20, DIM, SIZES):
        for batch in batches:
            batch.weights, batch.mode = None, "sum"
        pair.step(batches, together=True)
    pair.compare()


def test_a_gradient_that_is_not_finite_earns_nothing() -> None:
    config = config_of(optimizer="sgd", lr=0.0)
    pair = Pair(config, DIM)
    stream_of = stream(5, 10, DIM, SIZES)
    for batches in stream_of:
        batches[0].ids = batches[0].ids or [1]
        batches[1].grad[0, 3] = np.inf
        batches[2].grad[1, 0] = np.nan
        for batch in batches:
            batch.weights, batch.mode = None, "sum"
        ids = [torch.tensor(b.ids, dtype=torch.int64) for b in batches]
        for table, batch in enumerate(batches):
            grad = torch.tensor(batch.grad, dtype=torch.float32)
            offsets = torch.tensor(batch.offsets)
            take_gradient(pair.store, [table], ids[table], offsets, 1, None, grad, "sum")
            pair.oracle.backward(table, batch.ids, batch.offsets, batch.grad)
        pair.store.step()
        with np.errstate(invalid="ignore"):  # such a row's weights are NaN, as torch has it
            pair.oracle.step()
    assert pair.store.num_nonfinite == pair.oracle.bad_rows > 0
    found = pair.store.utilities(slice(0, pair.store.tables.num_rows)).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found, pair.oracle.utility * config.decay_per_step, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(found > 0, pair.oracle.utility > 0)


def test_the_scale_of_the_decay_is_folded_in_time() -> None:
    """Utilities that are kept divided by gamma^step stay exact over many foldings."""
    pair = run(config_of(optimizer="sgd", decay=1e-7, prune_every=4), 11, 40)
    assert pair.store._log_scale < np.log(1e12) + 2 * np.log(1e7)


@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_lowering_the_target_evicts_the_lowest_scores(layout: str) -> None:
    pair = Pair(config_of(optimizer="adagrad", eps=1e-3, target_density=0.6, layout=layout), DIM)
    for number, batches in enumerate(stream(2, 36, DIM, SIZES)):
        pair.step(batches)
        if number in (11, 23):
            pair.oracle.target = pair.store.target // 2
            pair.store.resize(pair.oracle.target)
            pair.oracle.round(force=True)
            pair.compare()
        if number == 30:
            pair.oracle.target = pair.store.target * 3
            pair.store.resize(pair.oracle.target)
    pair.compare()


def test_a_ramp_descends_with_the_oracle() -> None:
    config = config_of(
        optimizer="sgd", target_density=0.2, ramp=(5, 20), prune_every=5, ramp_from=0.9
    )
    pair = Pair(config, DIM)
    chunks = 4 * sum(SIZES)
    final = int(0.2 * chunks)
    for number, batches in enumerate(stream(4, 30, DIM, SIZES), start=1):
        left = 1 - min(max(number - 5, 0) / 20, 1)
        target = round(final + (0.9 * chunks - final) * left**3)
        pair.step(batches, target=target)
        if config.is_round(number):
            assert pair.store.target == target
        assert pair.store.num_resident <= pair.store.target
    pair.compare()
    assert pair.store.target == final


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
@pytest.mark.parametrize("utility", ["freq_grad", "freq"])
def test_two_lookups_of_a_table_in_one_step(optimizer: Any, utility: Any) -> None:
    """Each is a backward of its own, for rows that are new in this step too."""
    config = config_of(optimizer=optimizer, utility=utility, eps=1e-3, decay=1.0, normalize="none")
    pair = Pair(config, DIM)
    first, second = stream(3, 16, DIM, SIZES), stream(8, 16, DIM, SIZES)
    for one, two in zip(first, second, strict=True):
        for table, batches in enumerate(zip(one, two, strict=True)):
            for batch in batches:
                ids, offsets, weights, grad = batch.tensors()
                take_gradient(pair.store, [table], ids, offsets, 1, weights, grad, batch.mode)
                pair.oracle.backward(
                    table, batch.ids, batch.offsets, batch.grad, batch.weights, batch.mode
                )
        pair.store.step()
        pair.oracle.step()
    pair.compare()
