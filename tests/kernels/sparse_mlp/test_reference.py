"""The definition against a loop over neurons, against dense MLPs, and its gradients."""

import doctest
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mlkit_kernels.sparse_mlp import ACTIVATIONS, expert_mask, sparse_mlp_reference
from mlkit_kernels.sparse_mlp.reference import sparse_mlp_backward
from tests.kernels.sparse_mlp.cases import (
    BF16_TOLERANCE,
    FIELDS,
    FP32_TOLERANCE,
    KINDS,
    SHAPES,
    make,
    naive,
    relative_error,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_equals_naive_loop(shape, bias, gated, activation):
    case = make(*shape, gated=gated, activation=activation, bias=bias)
    got = sparse_mlp_reference(*case.tensors, **case.options)
    assert relative_error(got, naive(case)) < FP32_TOLERANCE


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
def test_bf16_equals_naive_loop_on_the_same_numbers(sparsity):
    case = make(4, 9, 8, 40, sparsity=sparsity, dtype=torch.bfloat16)
    got = sparse_mlp_reference(*case.tensors, **case.options)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, naive(case)) < BF16_TOLERANCE


def test_all_on_equals_stock_gated_mlp():
    experts, size, hidden = 5, 4, 24
    gate, up = torch.nn.Linear(hidden, 20), torch.nn.Linear(hidden, 20)
    down = torch.nn.Linear(20, hidden)
    x = torch.randn(6, hidden)
    packed = torch.cat(
        [gate.weight.view(experts, size, hidden), up.weight.view(experts, size, hidden)], 1
    )
    bias = torch.cat([gate.bias.view(experts, size), up.bias.view(experts, size)], 1)
    down_t = down.weight.t().reshape(experts, size, hidden)
    router = torch.randn(experts, hidden)
    got = sparse_mlp_reference(
        x, router, None, packed, down_t, bias, down.bias, threshold=-math.inf
    )
    assert relative_error(got, down(F.silu(gate(x)) * up(x))) < FP32_TOLERANCE


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_all_on_equals_stock_mlp(activation):
    experts, size, hidden = 3, 5, 16
    up, down = torch.nn.Linear(hidden, 15), torch.nn.Linear(15, hidden)
    x = torch.randn(4, hidden)
    got = sparse_mlp_reference(
        x,
        torch.randn(experts, hidden),
        None,
        up.weight.view(experts, size, hidden),
        down.weight.t().reshape(experts, size, hidden),
        up.bias.view(experts, size),
        down.bias,
        threshold=-math.inf,
        activation=activation,
    )
    assert relative_error(got, down(ACTIVATIONS[activation](up(x)))) < FP32_TOLERANCE


def test_zero_selected_gives_the_bias_alone():
    case = make(sparsity=1)
    got = sparse_mlp_reference(*case.tensors, **case.options)
    assert torch.equal(got, case.down_bias.expand_as(got))


def test_mask_is_strict_and_nan_is_off():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[0.25, math.nan], [0.5, 0.0], [0.75, 1.0]])
    # 0 * nan is nan as well, so the first expert is off for both tokens
    want = torch.tensor([[False, False, True], [False, False, True]])
    assert torch.equal(expert_mask(x, weight, threshold=0.5), want)
    assert expert_mask(x[None], weight).shape == (1, 2, 3)


def test_mask_is_monotone_in_the_threshold():
    case = make(8, 16, 1, 32)
    masks = [
        expert_mask(case.x, case.router_weight, case.router_bias, t)
        for t in torch.linspace(-3, 3, 25).tolist()
    ]
    for lower, higher in itertools.pairwise(masks):
        assert not (higher & ~lower).any()


def test_unselected_experts_of_inf_activation_do_not_reach_the_result():
    case = make(1, 4, 2, 8, bias=False)
    mask = expert_mask(case.x, case.router_weight, None, case.threshold)[0]
    want = sparse_mlp_reference(*case.tensors, **case.options)
    case.gate_up[~mask] = math.inf
    assert torch.equal(sparse_mlp_reference(*case.tensors, **case.options), want)


@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_gradcheck(gated, activation):
    case = make(3, 4, 3, 5, gated=gated, activation=activation, dtype=torch.float64, seed=1)
    names = ("x", "gate_up", "down_t", "gate_up_bias", "down_bias")
    inputs = [getattr(case, name).clone().requires_grad_() for name in names]

    def f(*args):
        given = dict(zip(names, args, strict=True))
        return sparse_mlp_reference(
            *(given.get(n, getattr(case, n)) for n in FIELDS), **case.options
        )

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize(("gated", "activation"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_written_backward_equals_autograd_of_the_reference(gated, activation, bias):
    case = make(3, 4, 3, 7, gated=gated, activation=activation, bias=bias, dtype=torch.float64)
    names = ["x", "gate_up", "down_t"] + ["gate_up_bias", "down_bias"] * bias
    inputs = {name: getattr(case, name).requires_grad_() for name in names}
    y = sparse_mlp_reference(*case.tensors, **case.options)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    want = torch.autograd.grad(y, list(inputs.values()), grad)
    with torch.no_grad():
        got = sparse_mlp_backward(grad, *case.tensors[:-1], **case.options)
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", ["reference", "op"])
def test_docstrings_run(module):
    found = importlib.import_module(f"mlkit_kernels.sparse_mlp.{module}")
    result = doctest.testmod(found)
    assert result.attempted
    assert not result.failed
