"""The op `mlkit::sparse_mlp`: registration, choice of the backend, and checks of the arguments.

The op's schema takes tokens as a matrix; `sparse_mlp` accepts any leading dimensions. The choice
of the backend is made inside the op, so that `torch.compile` sees one opaque call.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlkit.errors import InvalidTypeError, InvalidValueError, RunError, nearest
from mlkit_kernels._build import cpu_kernel_failure, load_cpu_kernel
from mlkit_kernels.sparse_mlp.reference import (
    ACTIVATIONS,
    sparse_mlp_backward,
    sparse_mlp_reference,
)

__all__ = ["BACKENDS", "MAX_DECODE_TOKENS", "available_backends", "sparse_mlp"]

BACKENDS = ("auto", "reference", "cpp", "triton")
MAX_DECODE_TOKENS = 8
"""Tokens up to which `auto` takes a decode kernel; past them one reads nearly all experts."""

_SOURCES = (Path(__file__).with_name("cpu.cpp"),)
_CODES = {name: code for code, name in enumerate(("silu", "gelu", "gelu_tanh", "relu"))}
_CPP_TYPES = (torch.float32, torch.bfloat16)
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


# `torch.library.custom_op` would do the same with some 30 microseconds more for each call, a tenth
# of what a layer of bf16 at 95 % sparsity takes.
_library = torch.library.Library("mlkit", "FRAGMENT")
_library.define(
    "sparse_mlp(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor gate_up, "
    "Tensor down_t, Tensor? gate_up_bias, Tensor? down_bias, float threshold, str activation, "
    "str backend) -> Tensor"
)

_direct: Callable[..., Tensor] | None = None
"""The C++ op once it is loaded: what `sparse_mlp` calls where nothing needs the outer op."""


def _cpp_loads() -> bool:
    global _direct
    loaded = load_cpu_kernel("sparse_mlp", _SOURCES)
    if loaded and _direct is None:
        torch.library.register_fake("mlkit::sparse_mlp_cpu", _fake, lib=_library)
        _direct = torch.ops.mlkit.sparse_mlp_cpu.default
    return loaded


def _triton_refusal(device: torch.device) -> str | None:
    """Return why the Triton kernel cannot run on `device`, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it needs tensors on a CUDA device, got {device} (or TRITON_INTERPRET=1 for tests)"
    try:
        import triton  # noqa: F401 (only to see whether it is installed)
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    return None


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the backends that run for tensors on `device`, the fastest for decode first.

    This builds the C++ kernel if that has not happened yet.

    Example:
        >>> available_backends("meta")
        ('reference',)
    """
    device = torch.device(device)
    found = ["reference"]
    if device.type == "cpu" and _cpp_loads():
        found.insert(0, "cpp")
    if device.type == "cuda" and _triton_refusal(device) is None:
        found.insert(0, "triton")
    return tuple(found)


def _is_decode(x: Tensor) -> bool:
    return x.dim() > 0 and x.numel() <= MAX_DECODE_TOKENS * x.shape[-1]


def _types_fit(tensors: tuple[Tensor | None, ...], allowed: tuple[torch.dtype, ...]) -> bool:
    return all(t is None or t.dtype in allowed for t in tensors)


def _resolve(backend: str, tensors: tuple[Tensor | None, ...], x: Tensor, same_type: bool) -> str:
    """Return the backend that runs, for a name that the caller gave."""
    if backend == "reference":
        return backend
    if backend == "auto":
        if not same_type or not _is_decode(x):
            return "reference"
        if x.device.type == "cpu":
            return "cpp" if _types_fit(tensors, _CPP_TYPES) and _cpp_loads() else "reference"
        if x.device.type == "cuda" and _types_fit(tensors, _TRITON_TYPES):
            return "triton" if _triton_refusal(x.device) is None else "reference"
        return "reference"
    allowed = _CPP_TYPES if backend == "cpp" else _TRITON_TYPES
    if not _types_fit(tensors, allowed) or not same_type:
        got = ", ".join(sorted({str(t.dtype) for t in tensors if t is not None}))
        raise InvalidTypeError(
            f"backend={backend!r} takes {', '.join(map(str, allowed))}, with gate_up and down_t "
            f"of one type; got {got}. Cast the tensors or use backend='reference'."
        )
    if backend == "cpp":
        if x.device.type != "cpu":
            raise InvalidValueError(
                f"backend='cpp' needs CPU tensors, got {x.device}; use backend='triton' or 'auto'."
            )
        if not _cpp_loads():
            raise RunError(
                f"backend='cpp' cannot run: {cpu_kernel_failure('sparse_mlp')}. "
                "Use backend='auto' or 'reference'."
            )
        return backend
    refusal = _triton_refusal(x.device)
    if refusal is not None:
        raise RunError(f"backend='triton' cannot run: {refusal}. Use backend='auto'.")
    if x.shape[0] > MAX_DECODE_TOKENS:
        raise InvalidValueError(
            f"backend='triton' takes at most {MAX_DECODE_TOKENS} tokens, got {x.shape[0]}; "
            "use backend='auto', or a dense masked GEMM for a prompt."
        )
    return backend


def _forward(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    gate_up: Tensor,
    down_t: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    threshold: float,
    activation: str,
    backend: str,
) -> Tensor:
    tensors = (x, router_weight, router_bias, gate_up, down_t, gate_up_bias, down_bias)
    chosen = _resolve(backend, tensors, x, gate_up.dtype == down_t.dtype)
    if chosen == "cpp":
        return torch.ops.mlkit.sparse_mlp_cpu.default(*tensors, threshold, _CODES[activation])
    if chosen == "triton":
        from mlkit_kernels.sparse_mlp.triton import sparse_mlp_triton

        return sparse_mlp_triton(*tensors, threshold=threshold, activation=activation)
    return sparse_mlp_reference(*tensors, threshold=threshold, activation=activation)


def _fake(x: Tensor, *others: object) -> Tensor:
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            raise InvalidValueError(
                f"sparse_mlp needs all tensors on one device, got {x.device} and {other.device}."
            )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.threshold, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *inputs, down_bias = tensors
    grads = sparse_mlp_backward(
        grad,
        *inputs,
        threshold=ctx.threshold,
        activation=ctx.activation,
    )
    dx, d_gate_up, d_down, d_bias, d_down_bias = grads
    gate_up_bias = inputs[-1]
    return (
        dx,
        None,  # the router's decision has no derivative
        None,
        d_gate_up,
        d_down,
        None if gate_up_bias is None else d_bias.to(gate_up_bias.dtype),
        None if down_bias is None else d_down_bias.to(down_bias.dtype),
        None,
        None,
        None,
    )


_library.impl("sparse_mlp", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("mlkit::sparse_mlp", _fake, lib=_library)
torch.library.register_autograd(
    "mlkit::sparse_mlp", _backward, setup_context=_setup_context, lib=_library
)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InvalidValueError(
            f"{name} must have shape {shape} ({meaning}), got {tuple(tensor.shape)}."
        )


def _check(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    gate_up: Tensor,
    down_t: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    threshold: float,
    activation: str,
    backend: str,
) -> None:
    if down_t.dim() != 3:
        raise InvalidValueError(
            "down_t must have shape (experts, neurons per expert, hidden), "
            f"got {tuple(down_t.shape)}; it is the down projection's weight, transposed."
        )
    experts, size, hidden = down_t.shape
    if experts == 0 or size == 0 or hidden == 0:
        raise InvalidValueError(f"down_t must hold at least one value, got {tuple(down_t.shape)}.")
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise InvalidValueError(
            f"x must end in hidden={hidden} (the last dimension of down_t), got {tuple(x.shape)}."
        )
    if gate_up.dim() != 3 or gate_up.shape[1] not in (size, 2 * size):
        raise InvalidValueError(
            f"gate_up must have shape ({experts}, {2 * size}, {hidden}) for a gated MLP or "
            f"({experts}, {size}, {hidden}) without a gate, got {tuple(gate_up.shape)}."
        )
    rows = gate_up.shape[1]
    _expect("gate_up", gate_up, (experts, rows, hidden), "experts, rows, hidden")
    _expect("router_weight", router_weight, (experts, hidden), "experts, hidden")
    if router_bias is not None:
        _expect("router_bias", router_bias, (experts,), "experts")
    if gate_up_bias is not None:
        _expect("gate_up_bias", gate_up_bias, (experts, rows), "experts, rows of gate_up")
    if down_bias is not None:
        _expect("down_bias", down_bias, (hidden,), "hidden")
    for name, tensor in (
        ("x", x),
        ("router_weight", router_weight),
        ("router_bias", router_bias),
        ("gate_up", gate_up),
        ("down_t", down_t),
        ("gate_up_bias", gate_up_bias),
        ("down_bias", down_bias),
    ):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise InvalidTypeError(
                f"{name} must be of a floating-point type, got {tensor.dtype}; "
                "quantised weights must be dequantised first."
            )
        if tensor.device != x.device:
            raise InvalidValueError(
                f"{name} is on {tensor.device} but x is on {x.device}; move one to the other."
            )
    if math.isnan(threshold):
        raise InvalidValueError(
            "threshold must be a logit (a number, inf or -inf), got nan; "
            "for a score tau in (0, 1) pass log(tau / (1 - tau))."
        )
    if activation not in ACTIVATIONS:
        raise InvalidValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
            f"{nearest(str(activation), ACTIVATIONS)}"
        )
    if backend not in BACKENDS:
        raise InvalidValueError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; "
            f"{nearest(str(backend), BACKENDS)}"
        )


def sparse_mlp(
    x: Float[Tensor, "*batch hidden"],
    router_weight: Float[Tensor, "experts hidden"],
    router_bias: Float[Tensor, " experts"] | None,
    gate_up: Float[Tensor, "experts rows hidden"],
    down_t: Float[Tensor, "experts size hidden"],
    gate_up_bias: Float[Tensor, "experts rows"] | None = None,
    down_bias: Float[Tensor, " hidden"] | None = None,
    *,
    threshold: float = 0.0,
    activation: str = "silu",
    backend: str = "auto",
) -> Float[Tensor, "*batch hidden"]:
    r"""Compute an MLP of which each token runs only the experts that its router selects.

    $$y = b_{down} + \sum_{i:\ x w_i + b_i > t}
    \left(act(G_i x + b_{g,i}) \odot (U_i x + b_{u,i})\right)^T D_i$$

    without the factor of $U$ where there is no gate; `reference.py` is the definition.

    Layout: N experts of S neurons and H hidden channels; `gate_up` [N, 2 S, H] holds for each
    expert the S rows of the gate, then the S rows of up ([N, S, H]: up alone, no gate); `down_t`
    [N, S, H] holds the down projection transposed, so that a neuron is one row in each.

    Cost for one token with a fraction s of the experts skipped, b bytes a weight: bytes read
    (N H + 3 N S H (1 - s)) b, twice that in FLOPs per weight; 2 instead of 3 without a gate. The
    gain over the dense MLP is therefore at most 1 / (1 - s + 1 / (3 S)). Several tokens read the
    union of their experts once.

    Limits: `cpp` takes float32 and bfloat16 on CPU, tokens in tiles of 8, any N, S, H; `triton`
    float32, bfloat16 and float16 on CUDA, at most 8 tokens, N at most 65536; `gate_up` and
    `down_t` must have one type, x, the router and the biases may have others. `reference` takes
    any floating-point type and any number of tokens, and reads all weights. All sums are fp32
    (fp64 in the reference where x is fp64); the result has the type of x. Gradients flow to x, the
    experts and their biases (by the reference's formula); the router gets none.

    Args:
        x: Tokens; any leading dimensions, zero tokens included.
        router_weight: One row per expert.
        router_bias: One number per expert, or None.
        gate_up: See the layout.
        down_t: See the layout.
        gate_up_bias: Bias of the rows of `gate_up`.
        down_bias: Added once for each token, also where no expert is selected.
        threshold: The logit that a router's output must exceed (equal is off, NaN is off):
            log(tau / (1 - tau)) for the paper's tau; -inf runs all experts, inf none.
        activation: `silu`, `gelu`, `gelu_tanh` or `relu`.
        backend: `auto` takes the decode kernel of x's device for at most 8 tokens, if it can be
            had, else the reference; the others insist.

    Raises:
        InvalidValueError: If shapes, devices, `threshold` or a name do not fit.
        InvalidTypeError: If a type is not one that the backend takes.
        RunError: If the backend that was asked for cannot run here; the message says why.

    Example:
        >>> x, weight = torch.ones(1, 4), torch.ones(2, 3, 4)
        >>> router = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])  # the first expert runs
        >>> sparse_mlp(x, router, None, weight, weight, activation="relu", backend="reference")
        tensor([[12., 12., 12., 12.]])
    """
    if (
        _direct is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and (backend == "cpp" or (backend == "auto" and _is_decode(x)))
    ):
        # Caches are cold when a layer's turn comes: the checks and the outer op, 15 microseconds
        # in a loop, cost 100 there. The library checks what it reads; should it refuse, the lines
        # below say why in the terms of this function, or run the reference.
        with contextlib.suppress(RuntimeError, KeyError, InvalidValueError):
            return _direct(
                x,
                router_weight,
                router_bias,
                gate_up,
                down_t,
                gate_up_bias,
                down_bias,
                threshold,
                _CODES[activation],
            )
    _check(
        x,
        router_weight,
        router_bias,
        gate_up,
        down_t,
        gate_up_bias,
        down_bias,
        threshold,
        activation,
        backend,
    )
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = torch.ops.mlkit.sparse_mlp.default(
        tokens,
        router_weight,
        router_bias,
        gate_up,
        down_t,
        gate_up_bias,
        down_bias,
        threshold,
        activation,
        backend,
    )
    return y if x.dim() == 2 else y.view(x.shape)
