"""The definition itself, against `torch.nn.functional.embedding_bag`, autograd and torch.optim."""

import pytest
import torch
from torch.nn.functional import embedding_bag

from mlkit_kernels import dynamic_embedding as kernels
from mlkit_kernels.dynamic_embedding.header import decode, encode, uniform_bits
from mlkit_kernels.dynamic_embedding.reference import reduce_gradients
from tests.kernels.dynamic_embedding.cases import Batch, Storage, make_batch, make_storage, updates


def bags_of_torch(storage: Storage, batch: Batch, weights: list[torch.Tensor]) -> torch.Tensor:
    """The same lookup by one `embedding_bag` for each table."""
    size = len(batch.grad)
    outputs = []
    for t, weight in enumerate(weights):
        if batch.offsets is None:
            edges = torch.arange(len(weights) * size + 1) * batch.bag_size
        else:
            edges = batch.offsets
        start, stop = int(edges[t * size]), int(edges[(t + 1) * size])
        padding = int(storage.tables[t, 2])
        outputs.append(
            embedding_bag(
                batch.indices[start:stop],
                weight,
                edges[t * size : (t + 1) * size] - start,
                mode=batch.mode,
                per_sample_weights=None if batch.weights is None else batch.weights[start:stop],
                padding_idx=padding if padding >= 0 else None,
            )
        )
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("padding", [-1, 1])
@pytest.mark.parametrize("bags", ["ragged", 1, 3])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_forward_and_reduce_are_embedding_bag(density, bags, padding, mode, weighted):
    storage = make_storage(density=density, padding=padding)
    batch = make_batch(storage, bags=bags, weighted=weighted, mode=mode)
    weights = [storage.dense(t).requires_grad_() for t in range(3)]
    expected = bags_of_torch(storage, batch, weights)
    found = kernels.forward(*storage.read, *batch.read, backend="reference")
    torch.testing.assert_close(found, expected)
    expected.backward(batch.grad)
    rows, counts, grads = reduce_gradients(storage.tables, *batch.written)
    dense = torch.zeros(len(storage.header), grads.shape[1])
    dense[rows] = grads
    torch.testing.assert_close(dense, torch.cat([w.grad for w in weights]))
    used = batch.indices[batch.indices != padding] if padding >= 0 else batch.indices
    assert int(counts.sum()) == len(used)
    assert (rows.diff() > 0).all()


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-8)),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fused_optimizers_are_torch_optim(backend, optimizer, make):
    storage = make_storage(density=1.0, optimizer=optimizer, width=5)
    for state in storage.states:
        state.zero_()
    weights = [storage.dense(t).requires_grad_() for t in range(3)]
    peer = make(weights)
    for step in range(4):
        batch = make_batch(storage, batch=12, bags=2, seed=step)
        # Adam of torch moves every row at each step, so every row is read at each.
        for t, (_, rows, _) in enumerate(storage.tables.tolist()):
            batch.indices[24 * t : 24 * t + rows] = torch.arange(rows)
        update = updates(optimizer)
        kernels.backward(*storage.written, *batch.written, update, backend=backend)
        peer.zero_grad()
        bags_of_torch(storage, batch, weights).backward(batch.grad)
        peer.step()
    for t, weight in enumerate(weights):
        torch.testing.assert_close(storage.dense(t), weight.detach(), rtol=2e-5, atol=2e-5)


def test_rowwise_adagrad_by_hand():
    storage = make_storage(rows=(3,), density=0.5, seed=3)
    before = storage.copy()
    batch = make_batch(storage, batch=1, bags=2)
    batch.indices.copy_(torch.tensor([1, 1]))
    kernels.backward(
        *storage.written, *batch.written, updates("rowwise_adagrad"), backend="reference"
    )
    grad = 2 * batch.grad[0]
    old, new = (s.layout.state(s.header, 4) for s in (before, storage))
    torch.testing.assert_close(new[1], old[1] + grad.square().mean())
    assert torch.equal(new[[0, 2]], old[[0, 2]])
    resident = (before.slots()[1] >= 0).repeat_interleave(4)
    expected = before.dense(0)[1] - 0.1 * grad / (new[1].sqrt() + 1e-8) * resident
    torch.testing.assert_close(storage.dense(0)[1], expected)
    utility = [s.layout.utilities(s.header, 4)[1] for s in (before, storage)]
    torch.testing.assert_close(utility[1], utility[0] + 2 * grad.view(4, 4).norm(dim=1))


@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("utility_bytes", [4, 1])
def test_wide_headers_hold_large_addresses(layout, utility_bytes):
    """Whatever the number of chunks: the words of a row are a whole number of addresses."""
    for num_chunks in range(1, 9):
        kind = kernels.HeaderLayout.of(
            layout,
            num_chunks=num_chunks,
            num_slots=1 << 40,
            row_state=True,
            utility_bytes=utility_bytes,
        )
        header = torch.zeros(3, kind.words(num_chunks), dtype=torch.int32)
        slot = (1 << 40) - 9
        if kind.slab:
            addresses = kind.pack(torch.full((3,), slot), torch.ones(3).long(), num_chunks)
        else:
            addresses = torch.full((3, num_chunks), slot)
        kind.addresses(header, num_chunks).copy_(addresses)
        kind.utilities(header, num_chunks).fill_(1)
        kind.state(header, num_chunks).fill_(2.0)
        found = kind.slots(kind.addresses(header, num_chunks), num_chunks)
        assert (found[:, 0] == slot).all()


def test_stochastic_rounding_of_bfloat16_is_right_on_average():
    storage = make_storage(rows=(400,), density=1.0, optimizer="sgd", dtype=torch.bfloat16, width=8)
    storage.pool.fill_(1.0)
    batch = make_batch(storage, batch=400, bags=1)
    batch.indices.copy_(torch.arange(400))
    batch.grad.fill_(2.0**-6)  # times lr: a fifth of the step from 1 to the number below it
    kernels.backward(*storage.written, *batch.written, updates("sgd"), backend="reference")
    values, counts = storage.pool[storage.slots()].float().unique(return_counts=True)
    assert values.tolist() == [1.0 - 2.0**-8, 1.0]
    share = 0.1 * 2.0**-6 / 2.0**-8
    assert abs(float(counts[0] / counts.sum()) - share) < 0.02  # 12800 draws: sd 0.0043


def test_zero_has_code_zero_whatever_the_random_number():
    """Draws with all of their 24 high bits set: the fraction must stay below 1 in float32."""
    number = torch.arange(1 << 24)
    block = 1 << 20
    highest = torch.cat([n[uniform_bits(n, 7) >= 0xFFFFFF00] for n in number.split(block)])
    assert len(highest) > 0
    found = encode(torch.zeros(len(highest), 1), highest.unsqueeze(1), 7, -20)
    assert not found.any()
    assert int(encode(torch.tensor([[3e38]]), number[:1].unsqueeze(1), 7, -20)) == 255


def test_codes_of_utilities():
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8)
    value = decode(codes, -20)
    assert value[0, 0] == 0
    assert value[0, 1] == 2.0**-20
    torch.testing.assert_close(value.flatten()[9], torch.tensor(2.0**-19))
    number = torch.arange(256).view(32, 8)
    again = encode(value, number, 0, -20)
    assert int((again.int() - codes.int()).abs().max()) <= 1
    small = torch.full((1000, 8), 0.3 * 2.0**-20)
    found = encode(small, torch.arange(8000).view(1000, 8), 5, -20).float()
    assert abs(float(found.mean()) - 0.3) < 0.03  # 8000 draws: sd 0.005
