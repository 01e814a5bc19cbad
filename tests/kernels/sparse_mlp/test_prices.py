"""The choice between reading the selected experts and a dense GEMM."""

import pytest
import torch

from mlkit.errors import InvalidValueError, RunError
from mlkit_kernels import _build
from mlkit_kernels.sparse_mlp import (
    available_backends,
    break_even_fraction,
    measure_prices,
    sparse_mlp,
    sparse_mlp_reference,
)
from mlkit_kernels.sparse_mlp.arguments import NUM_PRICES, TILE
from mlkit_kernels.sparse_mlp.prices import _views
from tests.kernels.sparse_mlp.cases import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    KINDS,
    SHAPES,
    make,
    relative_error,
)


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if "cpp" not in available_backends():
        pytest.skip(str(_build.cpu_kernel_failure("sparse_mlp")))


def prices(expert=1.0, dense=0.0, more=0.0, nothing=0.0):
    return torch.tensor([nothing, *[expert] * TILE, *[dense] * TILE, more], dtype=torch.float64)


def is_dense(case, price):
    """Only a dense GEMM reads the down projection of an expert that nobody selected."""
    off = ~case.mask.any(0)
    assert off.any()
    poisoned = case.map(lambda t: t)
    poisoned.down_t = case.down_t.clone()
    poisoned.down_t[off] = torch.nan
    y = sparse_mlp(*poisoned.tensors, **poisoned.options, prices=price)
    assert y.isnan().all() or y.isfinite().all()
    return bool(y.isnan().all())


# The dense form rounds its intermediate values to the weights' type: each of three roundings of
# bf16 is 2^-9 of a value that may be some times larger than the result.
TOLERANCE = {torch.float32: FP32_TOLERANCE, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES[2:], (1, 4, 32, 64), (33, 5, 3, 20), (70, 6, 16, 32)])
@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_dense_inside_the_kernel(shape, gated, activation, dtype):
    case = make(*shape, gated=gated, activation=activation, dtype=dtype)
    want = sparse_mlp_reference(*case.tensors, **case.options)
    for other in (case, case.masked()):
        got = sparse_mlp(*other.tensors, **other.options, prices=prices())
        assert relative_error(got, want) < TOLERANCE[dtype]
        sparse = sparse_mlp(*other.tensors, **other.options, prices=prices(expert=-1.0))
        assert relative_error(sparse, want) < TOLERANCE[dtype]


def test_mixed_types_in_the_dense_form():
    case = make(20, 6, 4, 40, dtype=torch.bfloat16)
    case.x, case.down_bias = case.x.float(), case.down_bias.float()
    want = sparse_mlp_reference(*case.tensors, **case.options)
    got = sparse_mlp(*case.tensors, **case.options, prices=prices())
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 4 * BF16_TOLERANCE  # x is rounded to the weights' type
    case = make(20, 6, 4, 40)
    case.x = case.x.bfloat16()
    want = sparse_mlp_reference(*case.tensors, **case.options)
    got = sparse_mlp(*case.tensors, **case.options, prices=prices())
    assert relative_error(got, want) < 2 * BF16_TOLERANCE


def test_dense_is_taken_when_the_selected_experts_cost_more():
    case = make(3, 10, 2, 8).masked()
    case.mask = torch.zeros(3, 10, dtype=torch.bool)
    case.mask[0, :4] = case.mask[1, 2:6] = True  # 6 experts: two for 2 tokens, four for 1
    price = prices()
    price[1], price[2], price[0] = 1.0, 2.5, 0.5  # 0.5 + 4 x 1 + 2 x 2.5 = 9.5
    for dense, expected in ((9.4, True), (9.6, False)):
        price[TILE + 3] = dense
        assert is_dense(case, price) == expected
    assert not is_dense(case, None)


def test_dense_and_sparse_past_one_tile():
    case = make(TILE + 10, 6, 2, 8).masked()
    case.mask = torch.zeros(TILE + 10, 6, dtype=torch.bool)
    case.mask[0, :3] = case.mask[-1, :3] = True  # two tiles, three experts in each, by one token
    price = prices(expert=9.0, more=0.1)
    price[1] = 1.0
    for dense, expected in ((4.9, True), (5.1, False)):  # and 10 tokens more at 0.1
        price[2 * TILE] = dense
        assert is_dense(case, price) == expected


def test_backend_cpp_is_never_dense():
    case = make(2, 6, 2, 8).masked()
    case.mask[:, 0] = False
    case.down_t[0] = torch.nan
    y = sparse_mlp(*case.tensors, **case.options, backend="cpp", prices=prices())
    assert y.isfinite().all()
    with torch.no_grad():
        y = sparse_mlp(*case.tensors, **case.options, backend="cpp", prices=prices())
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_prices_are_times(dtype):
    layers = [(torch.zeros(9, 8, 32, dtype=dtype), torch.zeros(9, 4, 32, dtype=dtype))] * 2
    price = measure_prices(layers, seconds=0.01)
    assert (price.shape, price.dtype) == ((NUM_PRICES,), torch.float64)
    assert price.isfinite().all()
    assert (price[: 2 * TILE] >= 0).all()
    assert (price[TILE + 1 : 2 * TILE + 1] > 0).all()
    case = make(3, 9, 4, 32, dtype=dtype)
    y = sparse_mlp(*case.tensors, **case.options, prices=price)
    want = sparse_mlp_reference(*case.tensors, **case.options)
    assert relative_error(y, want) < TOLERANCE[dtype]


def test_a_large_layer_is_measured_in_parts():
    gate_up, down_t = torch.zeros(40, 64, 8192), torch.zeros(40, 32, 8192)  # 126 MB
    views = _views([(gate_up, down_t)])
    assert len(views) == 4
    assert {tuple(g.shape) for g, _ in views} == {(10, 64, 8192)}
    assert views[1][1].data_ptr() == down_t[10].data_ptr()


def test_break_even():
    price = prices(expert=2.0, dense=11.0, nothing=1.0)
    assert break_even_fraction(price, 1, 4) == 1.0
    assert break_even_fraction(price, 4, 10) == 0.5
    assert break_even_fraction(prices(nothing=3.0), 1, 10) == 0.0


def test_nothing_to_measure(monkeypatch):
    with pytest.raises(InvalidValueError, match="at least one pair"):
        measure_prices([])
    monkeypatch.setitem(_build._failures, "sparse_mlp", "no C++ compiler")
    with pytest.raises(RunError, match="nothing to measure: no C\\+\\+ compiler"):
        measure_prices([(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2))])
