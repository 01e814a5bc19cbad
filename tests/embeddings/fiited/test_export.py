"""Exports: stock modules, and what FBGEMM cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mlkit.embeddings import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    DynamicEmbeddingBagCollection,
    EmbeddingTable,
    to_dense,
    to_fbgemm,
)
from mlkit.errors import InvalidTypeError, InvalidValueError


def test_dense_exports_compute_the_same() -> None:
    weight, ids = torch.randn(20, 8), torch.arange(20).view(5, 4)
    options = {"target_density": 0.4, "warm_start": "magnitude"}
    for cls, stock in ((DynamicEmbedding, nn.Embedding), (DynamicEmbeddingBag, nn.EmbeddingBag)):
        ours = cls.from_pretrained(weight, max_norm=3.0, **options)
        dense = to_dense(ours)
        assert type(dense) is stock
        assert dense.max_norm == 3.0
        torch.testing.assert_close(dense(ids), ours(ids))
    tables = [EmbeddingTable("a", 9, 8, (), "mean"), EmbeddingTable("b", 5, 4)]
    dense = to_dense(DynamicEmbeddingBagCollection(tables, target_density=1.0))
    assert [(k, v.mode, tuple(v.weight.shape)) for k, v in dense.items()] == [
        ("a", "mean", (9, 8)),
        ("b", "sum", (5, 4)),
    ]
    with pytest.raises(InvalidTypeError, match="got Linear; mlkit.restore"):
        to_dense(nn.Linear(2, 2))


def bag(**options: Any) -> DynamicEmbeddingBag:
    options = {"target_density": 1.0, "num_chunks": 1, "mode": "sum", "name": "t"} | options
    return DynamicEmbeddingBag(9, 8, **options)


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        (bag(num_chunks=2), "table 't' must have num_chunks=1, got 2"),
        (bag(mode="max"), "FBGEMM has no mode 'max'"),
        (bag(mode="mean", padding_idx=1), "no mode 'mean' with padding_idx"),
        ([bag(), bag(mode="mean")], r"one mode, got \['sum', 'mean'\]"),
        ([], "bags must be some"),
        (bag(id_map="hash"), "ids of table 't' are hashed"),
        ([nn.Linear(2, 2)], "bags must be DynamicEmbeddingBags, got Linear"),
    ],
)
def test_what_fbgemm_has_not(bags: Any, message: str) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError), match=message):
        to_fbgemm(bags)
