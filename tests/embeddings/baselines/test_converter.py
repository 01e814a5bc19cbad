"""The baselines behind `mlkit.convert`: the battery, budgets of whole models, refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mlkit
from mlkit.convert import conversions
from mlkit.embeddings.baselines.base import CompressedEmbeddingBag
from mlkit.embeddings.baselines.config import (
    CAFEConfig,
    HashingConfig,
    MDEConfig,
    NarrowConfig,
    QRConfig,
)
from mlkit.embeddings.memory import MemoryReport, dense_bytes
from mlkit.errors import InvalidValueError
from tests.helpers.battery import ALL_PASS, BatteryCase, ConverterBattery, raises

ROWS, DIM = (300, 40, 120), 8


class Tables(nn.Module):
    """Three tables and a layer over their sums, as small rankers have."""

    def __init__(self, **more) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum", **more) for rows in ROWS)
        self.head = nn.Linear(len(ROWS) * DIM, 2)

    def forward(self, ids: Tensor) -> Tensor:
        pooled = [t(i) for t, i in zip(self.tables, ids.unbind(1), strict=True)]
        return self.head(torch.cat(pooled, 1))


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tables()


def inputs() -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, n, (10, 2), generator=generator) for n in ROWS]
    return (torch.stack(ids, 1),)


# A compressed table holds other weights than a dense one: training starts anew.
EXPECT = ALL_PASS | {
    "stock_checkpoint": raises(InvalidValueError, "checkpoint holds a dense table of 300 x 8"),
    "restore": raises(AssertionError, r"tables\.0\.weight"),
    "tied": raises(AssertionError, "Tensor-likes are not equal"),
}

CONFIGS = {
    "hashing": HashingConfig(0.35),
    "qr": QRConfig(0.6),
    "qr_add": QRConfig(0.6, operation="add"),
    "narrow": NarrowConfig(0.5),
    "narrow_padded": NarrowConfig(0.5, project=False),
    "mde": MDEConfig(0.5),
    "cafe": CAFEConfig(0.7),
}


class TestBaselines(ConverterBattery):
    # Each is plain parameters and plain ops to DDP: one of them stands for all.
    cases = (
        BatteryCase("hashing", build, inputs, CONFIGS["hashing"], EXPECT),
        *(
            BatteryCase(name, build, inputs, CONFIGS[name], EXPECT, slow=("ddp",))
            for name in ("qr", "narrow", "mde")
        ),
    )


# Its hook breaks the graph, and torch itself reads .grad of what crosses a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
class TestCAFE(ConverterBattery):
    cases = (BatteryCase("cafe", build, inputs, CONFIGS["cafe"], EXPECT),)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_cafe_adapts_in_compiled_code():
    model, compiled = build(), build()
    for one in (model, compiled):
        torch.manual_seed(0)
        mlkit.convert(one, CAFEConfig(0.7, threshold=0.1))
    torch._dynamo.reset()
    (ids,) = inputs()
    torch.compile(compiled, backend="aot_eager")(ids).square().sum().backward()
    model(ids).square().sum().backward()
    for one, other in zip(model.tables, compiled.tables, strict=True):
        rows = one.step()
        assert len(rows) > 0
        assert torch.equal(rows, other.step())


every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def total(model: nn.Module) -> MemoryReport:
    reports = [m.memory_report() for m in model.modules() if isinstance(m, CompressedEmbeddingBag)]
    return sum(reports[1:], reports[0])


@every
def test_what_is_replaced_and_its_bytes(config):
    model = build()
    report = mlkit.convert(model, config)
    assert report.replaced == ["tables.0", "tables.1", "tables.2"]
    held = total(model)
    assert held.dense_bytes == sum(dense_bytes(n, DIM, "rowwise_adagrad") for n in ROWS)
    assert held.total_bytes <= config.memory_budget * held.dense_bytes
    buffers = held.allocator_bytes + held.other_bytes
    assert report.after.nbytes == held.weight_bytes + buffers
    assert report.before.nbytes == sum(ROWS) * DIM * 4


@every
def test_restored_tables_compute_what_was_trained(config):
    model = build()
    mlkit.convert(model, config)
    (ids,) = inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    trained = model.eval()(ids)
    assert mlkit.restore(model) == ["tables.0", "tables.1", "tables.2"]
    assert all(type(table) is nn.EmbeddingBag for table in model.tables)
    torch.testing.assert_close(model(ids), trained, rtol=1e-5, atol=1e-6)
    assert not conversions(model)


@every
def test_meta_to_empty_reset(config):
    """How recipes build: structure, then memory, then initial values; never the dense table."""
    with torch.device("meta"):
        model = Tables()
    mlkit.convert(model, config)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(*inputs()).isfinite().all()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    real = build()
    mlkit.convert(real, config)
    assert shapes == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("budget", [8000, "8000B"])
@every
def test_bytes_are_for_all_tables_together(config, budget):
    kind = type(config)
    model = build()
    mlkit.convert(model, kind(budget))
    held = total(model)
    assert 0.4 * 8000 < held.total_bytes <= 8000
    if kind in (HashingConfig, QRConfig):
        shares = [t.memory_report().byte_fraction for t in model.tables]
        assert max(shares) - min(shares) < 0.05, "in proportion to the dense tables"


def test_more_bytes_than_dense_is_dense():
    model = build()
    mlkit.convert(model, HashingConfig(10**9))
    assert [len(t.weight) for t in model.tables] == list(ROWS)


def test_min_rows_and_mde_over_the_rest():
    model = build()
    report = mlkit.convert(model, MDEConfig(0.4, min_rows=100))
    assert report.replaced == ["tables.0", "tables.2"]
    assert report.skipped == {"tables.1": "of 40 rows, fewer than min_rows=100"}
    assert model.tables[2].table_dim >= model.tables[0].table_dim
    held = total(model)
    assert held.dense_bytes == 420 * 36
    assert 0.25 * held.dense_bytes < held.total_bytes <= 0.4 * held.dense_bytes


def test_settings_of_the_site_are_kept():
    model = nn.Sequential(
        nn.EmbeddingBag(
            90, 4, mode="mean", sparse=True, padding_idx=3, include_last_offset=True,
            dtype=torch.float64,
        )
    ).eval()  # fmt: skip
    for config in CONFIGS.values():
        one = copy.deepcopy(model)
        mlkit.convert(one, type(config)(0.9))
        bag = one[0]
        assert (bag.mode, bag.sparse, bag.padding_idx) == ("mean", True, 3)
        assert bag.include_last_offset
        assert not bag.training
        assert next(bag.parameters()).dtype == torch.float64
        mlkit.restore(one)
        assert repr(one) == repr(model)


class Own(nn.EmbeddingBag):
    pass


def shared() -> nn.Module:
    model = nn.ModuleList([nn.EmbeddingBag(50, 4), nn.EmbeddingBag(50, 4)])
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (lambda: nn.Sequential(nn.Embedding(50, 4)), "nn.Embedding gives a vector for each id"),
        (lambda: nn.Sequential(nn.EmbeddingBag(50, 4, mode="max")), "mode='max' has no compressed"),
        (lambda: nn.Sequential(nn.EmbeddingBag(50, 4, max_norm=1.0)), "max_norm=1.0 changes rows"),
        (
            lambda: nn.Sequential(nn.EmbeddingBag(50, 4, scale_grad_by_freq=True)),
            "scale_grad_by_freq=True counts ids",
        ),
        (lambda: nn.Sequential(Own(50, 4)), "Own is a class of its own"),
        (shared, "its weight is shared with another module"),
    ],
)
def test_refusals(site, match):
    with pytest.raises(InvalidValueError, match=match):
        mlkit.convert(site(), HashingConfig(0.5))


@every
def test_a_budget_too_small_names_the_minimum_and_leaves_the_model(config):
    model = build()
    with pytest.raises(InvalidValueError, match="minimum is"):
        mlkit.convert(model, type(config)(60))
    assert all(type(t) is nn.EmbeddingBag for t in model.tables)


def test_a_budget_too_small_names_the_table():
    with pytest.raises(InvalidValueError, match=r"table 'tables\.1': .* 36 bytes"):
        mlkit.convert(build(), HashingConfig(0.02))
