"""At density 1 the drop-ins are `nn.Embedding` and `nn.EmbeddingBag` with `torch.optim`."""

from __future__ import annotations

import copy
import itertools
import pickle
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlkit.embeddings import DynamicEmbedding, DynamicEmbeddingBag, FIITEDConfig
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.errors import InvalidTypeError, InvalidValueError

ROWS, DIM, PADDING = 30, 8, 4
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}
# float32, a few steps of a few additions each
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def bag(**options: Any) -> DynamicEmbeddingBag:
    options = {"target_density": 1.0, "init": "normal", "num_chunks": 2} | options
    return DynamicEmbeddingBag(ROWS, DIM, **options)


def batch(seed: int, *, ragged: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Ids with repeats and padding; bags of which some are empty, or all padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (12, 3), generator=generator)
    ids[2] = PADDING
    if not ragged:
        return ids.to(dtype), None
    offsets = torch.tensor([0, 4, 4, 6, 9, 9, 30, 36])
    return ids.flatten().to(dtype), offsets.to(dtype)


def train(
    module: nn.Module, optimizer: Any, inputs: list[tuple[Any, ...]], *, is_linear: bool = False
) -> list[Tensor]:
    outputs = []
    for step, arguments in enumerate(inputs):
        found = module(*arguments)
        factor = torch.linspace(1 if is_linear else -1, 2, found.numel()).view_as(found)
        optimizer.zero_grad()
        (found * factor + (not is_linear) * step * found.square()).sum().backward()
        optimizer.step()
        outputs.append(found.detach())
    return outputs


def compare(ours: Any, stock: Any, name: str, inputs: list[tuple[Any, ...]]) -> None:
    expected = train(stock, OPTIMIZERS[name](stock.parameters()), inputs)
    found = train(ours, OPTIMIZERS[name](ours.parameters()), inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(ours.dense_weight(), stock.weight.detach(), **CLOSE)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bag_trains_as_stock(mode: str, ragged: bool, optimizer: str) -> None:
    dtype = torch.int32 if ragged else torch.int64
    inputs = [batch(seed, ragged=ragged, dtype=dtype) for seed in range(4)]
    for num_chunks, padding in ((1, None), (4, PADDING), (8, -1)):
        ours = bag(mode=mode, num_chunks=num_chunks, padding_idx=padding)
        compare(ours, ours.to_dense(), optimizer, inputs)


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bag_scales_gradients_by_frequency(mode: str, layout: str) -> None:
    ours = bag(mode=mode, scale_grad_by_freq=True, layout=layout, padding_idx=PADDING)
    inputs = [batch(seed, ragged=True, dtype=torch.int64) for seed in range(3)]
    compare(ours, ours.to_dense(), "sgd", inputs)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_bag_renormalises_what_it_reads(mode: str, norm: float) -> None:
    ours = bag(mode=mode, max_norm=1.3, norm_type=norm)
    stock = ours.to_dense()
    inputs = [batch(seed, ragged=True, dtype=torch.int64) for seed in range(3)]
    compare(ours, stock, "sgd", inputs)
    lengths = torch.linalg.vector_norm(ours.dense_weight(), norm, dim=1)
    assert (lengths > 1.3).any(), "rows that were never read keep their length"


@pytest.mark.parametrize("include_last_offset", [False, True])
def test_per_sample_weights_get_gradients(include_last_offset: bool) -> None:
    ours = bag(mode="sum", include_last_offset=include_last_offset, padding_idx=PADDING)
    stock = ours.to_dense()
    ids, offsets = batch(0, ragged=True, dtype=torch.int64)
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(1))
    results = []
    for module in (ours, stock):
        mine = weights.clone().requires_grad_()
        fixed = module(ids, offsets, weights)
        learned = module(ids, offsets, mine)
        torch.testing.assert_close(fixed, learned, **CLOSE)
        (fixed.square().sum() + learned.sin().sum()).backward()
        results.append((learned.detach(), mine.grad))
    torch.testing.assert_close(*results, **CLOSE)
    ours.store.pool.data -= 0.1 * ours.store.pool.grad
    stock.weight.data -= 0.1 * stock.weight.grad
    torch.testing.assert_close(ours.dense_weight(), stock.weight.detach(), **CLOSE)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_empty_and_strange_inputs(mode: str) -> None:
    ours = bag(mode=mode)
    stock = ours.to_dense()
    none = torch.zeros(0, dtype=torch.int64)
    for arguments in (
        (none, torch.tensor([0, 0, 0])),
        (torch.tensor([3, 3]), torch.tensor([0, 0, 2, 2])),
        (torch.arange(24).view(4, 6).t(), None),  # not contiguous
        (torch.arange(24)[::3], torch.arange(8)[::4]),
        (torch.tensor([7]), torch.tensor([0], dtype=torch.int32).long()),
    ):
        torch.testing.assert_close(ours(*arguments), stock(*arguments), **CLOSE)
    assert torch.equal(ours(torch.zeros(3, 0, dtype=torch.int64)), torch.zeros(3, DIM))
    assert ours(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, DIM)
    ours(none, torch.tensor([0, 0])).sum().backward()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_embedding_trains_as_stock(optimizer: str) -> None:
    options = {"target_density": 1.0, "init": "normal"}
    for extra in (
        {},
        {"padding_idx": PADDING},
        {"padding_idx": -3, "max_norm": 1.5},
        {"scale_grad_by_freq": True, "layout": "chunk"},
    ):
        ours = DynamicEmbedding(ROWS, DIM, **options, **extra)
        inputs = [
            (ids,)
            for ids in (
                torch.randint(0, ROWS, (2, 3, 4), generator=torch.Generator().manual_seed(5)),
                torch.tensor(7),
                torch.arange(12, dtype=torch.int32).view(3, 4).t(),
                torch.full((4,), PADDING),
            )
        ]
        compare(ours, ours.to_dense(), optimizer, inputs)
        assert ours(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, DIM)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_fused_optimizers_are_those_of_torch(name: str, layout: str) -> None:
    """Every row is read at every step: Adam of a row that is not read differs by design.

    No gradient is near zero, where Adam's root would magnify its rounding.
    """
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-8),
    }[name]
    ours = bag(mode="sum", optimizer=name, lr=0.05, layout=layout)
    stock = ours.to_dense()
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (torch.cat([torch.randperm(ROWS, generator=generator) for _ in range(2)]).view(15, 4),)
        for _ in range(4)
    ]
    expected = train(stock, made(stock.parameters()), inputs, is_linear=True)
    found = train(ours, torch.optim.SGD(ours.parameters(), lr=1.0), inputs, is_linear=True)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(ours.dense_weight(), stock.weight.detach(), **CLOSE)


# Of torch's own Adagrad.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_sparse_gradients_train_as_stock(mode: str) -> None:
    ours = bag(mode=mode, sparse=True)
    stock = bag(mode=mode, sparse=False).to_dense()
    inputs = [batch(seed, ragged=True, dtype=torch.int64) for seed in range(3)]
    compare(ours, stock, "adagrad", inputs)
    ours(*inputs[0]).sum().backward()
    assert ours.store.pool.grad.is_sparse


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    num_chunks=st.sampled_from([1, 2, 4, 8]),
    density=st.floats(0.1, 1.0),
    mode=st.sampled_from(["sum", "mean", "max"]),
    seed=st.integers(0, 100),
)
def test_below_density_1_a_lookup_is_that_of_the_masked_table(
    lengths: list[int], num_chunks: int, density: float, mode: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, DIM, generator=generator)
    ours = DynamicEmbeddingBag.from_pretrained(
        weight, mode=mode, target_density=density, num_chunks=num_chunks, warm_start="magnitude"
    )
    kept = ours.store.resident(slice(0, ROWS)).repeat_interleave(DIM // num_chunks, 1)
    torch.testing.assert_close(ours.dense_weight(), weight * kept, rtol=0, atol=0)
    ids = torch.randint(0, ROWS, (sum(lengths),), generator=generator)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])[:-1]
    expected = nn.functional.embedding_bag(ids, weight * kept, offsets, mode=mode)
    torch.testing.assert_close(ours(ids, offsets), expected, **CLOSE)


def test_bfloat16_and_float64_keep_their_type() -> None:
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float64, 1e-12)):
        ours = bag(mode="sum", dtype=dtype)
        stock = ours.to_dense()
        ids, offsets = batch(0, ragged=True, dtype=torch.int64)
        found, expected = ours(ids, offsets), stock(ids, offsets)
        assert found.dtype == dtype == stock.weight.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradcheck_of_the_pool(mode: str) -> None:
    weight = torch.randn(ROWS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = DynamicEmbeddingBag.from_pretrained(
        weight, freeze=False, mode=mode, target_density=0.6, warm_start="magnitude"
    )
    ids, offsets = batch(1, ragged=True, dtype=torch.int64)
    weights = torch.rand(len(ids), dtype=torch.float64) if mode == "sum" else None

    def call(_: Tensor, weights: Tensor | None) -> Tensor:
        return ours(ids, offsets, weights)

    assert torch.autograd.gradcheck(call, (ours.store.pool, weights))
    if weights is not None:
        assert torch.autograd.gradcheck(call, (ours.store.pool, weights.requires_grad_()))


# ------------------------------------------------------------------------ budget


def test_budget_of_a_module() -> None:
    ours = bag(target_density=1.0)
    assert ours.density == 1
    assert ours.dims().tolist() == [DIM] * ROWS
    ours.resize(target_density=0.5)
    assert ours.density == 0.5
    assert ours.dims().sum() == ROWS * DIM // 2
    whole = ours.memory_report().dense_bytes
    budget = 2 * whole
    ours.resize(memory_budget=budget)
    assert ours.store.is_whole
    assert ours.memory_report().total_bytes <= budget
    assert ours.prune_now() is not None
    with pytest.raises(InvalidValueError, match="exactly one of target_density and memory_budget"):
        ours.resize()
    with pytest.raises(
        InvalidValueError, match=r"the headers of 30 rows and a chunk of each table take \d+"
    ):
        ours.resize(memory_budget=100)


def test_from_pretrained() -> None:
    weight = torch.randn(ROWS, DIM)
    for cls in (DynamicEmbedding, DynamicEmbeddingBag):
        ours = cls.from_pretrained(weight, target_density=1.0)
        assert torch.equal(ours.dense_weight(), weight)
        assert not any(p.requires_grad for p in ours.parameters())
        assert not ours.to_dense().weight.requires_grad
        with pytest.raises(InvalidValueError, match=r"at density 0.5.*warm_start='magnitude'"):
            cls.from_pretrained(weight, target_density=0.5)
    with pytest.raises(InvalidValueError, match=r"row padding_idx=4 .* is not zeros"):
        DynamicEmbedding.from_pretrained(weight, padding_idx=PADDING, target_density=1.0)


@pytest.mark.parametrize("prefix", [False, True])
def test_magnitude_keeps_the_largest_chunks(prefix: bool) -> None:
    weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    ours = DynamicEmbeddingBag.from_pretrained(
        weight, padding_idx=PADDING, num_chunks=4, target_density=0.4, prefix=prefix,
        warm_start="magnitude",
    )  # fmt: skip
    norms = weight.view(ROWS, 4, 2).norm(dim=2)
    if prefix:
        norms = torch.stack([norms[:, : k + 1].amin(1) for k in range(4)], 1)
    norms[PADDING] = 0
    kept = ours.store.resident(slice(0, ROWS))
    assert kept.sum() == 48, "0.4 of 120"
    assert norms[kept].min() >= norms[~kept].max()
    assert not prefix or not (kept[:, 1:] & ~kept[:, :-1]).any()


# ------------------------------------------------------------------------ copies


@pytest.mark.parametrize("optimizer", [None, "sgd"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_stores_of_their_own(how: str, optimizer: str | None) -> None:
    ours = bag(mode="sum", optimizer=optimizer, lr=0.1)
    other = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert other.store.handle != ours.store.handle
    before = ours.dense_weight()
    ids = torch.arange(6).view(2, 3)
    trained = torch.optim.SGD(other.parameters(), lr=0.1)
    train(other, trained, [(ids,)] * 2)
    assert torch.equal(ours.dense_weight(), before)
    assert not torch.equal(other.dense_weight(), before)
    assert torch.equal(other(ids), other.to_dense()(ids))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", [None, "adagrad"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_compiled_without_break(mode: str, optimizer: str | None, backend: str) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("Inductor needs a compiler")
    options = {"optimizer": optimizer, "lr": 0.1, "max_norm": 2.0, "padding_idx": PADDING}
    plain = bag(mode=mode, **options)
    other = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    inputs = [batch(seed, ragged=True, dtype=torch.int64) for seed in range(3)]
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), inputs)
    found = train(compiled, torch.optim.SGD(other.parameters(), lr=0.1), inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(other.dense_weight(), plain.dense_weight(), **CLOSE)
    rows = slice(0, ROWS)
    torch.testing.assert_close(other.store.utilities(rows), plain.store.utilities(rows))


# Of opcheck itself, which looks at the gradient of a tensor that it made.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_the_op_is_what_torch_expects(optimizer: str | None) -> None:
    store = bag(optimizer=optimizer, lr=0.0).store
    ids, weights = torch.arange(6), torch.rand(6)
    for offsets, size in ((torch.tensor([0, 2, 6]), 1), (None, 3)):
        torch.library.opcheck(
            torch.ops.mlkit.fiited_lookup.default,
            (
                store.root,
                ids,
                offsets,
                weights,
                store.handle,
                [0],
                size,
                "sum",
                None,
                2.0,
                True,
                False,
            ),
        )


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("wrong", [-1, ROWS, 10**12])
def test_an_index_out_of_range_names_table_and_id(wrong: int, layout: str) -> None:
    ours = bag(name="user_id", layout=layout)
    message = f"index {wrong} is outside of table 'user_id', which has 30 rows"
    with pytest.raises(IndexError, match=message):
        ours(torch.tensor([[1, wrong]]))
    with pytest.raises(InvalidValueError, match=message):
        ours(torch.tensor([1, wrong]), torch.tensor([0, 1]))
    limited = bag(name="user_id", max_norm=0.1)
    with pytest.raises(IndexError, match=message):
        limited(torch.tensor([[1, wrong]]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2], "offsets must begin with 0, got 1"),
        ([0, 3, 2], "offsets must not decrease, got 3 before 2 at position 1"),
        ([0, 9], "offsets must not pass the 4 indices.*the last is 9"),
    ],
)
def test_bad_offsets(mode: str, offsets: list[int], message: str) -> None:
    ours = bag(mode=mode, name="item")
    with pytest.raises(InvalidValueError, match=rf"{message}.*item"):
        ours(torch.arange(4), torch.tensor(offsets))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), None), "ids of table 'item' must be int64 or int32.*float32"),
        ((torch.zeros(4).bool(), torch.tensor([0])), "ids of table 'item'.*bool"),
        ((torch.arange(4), torch.zeros(1)), "offsets of table 'item'.*float32"),
        ((torch.arange(4), torch.zeros(1, 1).long()), r"offsets must have 1 dimension.*\(1, 1\)"),
        ((torch.arange(4), None), "a 1-D input needs offsets"),
        ((torch.zeros(2, 2).long(), torch.tensor([0])), "offsets must be None"),
        ((torch.tensor(3), None), "1 or 2 dimensions"),
        ((torch.arange(4), torch.tensor([0]), torch.ones(3)), r"shape of the input, \(4,\)"),
    ],
)
def test_bad_calls(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((InvalidTypeError, InvalidValueError), match=message):
        bag(mode="sum", name="item")(*arguments)


def test_a_store_takes_integers_only() -> None:
    store = bag(target_density=1.0).store.eval()
    with pytest.raises(InvalidTypeError, match=r"ids of 'embedding_bag' must be int64 or int32"):
        lookup(store, torch.tensor([1.5]))


def test_weights_are_for_sums() -> None:
    with pytest.raises(InvalidValueError, match="per_sample_weights are for mode 'sum'"):
        bag(mode="mean")(torch.arange(4).view(2, 2), None, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_chunks": 3}, InvalidValueError, "num_chunks must divide .* 8, got 3"),
        ({"target_density": None}, InvalidValueError, "got neither"),
        ({"memory_budget": 0.5}, InvalidValueError, "got both"),
        ({"target_density": 1.5}, InvalidValueError, r"must be in \(0, 1\], got 1.5"),
        (
            {"target_density": None, "memory_budget": 64}, InvalidValueError,
            r"64 bytes, but the headers of 30 rows and a chunk of each table take \d+ bytes",
        ),
        ({"mode": "min"}, InvalidValueError, "mode must be sum, mean or max, got 'min'"),
        ({"mode": "max", "scale_grad_by_freq": True}, InvalidValueError, "not for mode 'max'"),
        ({"padding_idx": 30}, InvalidValueError, r"padding_idx must be in \[-30, 30\)"),
        ({"prune_evry": 3}, InvalidTypeError, "did you mean 'prune_every'"),
        ({"dtype": torch.float16}, InvalidTypeError, "float32, bfloat16 or float64"),
    ],
)  # fmt: skip
def test_bad_constructions(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bag(**options)


def test_config_or_its_fields() -> None:
    config = FIITEDConfig(target_density=1.0)
    assert DynamicEmbedding(5, 8, config=config).store.config is config
    with pytest.raises(InvalidTypeError, match="not both; got config and num_chunks"):
        DynamicEmbedding(5, 8, config=config, num_chunks=2)
    with pytest.raises(InvalidTypeError, match="must be a FIITEDConfig, got dict"):
        DynamicEmbedding(5, 8, config={"target_density": 1.0})


@pytest.mark.parametrize("id_map", ["hash", "exact"])
def test_mapped_ids_may_be_any_integer(id_map: str) -> None:
    ours = bag(id_map=id_map, padding_idx=PADDING, mode="sum")
    ids = torch.tensor([[-(2**62), 2**63 - 1, 10**15]])
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.store.register_optimizer(optimizer)
    outputs = train(ours, optimizer, [(ids,)] * 3)
    assert not torch.equal(outputs[1], outputs[2]), "it learns"
    ours.eval()
    assert torch.equal(ours(ids), ours(ids.flatten(), torch.tensor([0])))
    assert not ours(torch.tensor([[PADDING]])).any()
