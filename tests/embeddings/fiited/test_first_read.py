from __future__ import annotations

import pytest
import torch
from torch import nn

from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, RowWiseAdagrad, TableSpec
from mlkit.embeddings.fiited.initial import initial_values
from mlkit.embeddings.fiited.lookup import lookup

SIZES, DIM, PADDING = (40, 25), 8, 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8),
    "rowwise_adagrad": lambda p: RowWiseAdagrad(p, lr=0.1),
}


def store_and_dense(layout="slab", **settings):
    config = FIITEDConfig(target_density=0.8, layout=layout, lr=0.1, **settings)
    specs = [TableSpec("a", SIZES[0], padding_idx=PADDING), TableSpec("b", SIZES[1])]
    store = DynamicEmbeddingStore(specs, DIM, config)
    values = initial_values(config, store.tables, torch.arange(sum(SIZES)), DIM)
    dense = [
        nn.EmbeddingBag.from_pretrained(part.clone(), freeze=False, mode=mode, padding_idx=pad)
        for part, mode, pad in zip(
            values.split(SIZES), ("mean", "sum"), (PADDING, None), strict=True
        )
    ]
    return store, dense


def batches(steps):
    """Ids of at most 30 of the 40 rows and 15 of the 25: they fit, with partial first sights."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield [torch.randint(high, (6, 4), generator=generator) for high in (30, 15)]


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_room_for_all_that_is_read_training_equals_dense_tables(optimizer, layout):
    store, dense = store_and_dense(layout, optimizer=optimizer, trigger=0.0)
    theirs = OPTIMIZERS[optimizer]([bag.weight for bag in dense])
    weight = torch.linspace(-1, 1, DIM)
    for ids in batches(25):
        outs = [
            lookup(store, x.flatten(), tables=[t], bag_size=4, mode=mode)
            for t, (x, mode) in enumerate(zip(ids, ("mean", "sum"), strict=True))
        ]
        expected = [bag(x) for bag, x in zip(dense, ids, strict=True)]
        torch.testing.assert_close(outs, expected, rtol=1e-5, atol=1e-6)
        for found in (outs, expected):
            sum((out @ weight - 1).square().mean() for out in found).backward()
        store.step()
        theirs.step()
        theirs.zero_grad()
    trained = torch.cat([bag.weight.detach() for bag in dense])
    resident = store.resident(slice(0, None)).all(1)
    assert 30 < int(resident.sum()) < 46
    rows = resident.nonzero().squeeze(1)
    torch.testing.assert_close(store.read(rows), trained[rows], rtol=1e-5, atol=1e-6)


def test_all_passes_of_a_step_read_the_same():
    """Gradients of several batches add up before a step: a row is as new in the last of them."""
    store, _ = store_and_dense()
    ids = torch.tensor([1, 2, 30])
    outs = []
    for _ in range(3):
        outs.append(lookup(store, ids, tables=[0]))
        outs[-1].sum().backward()
    assert outs[0].abs().sum() > 0
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])
    store.step()
    assert torch.equal(lookup(store, ids, tables=[0]), outs[0])


def test_offsets_weights_and_all_tables_at_once():
    store, dense = store_and_dense(optimizer="sgd")
    ids = torch.tensor([1, PADDING, 2, 2, 7, 1, 1, 9])
    offsets = torch.tensor([0, 3, 3, 5, 5, 6, 8])  # three bags of each table
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.0, 4.0, 0.25, 1.5])
    for mode, factor in (("sum", weights), ("sum", None), ("mean", None)):
        found = lookup(store, ids, offsets, factor, mode=mode)
        parts = []
        for bag, (low, high), begin in zip(
            dense, ((0, 5), (5, 8)), (offsets[:3], offsets[3:6]), strict=True
        ):
            parts.append(
                nn.functional.embedding_bag(
                    ids[low:high],
                    bag.weight,
                    begin - low,
                    mode=mode,
                    per_sample_weights=None if factor is None else factor[low:high],
                    padding_idx=bag.padding_idx,
                )
            )
        torch.testing.assert_close(found, torch.cat(parts, 1))


def test_zeros_where_it_is_off_in_evaluation_and_without_room():
    ids = torch.arange(5)
    store, _ = store_and_dense(first_read="zeros")
    assert not lookup(store, ids, tables=[1]).any()
    store, _ = store_and_dense()
    assert lookup(store, ids, tables=[1]).any()
    assert not lookup(store.eval(), ids, tables=[1]).any()
    config = FIITEDConfig(target_density=0.05, optimizer="sgd", num_chunks=1)
    full = DynamicEmbeddingStore([TableSpec("a", 40)], DIM, config)
    lookup(full, torch.arange(2)).sum().backward()
    full.step()
    assert full.num_resident == full.target
    assert not lookup(full, torch.tensor([9, 30])).any()
