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

from mlkit.errors import InvalidTypeError
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


# (tokens, experts, size, hidden), more than 8 tokens
PREFILL_SHAPES = [(16, 4, 32, 64), (9, 1, 1, 1), (17, 3, 1, 17), (33, 7, 3, 37), (70, 5, 40, 150)]


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

    @pytest.mark.parametrize("tokens", [1, 3, 8, 9, 20])
    def test_masks(self, tokens):
        case = make(tokens, 7, 4, 40).masked()
        check(case)
        case.mask = torch.rand(tokens, 7, generator=torch.Generator().manual_seed(1)) < 0.3
        check(case)

    @pytest.mark.parametrize("shape", PREFILL_SHAPES)
    @pytest.mark.parametrize(("gated", "activation"), KINDS)
    def test_prefill_kinds_and_shapes(self, shape, gated, activation):
        check(make(*shape, gated=gated, activation=activation))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", PREFILL_SHAPES)
    def test_prefill_half_types(self, shape, dtype):
        case = make(*shape, dtype=dtype)
        got = sparse_mlp(*case.tensors, **case.options, backend="triton")
        want = sparse_mlp_reference(*case.tensors, **case.options)
        # h is rounded to the weights' type (and cut off there by the interpreter)
        assert relative_error(got, want) < 2 * TOLERANCE[dtype]

    @pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
    @pytest.mark.parametrize("most", [128, 8])
    def test_prefill_sparsities(self, sparsity, most, monkeypatch):
        import mlkit_kernels.sparse_mlp.triton_prefill as prefill

        monkeypatch.setattr(prefill, "TILED_DOWN_TOKENS", most)  # 8: a GEMM for the down projection
        for bias in (True, False):
            check(make(37, 12, 8, 40, sparsity=sparsity, bias=bias))

    def test_prefill_ignores_what_is_not_selected(self):
        case = make(21, 6, 4, 40).masked()
        case.mask[:, 2] = False
        want = check(case)
        case.gate_up[2] = math.nan
        case.down_t[2] = math.nan
        assert torch.equal(sparse_mlp(*case.tensors, **case.options, backend="triton"), want)

    def test_prefill_of_mixed_types(self):
        case = make(19, 6, 4, 40, dtype=torch.bfloat16)
        case.router_weight, case.down_bias = case.router_weight.float(), case.down_bias.float()
        got = sparse_mlp(*case.tensors, **case.options, backend="triton")
        want = sparse_mlp_reference(*case.tensors, **case.options)
        assert relative_error(got, want) < 2 * TOLERANCE[torch.bfloat16]

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
        double = make(2, dtype=torch.float64)
        with pytest.raises(InvalidTypeError, match="backend='triton' takes .*float64"):
            sparse_mlp(*double.tensors, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_that_are_not_here(tokens, capability, monkeypatch, tmp_path):
    """Every kernel becomes machine code, with 16-byte loads of the weights."""
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
        ptx = build(kernel, types, {**shared, **own}, capability)
        assert "v4.b32" in ptx


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_prefill_compiles_for_gpus_that_are_not_here(capability, monkeypatch, tmp_path):
    """Every kernel becomes machine code, with products on tensor cores."""
    import mlkit_kernels.sparse_mlp.triton as decode
    import mlkit_kernels.sparse_mlp.triton_prefill as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    half, byte, ints = "*bf16", "*u8", "*i32"
    lists = dict.fromkeys(["token_list", "token_count", "expert_list", "expert_count"], ints)
    weights = {"x": half, "weight": half, "bias": half, "mask": byte}
    block = {"BIAS": True, "BLOCK_M": 64, "BLOCK_H": 64, "WIDEN": False}
    table = [
        (kernels._route_kernel, {**weights, "threshold": "fp32"}, {**block, "BLOCK_E": 64}),
        (kernels._group_kernel, {"mask": byte, **lists}, {"BLOCK": 256, "BLOCK_M": 16}),
        (
            kernels._gate_up_kernel,
            {**weights, **lists, "h_out": half},
            {**block, "GATED": True, "KIND": 0, "BLOCK_S": 32},
        ),
        (
            kernels._down_kernel,
            {**weights, **lists, "h_in": half, "y": half},
            {"BIAS": True, "BLOCK_M": 16, "BLOCK_S": 32, "BLOCK_C": 128, "WIDEN": False},
        ),
        (decode._mask_kernel, {"mask": byte, "bits": ints}, {"BLOCK_M": 8, "BLOCK_E": 256}),
    ]
    for kernel, types, constants in table:
        ptx = build(kernel, types, constants, capability)
        assert ("mma" in ptx) == ("WIDEN" in constants)


def build(kernel, types, constants, capability):
    """Compile a kernel, its pointers and sizes being multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    return built.asm["ptx"]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [9, 16, 100, 129, 700])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
def test_gpu_prefill_equals_the_reference(tokens, sparsity, dtype):
    case = make(tokens, 48, 32, 512, sparsity=sparsity, dtype=dtype).map(lambda t: t.cuda())
    got = sparse_mlp(*case.tensors, **case.options, backend="triton")
    want = sparse_mlp_reference(*case.tensors, **case.options)
    assert relative_error(got.cpu(), want.cpu()) < 4 * TOLERANCE[dtype]
    again = sparse_mlp(*case.tensors, **case.options, backend="triton")
    assert torch.equal(again, got)


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
