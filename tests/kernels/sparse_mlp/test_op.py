"""The registered op: checks of PyTorch, compile, gradients, choice of backend, bad input."""

import math

import pytest
import torch

from mlkit.errors import InvalidTypeError, InvalidValueError, MlkitError, RunError
from mlkit_kernels import _build
from mlkit_kernels.sparse_mlp import available_backends, sparse_mlp, sparse_mlp_reference
from mlkit_kernels.sparse_mlp import op as op_module
from tests.kernels.sparse_mlp.cases import FP32_TOLERANCE, KINDS, make, relative_error

BACKENDS = ["auto", "reference", "dense", "cpp"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpp" and "cpp" not in available_backends():
        pytest.skip(str(_build.cpu_kernel_failure("sparse_mlp")))
    return request.param


# opcheck itself looks at the .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, dtype, bias, requires_grad):
    case = make(2, 3, 2, 8, bias=bias, dtype=dtype)
    if requires_grad:
        for tensor in (case.x, case.gate_up, case.down_t, case.gate_up_bias, case.down_bias):
            if tensor is not None:
                tensor.requires_grad_()
    args = (*case.tensors, None, case.threshold, case.activation, backend, None)
    sparse_mlp(*case.tensors, backend=backend)
    torch.library.opcheck(torch.ops.mlkit.sparse_mlp.default, args)


def test_compile_is_one_graph(backend):
    case = make(3, 5, 4, 24)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x):
        return 2 * sparse_mlp(x, *case.tensors[1:], **case.options, backend=backend)

    want = 2 * sparse_mlp_reference(*case.tensors, **case.options)
    assert relative_error(f(case.x), want) < FP32_TOLERANCE
    assert f(case.x.view(1, 3, 24)).shape == (1, 3, 24)


def test_compiled_training_step_has_the_gradients_of_the_reference(backend):
    case = make(3, 5, 4, 24)
    leaves = [case.x, case.gate_up, case.down_t, case.gate_up_bias, case.down_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    compiled = torch.compile(sparse_mlp, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(
        compiled(*case.tensors, **case.options, backend=backend).square().sum(), leaves
    )
    y = sparse_mlp_reference(*case.tensors, **case.options)
    for g, w in zip(got, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        assert relative_error(g, w) < FP32_TOLERANCE


@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_eager_gradients(backend, gated, activation):
    case = make(4, 5, 3, 17, gated=gated, activation=activation)
    leaves = [case.x, case.gate_up, case.down_t, case.gate_up_bias, case.down_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    got = sparse_mlp(*case.tensors, **case.options, backend=backend).sin().sum()
    want = sparse_mlp_reference(*case.tensors, **case.options).sin().sum()
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for g, w in pairs:
        assert relative_error(g, w) < FP32_TOLERANCE


def test_router_gets_no_gradient():
    case = make()
    case.router_weight.requires_grad_()
    case.x.requires_grad_()
    sparse_mlp(*case.tensors, **case.options).sum().backward()
    assert case.router_weight.grad is None
    assert case.x.grad is not None


def test_leading_dimensions_and_no_tokens(backend):
    case = make(6, 5, 4, 24)
    flat = sparse_mlp(*case.tensors, **case.options, backend=backend)
    for shape in [(2, 3, 24), (1, 1, 6, 24)]:
        got = sparse_mlp(case.x.view(shape), *case.tensors[1:], **case.options, backend=backend)
        assert torch.equal(got, flat.view(shape))
    one = sparse_mlp(case.x[0], *case.tensors[1:], **case.options, backend=backend)
    assert one.shape == (24,)
    assert relative_error(one, flat[0]) < FP32_TOLERANCE
    none = sparse_mlp(case.x[:0], *case.tensors[1:], **case.options, backend=backend)
    assert none.shape == (0, 24)


@pytest.mark.parametrize("tokens", [1, 5, 8, 40])
@pytest.mark.parametrize("grad", [True, False])
def test_a_mask_does_what_its_router_would(backend, tokens, grad):
    case = make(tokens, 7, 4, 24)
    masked = case.masked()
    case.x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        got = sparse_mlp(*masked.tensors, **masked.options, backend=backend)
        want = sparse_mlp(*case.tensors, **case.options, backend=backend)
    assert torch.equal(got, want)
    if grad:
        left, right = (torch.autograd.grad(y.square().sum(), case.x)[0] for y in (got, want))
        assert torch.equal(left, right)
    x, mask = case.x.detach().unflatten(0, (1, -1)), masked.mask.unflatten(0, (1, -1))
    shaped = sparse_mlp(x, *masked.tensors[1:], **{**masked.options, "mask": mask}, backend=backend)
    assert torch.equal(shaped, want.unsqueeze(0))


def test_any_mask_is_followed(backend):
    case = make(6, 9, 3, 17).masked()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        case.mask = torch.rand(6, 9, generator=generator) < seed / 4
        got = sparse_mlp(*case.tensors, **case.options, backend=backend)
        want = sparse_mlp_reference(*case.tensors, **case.options)
        assert relative_error(got, want) < FP32_TOLERANCE


def test_compiled_with_a_mask_is_one_graph(backend):
    case = make(3, 5, 4, 24).masked()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x, mask):
        options = {**case.options, "mask": mask}
        return sparse_mlp(x, *case.tensors[1:], **options, backend=backend)

    want = sparse_mlp_reference(*case.tensors, **case.options)
    assert relative_error(f(case.x, case.mask), want) < FP32_TOLERANCE


def test_without_gradients_the_result_is_the_same(backend):
    case = make(6, 5, 4, 24)
    available_backends()
    want = sparse_mlp(*case.tensors, **case.options, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = sparse_mlp(*case.tensors, **case.options, backend=backend)
            third = sparse_mlp(
                case.x.view(2, 3, 24).transpose(0, 1),
                *case.tensors[1:],
                **case.options,
                backend=backend,
            )
        assert torch.equal(got, want)
        assert torch.equal(third, want.view(2, 3, 24).transpose(0, 1))


def test_opcheck_of_the_library():
    if "cpp" not in available_backends():
        pytest.skip(str(_build.cpu_kernel_failure("sparse_mlp")))
    case = make(2, 3, 2, 8)
    torch.library.opcheck(
        torch.ops.mlkit.sparse_mlp_cpu.default,
        (*case.tensors, None, 0.0, 0, None),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_fake_mode_without_gradients():
    available_backends()
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        x, router, up, down = (torch.empty(s) for s in [(2, 8), (3, 8), (3, 4, 8), (3, 2, 8)])
        assert sparse_mlp(x, router, None, up, down).shape == (2, 8)


def test_meta_and_fake_give_shapes_without_weights():
    case = make().map(lambda t: t.to("meta"))
    y = sparse_mlp(*case.tensors)
    assert (y.shape, y.device.type, y.dtype) == (case.x.shape, "meta", case.x.dtype)


def test_other_types_run_on_the_reference():
    case = make().map(lambda t: t.half())
    assert sparse_mlp(*case.tensors, **case.options).dtype == torch.float16
    with pytest.raises(InvalidTypeError, match=r"backend='cpp' takes.*float16.*Cast"):
        sparse_mlp(*case.tensors, **case.options, backend="cpp")


def test_auto_is_dense_past_eight_tokens(monkeypatch):
    calls = []
    real = op_module.sparse_mlp_dense
    monkeypatch.setattr(
        op_module, "sparse_mlp_dense", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    case = make(9)
    sparse_mlp(*case.tensors, **case.options)
    assert calls
    if "cpp" in available_backends():
        del calls[:]
        case = make(8)
        sparse_mlp(*case.tensors, **case.options)
        assert not calls


def test_triton_without_cuda_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make()
    with pytest.raises(RunError, match=r"backend='triton' cannot run: .*CUDA.*got cpu.*auto"):
        sparse_mlp(*case.tensors, backend="triton")


def test_cpp_without_a_compiler_says_why(monkeypatch):
    monkeypatch.setitem(_build._failures, "sparse_mlp", "no C++ compiler: 'c++' does not run")
    monkeypatch.setattr(op_module, "_direct", None)
    case = make()
    with pytest.raises(RunError, match=r"backend='cpp' cannot run: no C\+\+ compiler.*reference"):
        sparse_mlp(*case.tensors, backend="cpp")
    assert available_backends() == ("dense", "reference")


def _without(case, **changes):
    given = {
        "x": case.x,
        "router_weight": case.router_weight,
        "router_bias": case.router_bias,
        "gate_up": case.gate_up,
        "down_t": case.down_t,
        "gate_up_bias": case.gate_up_bias,
        "down_bias": case.down_bias,
    }
    return {**given, **changes}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 23)}, r"x must end in hidden=24.*got \(3, 23\)"),
        ({"down_t": torch.zeros(20, 24)}, r"down_t must have shape .*got \(20, 24\).*transposed"),
        ({"down_t": torch.zeros(0, 4, 24)}, "at least one value"),
        ({"gate_up": torch.zeros(5, 5, 24)}, r"gate_up must have shape \(5, 8, 24\).*\(5, 4, 24\)"),
        ({"gate_up": torch.zeros(4, 8, 24)}, r"gate_up must have shape \(5, 8, 24\)"),
        ({"router_weight": torch.zeros(24, 5)}, r"router_weight must have shape \(5, 24\)"),
        ({"router_bias": torch.zeros(1)}, r"router_bias must have shape \(5,\).*got \(1,\)"),
        ({"gate_up_bias": torch.zeros(5, 4)}, r"gate_up_bias must have shape \(5, 8\)"),
        ({"down_bias": torch.zeros(5)}, r"down_bias must have shape \(24,\)"),
        ({"gate_up": torch.zeros(5, 8, 24, dtype=torch.int8)}, "gate_up must be .*int8.*quantised"),
        ({"down_bias": torch.zeros(24, device="meta")}, "down_bias is on meta but x is on cpu"),
        ({"threshold": math.nan}, r"threshold must be a logit.*got nan.*tau"),
        (
            {"mask": torch.ones(3, 5).bool()},
            "either a router .* or a mask, got router_weight and r",
        ),
        ({"router_weight": None, "router_bias": None}, "or a mask, got neither"),
        (
            {"router_weight": None, "mask": torch.ones(3, 5).bool()},
            "or a mask, got router_bias and mask",
        ),
        (
            {"router_weight": None, "router_bias": None, "mask": torch.ones(3, 4).bool()},
            r"mask must have shape \(3, 5\)",
        ),
        (
            {"router_weight": None, "router_bias": None, "mask": torch.ones(3, 5)},
            r"mask must be of type bool, got torch\.float32",
        ),
        ({"prices": torch.ones(3)}, r"prices must be 66 numbers .*measure_prices.*got .*\(3,\)"),
        ({"activation": "gelu_tan"}, "activation must be one of silu.*'gelu_tan'.*'gelu_tanh'"),
        ({"backend": "cuda"}, "backend must be one of auto, .*'cuda'"),
    ],
)
def test_bad_input_names_the_argument(changes, message, grad):
    available_backends()
    with torch.set_grad_enabled(grad), pytest.raises(MlkitError, match=message) as caught:
        sparse_mlp(**_without(make(), **changes))
    assert isinstance(caught.value, (InvalidValueError, InvalidTypeError))
