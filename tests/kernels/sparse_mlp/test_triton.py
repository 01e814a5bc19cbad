"""The Triton kernels: their logic in the interpreter, their code for sm_80 and sm_90, and on a GPU.

The interpreter must be chosen before triton is imported, so `test_in_the_interpreter` runs this
file in a process of its own, where `TestInterpreted` is collected.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlkit.errors import InvalidTypeError, InvalidValueError
from mlkit_kernels.sparse_mlp import available_backends, sparse_mlp, sparse_mlp_reference
from tests.kernels.sparse_mlp.cases import (
    BF16_TOLERANCE,
    FP16_TOLERANCE,
    FP32_TOLERANCE,
    KINDS,
    SHAPES,
    make,
    relative_error,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# both sides round to bf16, and the interpreter cuts off where a GPU rounds: a whole unit, 2^-7
BF16_INTERPRETED = 2.0**-7 + BF16_TOLERANCE
TOLERANCE = {
    torch.float32: FP32_TOLERANCE,
    torch.bfloat16: BF16_INTERPRETED if INTERPRETED else 2 * BF16_TOLERANCE,
    torch.float16: 2 * FP16_TOLERANCE,
}


def check(case):
    got = sparse_mlp(*case.tensors, **case.options, backend="triton")
    want = sparse_mlp_reference(*case.tensors, **case.options)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative_error(got.cpu(), want.cpu()) < TOLERANCE[case.x.dtype]
    return got


@pytest.mark.skipif(INTERPRETED, reason="already there")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("gated", "activation"), KINDS)
    def test_kinds_and_shapes(self, shape, gated, activation):
        check(make(*shape, gated=gated, activation=activation))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_half_types(self, shape, dtype):
        check(make(*shape, dtype=dtype))

    @pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
    def test_tokens_and_sparsities(self, tokens, sparsity):
        check(make(tokens, 12, 8, 40, sparsity=sparsity, bias=tokens % 2 == 0))

    def test_many_experts_and_channels_take_several_blocks(self):
        check(make(1, 1030, 1, 5, sparsity=0.9))  # the list of selected experts in two blocks
        check(make(2, 3, 9, 600))  # several tiles of channels and of neurons

    def test_equal_logit_and_nan_are_off(self):
        case = make(1, 4, 2, 4, bias=False)
        case.x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        case.router_weight = torch.tensor(
            [[0.5, 0, 0, 0], [math.nan, 0, 0, 0], [0.25, 0.25, 0, 0], [0.25, 0, 0, 0]]
        )
        case.threshold = 0.5
        got = check(case)
        case.gate_up[[0, 1, 3]] = math.nan
        case.down_t[[0, 1, 3]] = math.nan
        assert torch.equal(sparse_mlp(*case.tensors, **case.options, backend="triton"), got)

    def test_non_contiguous_inputs_and_no_tokens(self):
        case = make(4, 6, 4, 40)
        want = check(case)
        spread = case.map(lambda t: torch.stack([t, t], -1)[..., 0])
        assert not spread.gate_up.is_contiguous()
        assert torch.equal(check(spread), want)
        case.x = case.x[:0]
        assert check(case).shape == (0, 40)

    def test_gradients_use_the_reference(self):
        case = make(3, 5, 4, 24)
        case.x.requires_grad_()
        (got,) = torch.autograd.grad(
            sparse_mlp(*case.tensors, **case.options, backend="triton").sum(), case.x
        )
        want = torch.autograd.grad(
            sparse_mlp_reference(*case.tensors, **case.options).sum(), case.x
        )
        assert relative_error(got, want[0]) < FP32_TOLERANCE

    def test_limits_are_said(self):
        nine = make(9)
        with pytest.raises(InvalidValueError, match="at most 8 tokens, got 9.*auto"):
            sparse_mlp(*nine.tensors, backend="triton")
        double = make(2, dtype=torch.float64)
        with pytest.raises(InvalidTypeError, match="backend='triton' takes .*float64"):
            sparse_mlp(*double.tensors, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_that_are_not_here(tokens, capability, monkeypatch, tmp_path):
    """Every kernel becomes machine code, with 16-byte loads of the weights."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import mlkit_kernels.sparse_mlp.triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lanes = 4096 // tokens
    half, single, ints = "*bf16", "*fp32", "*i32"
    shared = {"BLOCK_M": tokens, "BIAS": True}
    table = [
        (
            kernels._router_kernel,
            {"x": half, "weight": half, "bias": half, "bits": ints, "threshold": "fp32"},
            {"BLOCK_E": 4, "BLOCK_H": lanes // 4},
        ),
        (
            kernels._gate_up_kernel,
            {"x": half, "weight": half, "bias": half, "bits": ints, "h_out": single}
            | dict.fromkeys(["selected", "count", "arrived"], ints),
            {"GATED": True, "KIND": 2, "BLOCK_R": 8, "BLOCK_H": lanes // 8}
            | {"BLOCK_N": 512, "BLOCK_D": 16},
        ),
        (
            kernels._down_kernel,
            {"h_in": single, "weight": half, "bias": half, "partial": single, "y": half}
            | dict.fromkeys(["selected", "count", "arrived"], ints),
            {"SPLITS": 16, "BLOCK_S": max(1, 2 * lanes // 256), "BLOCK_C": 256},
        ),
    ]
    for kernel, types, own in table:
        constants = {**shared, **own}
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        aligned = [n for n in ("x", "weight", "hidden") if n in names]
        source = ASTSource(
            kernel,
            signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["cubin"]
        assert "v4.b32" in built.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
def test_gpu_equals_the_reference(tokens, sparsity, dtype):
    assert "triton" in available_backends("cuda")
    case = make(tokens, 48, 32, 512, sparsity=sparsity, dtype=dtype).map(lambda t: t.cuda())
    first = check(case)
    assert torch.equal(check(case), first)  # bit for bit, whatever program arrives last


@pytest.mark.gpu
@pytest.mark.parametrize(("gated", "activation"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_kinds_and_shapes(shape, gated, activation):
    check(make(*shape, gated=gated, activation=activation).map(lambda t: t.cuda()))


@pytest.mark.gpu
def test_gpu_graph_follows_new_tokens():
    case = make(2, 48, 32, 512, dtype=torch.bfloat16).map(lambda t: t.cuda())
    check(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_mlp(*case.tensors, **case.options, backend="triton")
    for seed in range(3):
        fresh = make(2, 48, 32, 512, dtype=torch.bfloat16, seed=seed).x
        case.x.copy_(fresh)
        graph.replay()
        assert torch.equal(y, sparse_mlp(*case.tensors, **case.options, backend="triton"))


@pytest.mark.gpu
def test_gpu_auto_and_opcheck():
    case = make(2, 5, 4, 24).map(lambda t: t.cuda())
    got = sparse_mlp(*case.tensors, **case.options)
    want = sparse_mlp(*case.tensors, **case.options, backend="triton")
    assert torch.equal(got, want)
    torch.library.opcheck(
        torch.ops.mlkit.sparse_mlp.default,
        (*case.tensors, None, case.threshold, case.activation, "triton", None),
    )
