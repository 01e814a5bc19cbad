"""Two ranks: stores bit-equal from the first step on, and the run of one process on both."""

import functools

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from mlkit.embeddings import (
    DynamicEmbeddingStore,
    EmbeddingBudget,
    FIITEDConfig,
    FusedEmbeddingOptimizer,
    TableSpec,
)
from mlkit.embeddings.fiited.distributed import exclude_from_broadcast
from mlkit.embeddings.fiited.lookup import lookup
from tests.helpers.ddp import run_ddp

ROWS, DIM, BATCH, STEPS = 40, 8, 12, 14

VARIANTS = {
    "fused": {"optimizer": "adagrad"},
    "fused_shared": {"optimizer": "rowwise_adagrad", "shared": True},
    "fused_chunks": {"optimizer": "adam", "layout": "chunk", "prefix": True},
    "fused_exact": {"optimizer": "sgd", "id_map": "exact"},
    "fused_ramp": {"optimizer": "adagrad", "ramp": (0, 10), "ramp_from": 0.9},
    "unfused": {"optimizer": None},
    "unfused_shared": {"optimizer": None, "shared": True},
    "unfused_exact": {"optimizer": None, "id_map": "exact", "exclude": True},
    "unfused_seldom": {"optimizer": None, "utility_every": 3},
}


class Model(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        settings = {
            "target_density": 0.4, "lr": 0.1, "schedule": "fixed", "prune_every": 3,
            "trigger": 0.0, "decay": 0.3, "num_chunks": 4,
        } | settings  # fmt: skip
        specs = [TableSpec("user", ROWS, padding_idx=2), TableSpec("item", ROWS)]
        self.store = DynamicEmbeddingStore(specs, DIM, FIITEDConfig(**settings))
        torch.manual_seed(0)
        self.head = nn.Linear(2 * DIM, 1)

    def forward(self, users, items):
        # One lookup a table: the collectives of the second come after those of the first.
        parts = [lookup(self.store, ids, tables=[t]) for t, ids in enumerate((users, items))]
        return self.head(torch.cat(parts, 1)).squeeze(1)


def batch_of(step, rank, shared):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(ROWS // 2, (2, BATCH), generator=generator)
    if not shared:
        ids = 2 * ids + rank  # nothing that both ranks see
    if step > STEPS // 2:
        ids = (ids + ROWS // 2) % ROWS
    return ids, torch.randn(BATCH, generator=generator)


def train(model, module, ranks, shared):
    fused = module.store.config.optimizer is not None
    held = module.head.parameters() if fused else module.parameters()
    dense = torch.optim.SGD(held, lr=0.1, momentum=0.5)
    optimizers = [dense, *([FusedEmbeddingOptimizer(module)] if fused else [])]
    if not fused:
        module.store.register_optimizer(dense)
    for step in range(STEPS):
        batches = [batch_of(step, rank, shared) for rank in ranks]
        ids = torch.cat([b[0] for b in batches], 1)
        target = torch.cat([b[1] for b in batches])
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(*ids) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    result = {name: value.detach().clone() for name, value in module.state_dict().items()}
    store = module.store
    result["values"] = store.read(torch.arange(store.tables.num_rows))
    result["utilities"] = store.utilities(slice(0, store.tables.num_rows))
    result["rounds"] = [(r.step, r.evicted, r.admitted, r.resident) for r in store.rounds]
    if not fused:
        result["momentum"] = dense.state[store.pool]["momentum_buffer"].clone()
    return result


class Lightning(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model(optimizer="adagrad")

    def training_step(self, batch, number):
        return (self.model(*batch[0].T) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.head.parameters(), lr=0.1)


def fit(world_size):
    """Under a trainer, whose sampler gives every rank examples of its own."""
    module = Lightning()
    batches = [batch_of(step, 0, shared=True) for step in range(8)]
    ids, target = torch.cat([b[0] for b in batches], 1).T, torch.cat([b[1] for b in batches])
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EmbeddingBudget()],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(ids, target), batch_size=BATCH // 2))
    return {
        **{name: value.detach().clone() for name, value in module.state_dict().items()},
        "steps": torch.tensor(module.model.store.steps),
        "ignored": sorted(module._ddp_params_and_buffers_to_ignore),
    }


def run_all(rank, world_size):
    results = {}
    for name, given in VARIANTS.items():
        settings = dict(given)
        shared = settings.pop("shared", False)
        excluded = settings.pop("exclude", False)
        module = Model(**settings)
        if excluded:
            exclude_from_broadcast(module)
        model = DistributedDataParallel(module)
        assert bool(model.modules_buffers) != excluded
        results[name] = train(model, module, [rank], shared)
    results["trainer"] = fit(world_size)
    module = Model(optimizer=None, ramp=(0, 10), ramp_from=0.9)
    try:
        train(DistributedDataParallel(module), module, [rank], shared=False)
    except RuntimeError as error:
        results["error"] = str(error)
    return results


@functools.cache
def both_ranks():
    return run_ddp(run_all, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_are_equal_bit_by_bit(name):
    first, second = (result[name] for result in both_ranks())
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = value == second[key] if key == "rounds" else torch.equal(value, second[key])
        assert same, key
    assert len(first["rounds"]) >= 4


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one_process_on_both_batches(name):
    settings = dict(VARIANTS[name])
    shared = settings.pop("shared", False)
    settings.pop("exclude", None)
    module = Model(**settings)
    alone = train(module, module, [0, 1], shared)
    together = both_ranks()[0][name]
    assert together["rounds"] == alone["rounds"]
    assert sum(evicted for _, evicted, _, _ in alone["rounds"]) > 0
    # Means over 24 examples or over two halves: a few roundings of float32 for each step.
    for key in ("values", "utilities", "head.weight"):
        torch.testing.assert_close(together[key], alone[key], rtol=2e-4, atol=2e-6)
    assert torch.equal(together["values"] == 0, alone["values"] == 0)


def test_trainer_keeps_ranks_equal():
    first, second = (result["trainer"] for result in both_ranks())
    assert (
        first.pop("ignored")
        == second.pop("ignored")
        == [
            "model.store.header",
            "model.store.sum",
        ]
    )
    assert first["steps"] == 8  # 96 examples, 6 a step on each of two ranks
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_unfused_ramp_is_refused():
    for result in both_ranks():
        assert result["error"] == (
            "a ramp changes the pool's shape, which DDP does not follow: leave ramp out, or use a "
            "fused optimizer, FIITEDConfig(optimizer=...)"
        )
