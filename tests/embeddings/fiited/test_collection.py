"""A collection is its tables one by one: in dictionaries, and in TorchRec's own types."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlkit.embeddings import DynamicEmbeddingBagCollection, EmbeddingTable
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError, UnknownNameError

# Two dimensions, both poolings, two features of one table, one feature of two tables.
TABLES = (
    EmbeddingTable("users", 40, 8, ("user",)),
    EmbeddingTable("items", 30, 8, ("seen", "bought"), "sum"),
    EmbeddingTable("tags", 20, 4, ("tag", "seen"), "mean"),
    EmbeddingTable("cities", 25, 8, ("city",), "mean"),
)
NAMES = ("user", "seen@items", "bought", "tag", "seen@tags", "city")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def collection(**options: Any) -> DynamicEmbeddingBagCollection:
    options = {"target_density": 1.0, "init": "normal"} | options
    return DynamicEmbeddingBagCollection(TABLES, **options)


def features(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 20, shape, generator=generator)

    return {
        "city": (ids(5).int(), torch.tensor([0, 0, 2, 5, 5], dtype=torch.int32)),
        "user": ids(4),
        "seen": (ids(7), torch.tensor([0, 3, 3, 4, 7])),
        "bought": ids(4, 2).t().contiguous().t(),
        "tag": ids(4, 3),
        "unused": ids(9),
    }


def one_by_one(bags: dict[str, nn.EmbeddingBag], batch: dict[str, Any]) -> Tensor:
    parts = []
    for table in TABLES:
        for name in table.feature_names:
            given = batch[name]
            if not isinstance(given, tuple):
                values = given.reshape(len(given), -1)
                given = (
                    values.flatten(),
                    torch.arange(0, values.numel() + 1, values.shape[1]),
                )
            parts.append(bags[table.name](given[0].long(), given[1].long(), *given[2:]))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("sparse", [False, True])
def test_it_trains_as_its_tables_do(layout: str, sparse: bool) -> None:
    ours = collection(layout=layout, sparse=sparse)
    assert ours.embedding_names == NAMES
    bags = ours.to_dense()
    mine = torch.optim.SGD(ours.parameters(), lr=0.1)
    theirs = torch.optim.SGD(nn.ModuleList(bags.values()).parameters(), lr=0.1)
    for step in range(3):
        outputs = []
        both = (ours(features(step)), one_by_one(bags, features(step)))
        for optimizer, found in zip((mine, theirs), both, strict=True):
            optimizer.zero_grad()
            (found * torch.linspace(-1, 2, found.numel()).view_as(found)).sum().backward()
            optimizer.step()
            outputs.append(found.detach())
        torch.testing.assert_close(*outputs, **CLOSE)
    for name, bag in ours.to_dense().items():
        torch.testing.assert_close(bag.weight, bags[name].weight, **CLOSE)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
def test_fused_updates_see_a_row_once(optimizer: str) -> None:
    """A row that two features read gets one update, of the sum of its gradients."""
    tables = [EmbeddingTable("items", 30, 8, ("seen", "bought"))]
    options = {"optimizer": optimizer, "lr": 0.1, "target_density": 1.0}
    two = DynamicEmbeddingBagCollection(tables, **options)
    one = DynamicEmbeddingBagCollection([EmbeddingTable("items", 30, 8, ("all",))], **options)
    seen, bought = torch.tensor([[1, 2], [3, 3]]), torch.tensor([[2, 5], [3, 29]])
    for _ in range(3):
        found = two({"seen": seen, "bought": bought})
        both = one({"all": torch.cat([seen, bought])})
        torch.testing.assert_close(found, torch.cat(both.chunk(2), 1))
        found.sin().sum().backward()
        both.sin().sum().backward()
    store, other = two.stores[0], one.stores[0]
    torch.testing.assert_close(two.to_dense()["items"].weight, one.to_dense()["items"].weight)
    torch.testing.assert_close(store.utilities(slice(0, 30)), other.utilities(slice(0, 30)))


def test_one_kernel_call_for_each_store_and_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.embeddings.fiited import lookup

    calls = []
    forward = lookup.kernels.forward
    monkeypatch.setattr(
        lookup.kernels, "forward", lambda *a, **k: calls.append(len(a[2])) or forward(*a, **k)
    )
    collection()(features())
    assert calls == [3, 2, 1]


def test_weights() -> None:
    tables = [EmbeddingTable("users", 40, 8, ("user", "friend")), EmbeddingTable("tags", 20, 4)]
    ours = DynamicEmbeddingBagCollection(tables, is_weighted=True, target_density=1.0)
    bags = ours.to_dense()
    batch = {
        "user": (torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]), torch.tensor([0.5, -1, 2])),
        "friend": torch.tensor([4, 5]),
        "tags": (torch.tensor([7]), torch.tensor([0, 1, 1]), torch.tensor([3.0])),
    }
    found = ours.split(ours(batch))
    assert list(found) == ["user", "friend", "tags"]
    torch.testing.assert_close(found["user"], bags["users"](*batch["user"]))
    torch.testing.assert_close(found["friend"], bags["users"].weight[4:6])
    torch.testing.assert_close(found["tags"], bags["tags"](*batch["tags"]))


def test_budget_and_empty_batches() -> None:
    ours = collection(target_density=None, memory_budget="2.5KiB", num_chunks=2)
    assert ours.memory_report().total_bytes <= 2560
    assert ours.density == 0
    empty = {name: torch.zeros(0, dtype=torch.int64) for name in features()}
    assert ours(empty).shape == (0, 40)
    none = {name: torch.zeros(2, 0, dtype=torch.int64) for name in features()}
    assert torch.equal(ours(none), torch.zeros(2, 40))


def test_mapped_ids() -> None:
    for id_map in ("hash", "exact"):
        ours = collection(id_map=id_map, sparse=False)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        for store in ours.stores:
            store.register_optimizer(optimizer)
        batch = features() | {"user": torch.tensor([10**12, -5, 10**12, 3])}
        for _ in range(2):
            optimizer.zero_grad()
            ours(batch).sum().backward()
            optimizer.step()
        found = ours.eval().split(ours(batch))["user"]
        assert torch.equal(found[0], found[2])
        assert found.abs().sum(1).min() > 0


def test_compiled_without_break() -> None:
    plain = collection()
    other = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for step in range(2):
        expected, found = plain(features(step)), compiled(features(step))
        torch.testing.assert_close(found, expected, **CLOSE)
        expected.sin().sum().backward()
        found.sin().sum().backward()
    for mine, its in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, **CLOSE)


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"user": torch.tensor([1, 40, 2, 3])}, IndexError, "index 40 .* table 'users'.* 40 rows"),
        ({"bought": torch.full((4, 1), -2)}, IndexError, "index -2 .* table 'items'"),
        ({"user": torch.zeros(4)}, InvalidTypeError, "ids of feature 'user'.*float32"),
        ({"user": torch.arange(3)}, InvalidValueError, "one batch size, got .*'user': 3"),
        (
            {"seen": (torch.arange(4), torch.tensor([0, 1, 2, 3]))}, InvalidValueError,
            r"offsets of feature 'seen' must begin with 0 and end with .* 4 .*got 0 to 3",
        ),
        (
            {"seen": (torch.arange(4), torch.tensor([0, 3, 2, 4, 4]))}, InvalidValueError,
            "offsets must not decrease, got .* items",
        ),
        (
            {"seen": (torch.arange(4), torch.tensor([0, 1, 2, 3, 4]), torch.ones(4))},
            InvalidValueError, "made with is_weighted=True",
        ),
    ],
)  # fmt: skip
def test_bad_batches(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collection()(features() | change)


def test_a_feature_that_is_absent() -> None:
    batch = features()
    batch["users"] = batch.pop("user")
    with pytest.raises(UnknownNameError, match="feature 'user' .* did you mean 'users'"):
        collection()(batch)
    with pytest.raises((RunError, InvalidTypeError), match="list"):
        collection()([torch.arange(3)])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "tables must be some"),
        ([EmbeddingTable("a", 9, 4), EmbeddingTable("a", 9, 8)], "names of their own"),
        ([EmbeddingTable("a", 9, 4, (), "max")], "pooling of table 'a' must be sum or mean"),
        ([EmbeddingTable("a", 9, 4, ("x", "x"))], "table 'a' has a feature twice"),
        ([EmbeddingTable("a", 9, 6)], "num_chunks must divide the embedding dimension 6"),
    ],
)
def test_bad_tables(tables: list[EmbeddingTable], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        DynamicEmbeddingBagCollection(tables, target_density=1.0)
