"""Every compressed table pools as `nn.EmbeddingBag` does, in all of its forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.embeddings.memory import dense_bytes
from mlkit.errors import InvalidTypeError, InvalidValueError
from tests.embeddings.baselines.makers import BUDGETED, MAKERS, flat, pooled

ROWS, DIM = 53, 6
BAGS = [[3, 3, 52], [], [0], [7, 1, 9, 7, 50], [7, 7]]
WEIGHTS = [[0.5, -2.0, 1.0], [], [3.0], [1.0, 0.0, 2.5, -1.0, 0.25], [1.0, 1.0]]

every = pytest.mark.parametrize("name", MAKERS)


def make(name, budget=0.7, rows=ROWS, dim=DIM, **more):
    torch.manual_seed(0)
    bag = MAKERS[name](rows, dim, memory_budget=budget, **more)
    with torch.no_grad():
        for parameter in bag.parameters():
            parameter.add_(torch.randn_like(parameter))
    return bag


@every
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 7, -1])
@pytest.mark.parametrize("last", [False, True])
def test_offsets_form(name, mode, padding, last):
    bag = make(name, mode=mode, padding_idx=padding, include_last_offset=last)
    ids, offsets = flat(BAGS, last)
    found = bag(ids, offsets)
    real = None if padding is None else padding % ROWS
    expected = pooled(lambda i: bag.rows(torch.tensor([i]))[0], BAGS, None, mode, real, DIM)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # order of sums
    torch.testing.assert_close(bag(ids.int(), offsets.int()), found, rtol=0, atol=0)


@every
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_matrix_form(name, mode):
    bag = make(name, mode=mode, padding_idx=2)
    bags = [[2, 5, 2], [2, 2, 2], [1, 52, 5], [8, 8, 8]]
    expected = pooled(lambda i: bag.rows(torch.tensor([i]))[0], bags, None, mode, 2, DIM)
    torch.testing.assert_close(bag(torch.tensor(bags)), expected, rtol=1e-5, atol=1e-6)
    strided = torch.tensor(bags).T.contiguous().T
    torch.testing.assert_close(bag(strided), expected, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("padding", [None, 7])
def test_weights_and_all_gradients(name, padding):
    """Also the gradient of the weights, against autograd through the slow pooling."""
    bag = make(name, mode="sum", padding_idx=padding)
    ids, offsets = flat(BAGS, False)
    weights = torch.tensor([w for ws in WEIGHTS for w in ws], requires_grad=True)
    found = bag(ids, offsets, per_sample_weights=weights)
    found.square().sum().backward()
    gradients = [p.grad.clone() for p in bag.parameters()]
    own, weights.grad = weights.grad.clone(), None
    bag.zero_grad()
    split = list(torch.split(weights, [len(b) for b in BAGS]))
    slow = pooled(lambda i: bag.rows(torch.tensor([i]))[0], BAGS, split, "sum", padding, DIM)
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)
    slow.square().sum().backward()
    for fast, parameter in zip(gradients, bag.parameters(), strict=True):
        torch.testing.assert_close(fast, parameter.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, weights.grad, rtol=1e-4, atol=1e-4)


@every
def test_sparse_gradients_are_the_dense_ones(name):
    ids, offsets = flat(BAGS, False)
    dense = make(name, mode="mean", padding_idx=7)
    sparse = make(name, mode="mean", padding_idx=7, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for bag in (dense, sparse):
        bag(ids, offsets).square().sum().backward()
    kinds = [p.grad.is_sparse for p in sparse.parameters()]
    assert kinds[0]
    assert all(kinds) or name in ("narrow", "mde"), "only a projection is dense"
    for left, right in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert not left.grad.is_sparse
        torch.testing.assert_close(right.grad.to_dense(), left.grad)


@every
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ],
)
def test_any_optimizer_trains_it(name, optimizer):
    bag = make(name, mode="sum")
    target, ids = torch.randn(20, DIM), torch.randint(0, ROWS, (20, 3))
    chosen = optimizer(bag.parameters())
    losses = []
    for _ in range(30):
        chosen.zero_grad()
        loss = (bag(ids) - target).square().mean()
        loss.backward()
        chosen.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@every
@pytest.mark.parametrize("padding", [None, 5])
def test_to_dense_pools_alike(name, padding, monkeypatch):
    monkeypatch.setattr("mlkit.embeddings.baselines.base.BLOCK", 10)  # 53 rows in six blocks
    bag = make(name, mode="mean", padding_idx=padding, include_last_offset=True, sparse=True)
    stock = bag.eval().to_dense()
    assert type(stock) is torch.nn.EmbeddingBag
    assert (stock.mode, stock.padding_idx, stock.sparse) == ("mean", padding, True)
    assert stock.include_last_offset
    assert not stock.training
    ids, offsets = flat(BAGS, True)
    torch.testing.assert_close(stock(ids, offsets), bag(ids, offsets), rtol=1e-5, atol=1e-6)
    if padding is not None:
        assert not stock.weight[padding].any()


@every
def test_padding_gets_no_gradient(name):
    bag = make(name, mode="sum", padding_idx=4)
    bag(torch.full((3, 2), 4)).sum().backward()
    for parameter in bag.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@every
def test_meta_then_empty_then_reset(name):
    bag = MAKERS[name](ROWS, DIM, memory_budget=0.7, padding_idx=3, device="meta")
    assert all(t.is_meta for t in (*bag.parameters(), *bag.buffers()))
    real = bag.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*real.parameters(), *real.buffers()):
            tensor.fill_(1)  # what an uninitialised block may hold
    real.reset_parameters()
    torch.manual_seed(1)
    ids, offsets = flat(BAGS, False)
    assert real(ids, offsets).isfinite().all()
    assert not real(torch.tensor([[3]])).any()
    fresh = MAKERS[name](ROWS, DIM, memory_budget=0.7, padding_idx=3)
    for left, right in zip(real.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(left, right)


@every
def test_empty_batches(name):
    bag = make(name, mode="mean")
    assert bag(torch.empty(0, 3, dtype=torch.long)).shape == (0, DIM)
    nothing = torch.empty(0, dtype=torch.long)
    assert torch.equal(bag(nothing, torch.zeros(2, dtype=torch.long)), torch.zeros(2, DIM))


@pytest.mark.parametrize("name", BUDGETED)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 400),
    dim=st.integers(1, 33),
    fraction=st.floats(0.01, 1),
    optimizer=st.sampled_from(["sgd", "rowwise_adagrad", "adagrad", "adam"]),
    padding=st.booleans(),
    half=st.booleans(),
)
def test_bytes_never_exceed_the_budget(name, rows, dim, fraction, optimizer, padding, half):
    dtype = torch.bfloat16 if half else torch.float32
    dense = dense_bytes(rows, dim, optimizer, dtype.itemsize)

    def build(budget):
        more = {"optimizer": optimizer, "dtype": dtype, "padding_idx": 0 if padding else None}
        return MAKERS[name](rows, dim, memory_budget=budget, **more)

    try:
        bag = build(fraction)
    except InvalidValueError as error:
        least = int(str(error).split("minimum is ")[1].split()[0].replace(",", ""))
        assert least > int(fraction * dense)
        assert build(least).memory_report().total_bytes <= least
        with pytest.raises(InvalidValueError, match="minimum is"):
            build(least - 1)
        return
    report = bag.memory_report()
    assert report.total_bytes <= fraction * dense
    assert report.dense_bytes == dense
    held = sum(t.numel() * t.element_size() for t in (*bag.parameters(), *bag.buffers()))
    assert report.total_bytes - report.optimizer_bytes == held


@pytest.mark.parametrize("name", BUDGETED)
def test_budgets_in_bytes_and_units(name):
    one, other = make(name, 2048, rows=200), make(name, "2KiB", rows=200)
    assert one.memory_report() == other.memory_report()
    assert 1024 < one.memory_report().total_bytes <= 2048, "most of the budget is used"
    assert "2," in repr(other) or "1," in repr(other)


@every
def test_bad_inputs(name):
    bag = make(name, mode="mean")
    with pytest.raises(InvalidValueError, match="id 53 is outside 0 .. 52"):
        bag(torch.tensor([[53]]))
    with pytest.raises(InvalidValueError, match="id -1 is outside"):
        bag(torch.tensor([[4, -1]]))
    with pytest.raises(InvalidTypeError, match="ids must be int64 or int32, got torch.float32"):
        bag(torch.tensor([[1.0]]))
    with pytest.raises(InvalidValueError, match="per_sample_weights need mode='sum'"):
        bag(torch.tensor([[1]]), per_sample_weights=torch.ones(1, 1))


@every
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"mode": "max"}, "mode must be 'sum' or 'mean', got 'max'"),
        ({"padding_idx": 53}, "padding_idx must be within 53 rows"),
        ({"optimizer": "adagrat"}, "did you mean 'adagrad'"),
        ({"rows": 0}, "num_embeddings must be an integer of at least 1, got 0"),
        ({"dim": 2.5}, "embedding_dim must be an integer of at least 1, got 2.5"),
    ],
)
def test_bad_settings(name, more, match):
    with pytest.raises(InvalidValueError, match=match):
        make(name, **more)


@pytest.mark.parametrize("name", ["hashing", "qr", "narrow", "cafe"])
def test_a_dense_checkpoint_is_refused(name):
    bag = torch.nn.ModuleDict({"table": make(name)})
    with pytest.raises(InvalidValueError, match=r"dense table of 53 x 6 for table, which"):
        bag.load_state_dict({"table.weight": torch.zeros(ROWS, DIM)}, strict=False)


@every
def test_state_round_trip(name):
    one, two = make(name), make(name)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(2)
    two.load_state_dict(one.state_dict())
    ids, offsets = flat(BAGS, False)
    assert torch.equal(one(ids, offsets), two(ids, offsets))
