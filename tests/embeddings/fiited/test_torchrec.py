"""TorchRec's types, and FBGEMM's inference kernels; skipped where they are not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mlkit
from mlkit.embeddings import (
    DynamicEmbeddingBag,
    DynamicEmbeddingBagCollection,
    FIITEDConfig,
    to_fbgemm,
)
from mlkit.errors import InvalidTypeError, InvalidValueError

torchrec = pytest.importorskip("torchrec")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Of TorchRec and FBGEMM at import and use.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def configs() -> list[Any]:
    mean = torchrec.PoolingType.MEAN
    make = torchrec.EmbeddingBagConfig
    return [
        make(name="users", num_embeddings=40, embedding_dim=8, feature_names=["user"]),
        make(name="goods", num_embeddings=30, embedding_dim=8, feature_names=["seen", "bought"]),
        make(
            name="tags", num_embeddings=20, embedding_dim=4, feature_names=["tag", "seen"],
            pooling=mean,
        ),
    ]  # fmt: skip


def batch(weights: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (5 * 6,), generator=generator)
    total = int(lengths.sum())
    return torchrec.KeyedJaggedTensor.from_lengths_sync(
        keys=["tag", "user", "other", "bought", "seen"],
        values=torch.randint(0, 20, (total,), generator=generator),
        lengths=lengths,
        weights=torch.rand(total, generator=generator) if weights else None,
    )


def test_it_is_an_embedding_bag_collection() -> None:
    theirs = torchrec.EmbeddingBagCollection(tables=configs())
    ours = DynamicEmbeddingBagCollection(configs(), target_density=1.0, init="normal")
    for name, bag in ours.to_dense().items():
        theirs.embedding_bags[name].weight.data.copy_(bag.weight)
    expected, found = theirs(batch()), ours(batch())
    assert isinstance(found, torchrec.KeyedTensor)
    assert found.keys() == expected.keys()
    assert found.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(found.values(), expected.values(), **CLOSE)
    torch.testing.assert_close(found["seen@tags"], expected["seen@tags"], **CLOSE)
    for output, module in ((found, ours), (expected, theirs)):
        output.values().sin().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    for name, bag in ours.to_dense().items():
        torch.testing.assert_close(bag.weight, theirs.embedding_bags[name].weight, **CLOSE)


def test_weighted_features() -> None:
    tables = configs()[:2]
    theirs = torchrec.EmbeddingBagCollection(tables=tables, is_weighted=True)
    ours = DynamicEmbeddingBagCollection(tables, is_weighted=True, target_density=1.0)
    for name, bag in ours.to_dense().items():
        theirs.embedding_bags[name].weight.data.copy_(bag.weight)
    torch.testing.assert_close(ours(batch(True)).values(), theirs(batch(True)).values(), **CLOSE)


def test_a_collection_of_torchrec_is_converted_in_place() -> None:
    model = torch.nn.Sequential(torchrec.EmbeddingBagCollection(tables=configs()))
    expected = model(batch()).values()
    report = mlkit.convert(model, FIITEDConfig(target_density=1.0))
    assert len(report.replaced) == 3
    torch.testing.assert_close(model(batch()).values(), expected, **CLOSE)
    mlkit.restore(model)
    torch.testing.assert_close(model(batch()).values(), expected, rtol=0, atol=0)


def test_what_is_no_batch() -> None:
    ours = DynamicEmbeddingBagCollection(configs(), target_density=1.0)
    with pytest.raises(InvalidTypeError, match="a mapping or a KeyedJaggedTensor, got list"):
        ours([1])
    ragged = torchrec.KeyedJaggedTensor(
        keys=["user", "seen", "bought", "tag"],
        values=torch.arange(5),
        lengths=torch.tensor([1, 1, 1, 1, 1]),
        stride_per_key_per_rank=[[2], [1], [1], [1]],
    )
    with pytest.raises(InvalidValueError, match=r"one batch size.*\[2, 1, 1, 1\]"):
        ours(ragged)


# ------------------------------------------------------------------------- fbgemm


def pruned(name: str, rows: int, mode: str, seed: int, density: float) -> DynamicEmbeddingBag:
    weight = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))
    return DynamicEmbeddingBag.from_pretrained(
        weight, mode=mode, name=name, num_chunks=1, target_density=density,
        warm_start="magnitude",
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_fbgemm_serves_the_rows_that_are_left(mode: str) -> None:
    pytest.importorskip("fbgemm_gpu")
    bags = [
        pruned("a", 50, mode, 0, 0.4),
        pruned("b", 30, mode, 1, 1.0),
        pruned("c", 9, mode, 2, 0.12),
    ]
    served = to_fbgemm(bags)
    kept = sum(w.numel() for w, _ in served.split_embedding_weights())
    assert kept <= 16 * 4 * (20 + 30 + 1), "rows of 12 numbers, aligned to 16"
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 4, (3, 7), generator=generator)
    ids = [
        torch.randint(0, bag.num_embeddings, (int(n.sum()),), generator=generator)
        for bag, n in zip(bags, lengths, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1).long(), lengths.flatten().cumsum(0)])
    found = served(torch.cat(ids).int(), offsets.int())
    expected = [
        bag(i, torch.cat([torch.zeros(1).long(), n.cumsum(0)[:-1]]))
        for bag, i, n in zip(bags, ids, lengths, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected, 1), **CLOSE)
    single = to_fbgemm(bags[1])
    row = single(torch.tensor([3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    assert torch.equal(row[0], bags[1].dense_weight()[3]), "weights are exact"
