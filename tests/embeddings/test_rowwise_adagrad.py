"""Row-wise Adagrad against a loop over rows, and against fbgemm where it is installed."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.embeddings.rowwise_adagrad import RowWiseAdagrad
from mlkit.errors import InvalidTypeError, InvalidValueError


def slow(weight, gradients, lr, eps):
    """One row after the other, in Python floats."""
    rows, sums = [list(map(float, r)) for r in weight], [0.0] * len(weight)
    for gradient in gradients:
        for i, g in enumerate(gradient.tolist()):
            sums[i] += sum(x * x for x in g) / len(g)
            if any(g):
                rows[i] = [
                    w - lr * x / (sums[i] ** 0.5 + eps) for w, x in zip(rows[i], g, strict=True)
                ]
    return torch.tensor(rows), torch.tensor(sums)


def run(weight, gradients, sparse, **keys):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = RowWiseAdagrad([parameter], **keys)
    for gradient in gradients:
        parameter.grad = gradient.to_sparse(1) if sparse else gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 999),
    st.booleans(),
    st.floats(0, 2),
)
def test_formula(rows, dim, steps, seed, sparse, lr):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, dim, generator=generator)
    gradients = []
    for _ in range(steps):
        touched = torch.rand(rows, 1, generator=generator) < 0.5
        gradients.append(torch.randn(rows, dim, generator=generator) * touched)
    expected, sums = slow(weight, gradients, lr, 1e-8)
    found, optimizer = run(weight, gradients, sparse, lr=lr)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    [state] = optimizer.state.values()
    torch.testing.assert_close(state["sum"], sums, rtol=1e-5, atol=1e-6)


def test_duplicates_are_summed_first():
    """Two reads of one row are one gradient: sum, then square."""
    weight = torch.zeros(3, 2)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = RowWiseAdagrad([parameter], lr=1.0, eps=0.0)
    values = torch.tensor([[1.0, 2.0], [3.0, -2.0], [1.0, 1.0]])
    parameter.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 2]]), values, (3, 2), check_invariants=True
    )
    assert not parameter.grad.is_coalesced()
    optimizer.step()
    assert optimizer.state[parameter]["sum"].tolist() == [0.0, 8.0, 1.0]
    expected = torch.tensor([[0.0, 0.0], [-4 / 8**0.5, 0.0], [-1.0, -1.0]])
    torch.testing.assert_close(parameter.detach(), expected)


def test_fbgemm():
    """EXACT_ROWWISE_ADAGRAD of fbgemm's tables, on the CPU."""
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    torch.manual_seed(0)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(20, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        eps=1e-8,
    )
    bag = torch.nn.EmbeddingBag(20, 8, mode="sum", sparse=True)
    with torch.no_grad():
        bag.weight.copy_(table.split_embedding_weights()[0])
    optimizer = RowWiseAdagrad(bag.parameters(), lr=0.1)
    for _ in range(5):
        ids, offsets = torch.randint(0, 20, (12,)), torch.tensor([0, 4, 4, 9])
        target = torch.randn(4, 8)
        optimizer.zero_grad()
        (bag(ids, offsets) * target).sum().backward()
        optimizer.step()
        (table(ids, torch.cat([offsets, torch.tensor([12])])) * target).sum().backward()
    torch.testing.assert_close(table.split_embedding_weights()[0], bag.weight.detach())


def test_half_precision_keeps_its_state_in_fp32():
    weight = torch.ones(4, 3, dtype=torch.bfloat16)
    found, optimizer = run(weight, [torch.full((4, 3), 1e-3, dtype=torch.bfloat16)] * 3, False)
    [state] = optimizer.state.values()
    assert state["sum"].dtype == torch.float32
    assert found.dtype == torch.bfloat16
    gradient = float(torch.tensor(1e-3, dtype=torch.bfloat16))
    torch.testing.assert_close(state["sum"], torch.full((4,), 3 * gradient**2))
    again = RowWiseAdagrad([torch.nn.Parameter(found)])
    again.load_state_dict(optimizer.state_dict())
    [loaded] = again.state.values()
    assert torch.equal(loaded["sum"], state["sum"]), "all bits, of fp32"
    assert loaded["sum"] is not state["sum"]


def test_state_round_trip():
    weight, gradients = torch.randn(5, 3), [torch.randn(5, 3) for _ in range(4)]
    whole, _ = run(weight, gradients, True)
    half, optimizer = run(weight, gradients[:2], True)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    parameter = torch.nn.Parameter(half)
    again = RowWiseAdagrad([parameter])
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for gradient in gradients[2:]:
        parameter.grad = gradient
        again.step()
    torch.testing.assert_close(parameter.detach(), whole)


def test_closure_groups_and_schedule():
    a, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = RowWiseAdagrad([{"params": [a]}, {"params": [b], "lr": 1.0}], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure():
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    schedule.step()
    assert torch.allclose(a, torch.tensor(-0.5))
    assert torch.allclose(b, torch.tensor(-1.0))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_bad_input():
    with pytest.raises(InvalidValueError, match="lr must be at least 0, got -1"):
        RowWiseAdagrad([torch.nn.Parameter(torch.zeros(2, 2))], lr=-1)
    with pytest.raises(InvalidValueError, match="eps must be at least 0, got nan"):
        RowWiseAdagrad([torch.nn.Parameter(torch.zeros(2, 2))], eps=float("nan"))
    with pytest.raises(InvalidValueError, match=r"takes matrices, got a parameter of shape \(3,\)"):
        RowWiseAdagrad([torch.nn.Parameter(torch.zeros(3))])
    parameter = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    optimizer = RowWiseAdagrad([parameter])
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(InvalidTypeError, match="real parameters"):
        optimizer.step()


def test_empty_sparse_gradient():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = RowWiseAdagrad([parameter])
    parameter.grad = torch.sparse_coo_tensor(
        torch.empty(1, 0).long(), torch.empty(0, 2), (3, 2), check_invariants=True
    )
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3, 2))
