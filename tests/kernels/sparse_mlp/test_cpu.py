"""The C++ kernel against the reference; skipped where it cannot be built."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit_kernels._build import cpu_kernel_failure
from mlkit_kernels.sparse_mlp import available_backends, sparse_mlp, sparse_mlp_reference
from tests.kernels.sparse_mlp.cases import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    KINDS,
    SHAPES,
    make,
    naive,
    relative_error,
)

TOLERANCE = {torch.float32: FP32_TOLERANCE, torch.bfloat16: 2 * BF16_TOLERANCE}
"""Against the reference both results are rounded to bf16, hence twice."""


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if "cpp" not in available_backends():
        pytest.skip(str(cpu_kernel_failure("sparse_mlp")))


def check(case):
    got = sparse_mlp(*case.tensors, **case.options, backend="cpp")
    want = sparse_mlp_reference(*case.tensors, **case.options)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert relative_error(got, want) < TOLERANCE[case.x.dtype]
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_kinds_and_shapes(shape, gated, activation, dtype):
    check(make(*shape, gated=gated, activation=activation, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 20])
def test_tokens_and_sparsities(tokens, sparsity, dtype):
    check(make(tokens, 12, 8, 40, sparsity=sparsity, dtype=dtype, bias=tokens % 2 == 0))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 17),
    experts=st.integers(1, 40),
    size=st.integers(1, 33),
    hidden=st.integers(1, 130),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    sparsity=st.sampled_from([0, 0.3, 0.7, 0.95, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_size(tokens, experts, size, hidden, kind, bias, sparsity, dtype, seed):
    gated, activation = kind
    check(
        make(
            tokens,
            experts,
            size,
            hidden,
            gated=gated,
            activation=activation,
            bias=bias,
            sparsity=sparsity,
            dtype=dtype,
            seed=seed,
        )
    )


def test_bf16_is_as_good_as_fp64_up_to_the_last_rounding():
    case = make(2, 16, 32, 256, dtype=torch.bfloat16)
    got = sparse_mlp(*case.tensors, **case.options, backend="cpp")
    assert relative_error(got, naive(case)) < BF16_TOLERANCE


def test_types_may_differ_between_tokens_router_and_experts():
    case = make(3, 6, 4, 40, dtype=torch.bfloat16)
    case.x, case.router_weight = case.x.float(), case.router_weight.float()
    case.down_bias = case.down_bias.float()
    check(case)
    case = make(3, 6, 4, 40)
    case.x = case.x.bfloat16()
    case.threshold = 0.3 + math.pi * 1e-3
    check(case)


def test_non_contiguous_inputs():
    case = make(4, 6, 4, 40)
    want = sparse_mlp(*case.tensors, **case.options, backend="cpp")

    def scatter(t):
        spread = torch.full((*t.shape[:-1], 2 * t.shape[-1]), math.nan, dtype=t.dtype)
        spread[..., ::2] = t
        return spread[..., ::2]

    strided = case.map(scatter)
    assert not strided.x.is_contiguous()
    assert torch.equal(sparse_mlp(*strided.tensors, **case.options, backend="cpp"), want)
    column_major = case.map(lambda t: t.t().contiguous().t() if t.dim() == 2 else t)
    assert torch.equal(sparse_mlp(*column_major.tensors, **case.options, backend="cpp"), want)
    expanded = case.x[:1].expand(4, -1)
    rows = sparse_mlp(expanded, *case.tensors[1:], **case.options, backend="cpp")
    assert torch.equal(rows, rows[:1].expand(4, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_equal_to_the_threshold_is_off_and_nan_is_off(dtype):
    case = make(1, 4, 2, 4, bias=False, dtype=dtype)
    case.x = torch.tensor([[1.0, 2.0, 0.0, 0.0]], dtype=dtype)
    # logits 0.5 (equal), nan, 0.75 (on), 0.25
    case.router_weight = torch.tensor(
        [[0.5, 0, 0, 0], [math.nan, 0, 0, 0], [0.25, 0.25, 0, 0], [0.25, 0, 0, 0]], dtype=dtype
    )
    case.threshold = 0.5
    got = check(case)
    case.threshold = -math.inf
    only = slice(2, 3)
    want = sparse_mlp_reference(
        case.x,
        case.router_weight[only],
        None,
        case.gate_up[only],
        case.down_t[only],
        threshold=-math.inf,
    )
    assert relative_error(got, want) < TOLERANCE[dtype]


def test_infinite_thresholds():
    case = make(2, 4, 2, 8, sparsity=1)
    assert torch.equal(check(case), case.down_bias.expand(2, -1))
    check(make(2, 4, 2, 8, sparsity=0))


def test_unselected_weights_are_not_used():
    case = make(1, 6, 4, 16, bias=False)
    want = sparse_mlp(*case.tensors, **case.options, backend="cpp")
    logits = case.x @ case.router_weight.t()
    off = ~(logits > case.threshold)[0]
    assert off.any()
    case.gate_up[off] = math.nan
    case.down_t[off] = math.nan
    assert torch.equal(sparse_mlp(*case.tensors, **case.options, backend="cpp"), want)


def test_threads_agree_and_repeat_bit_for_bit():
    case = make(3, 64, 32, 256)
    before = torch.get_num_threads()
    try:
        results = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first = sparse_mlp(*case.tensors, **case.options, backend="cpp")
            again = sparse_mlp(*case.tensors, **case.options, backend="cpp")
            assert torch.equal(first, again)
            results[threads] = first
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        assert relative_error(results[threads], results[1]) < FP32_TOLERANCE


def test_nan_and_inf_in_x_reach_the_result():
    case = make(2, 4, 2, 8, sparsity=0, bias=False)
    case.gate_up_bias = torch.full((4, 4), math.nan)
    got = sparse_mlp(*case.tensors, **case.options, backend="cpp")
    assert got.isnan().all()
    relu = make(1, 2, 2, 8, gated=False, activation="relu", sparsity=0)
    relu.gate_up_bias = torch.full((2, 2), math.nan)
    assert sparse_mlp(*relu.tensors, **relu.options, backend="cpp").isnan().all()


def test_the_library_checks_what_it_is_given():
    case = make(2, 4, 2, 8)
    direct = torch.ops.mlkit.sparse_mlp_cpu.default
    short = (case.x, case.router_weight[:3], *case.tensors[2:])
    with pytest.raises(RuntimeError, match="router_weight has a shape that does not fit"):
        direct(*short, None, 0.0, 0, None)
    with pytest.raises(RuntimeError, match="x must be a CPU tensor of float32 or bfloat16"):
        direct(case.x.double(), *case.tensors[1:], None, 0.0, 0, None)
