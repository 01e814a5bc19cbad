"""The op `mlkit::sparse_mlp`: registration, choice of the backend, and checks of the arguments.

The op's schema takes tokens as a matrix; `sparse_mlp` accepts any leading dimensions. The choice
of the backend is made inside the op, so that `torch.compile` sees one opaque call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlkit.errors import InvalidTypeError, InvalidValueError, RunError
from mlkit_kernels._build import cpu_kernel_failure, load_cpu_kernel
from mlkit_kernels.sparse_mlp.arguments import BACKENDS, check_arguments
from mlkit_kernels.sparse_mlp.dense import sparse_mlp_dense
from mlkit_kernels.sparse_mlp.reference import (
    ACTIVATIONS,
    sparse_mlp_backward,
    sparse_mlp_reference,
)

__all__ = ["BACKENDS", "MAX_DECODE_TOKENS", "available_backends", "sparse_mlp"]

MAX_DECODE_TOKENS = 8
"""Tokens up to which `auto` takes a decode kernel; past them one reads nearly all experts."""

_SOURCES = (Path(__file__).with_name("cpu.cpp"),)
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("cpu_rows.h", "cpu_vector.h"))
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
"""Numbers of the activations in the compiled kernels, in the order of the table."""
_CPP_TYPES = (torch.float32, torch.bfloat16)
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


# `torch.library.custom_op` would do the same with some 30 microseconds more for each call, a tenth
# of what a layer of bf16 at 95 % sparsity takes.
_library = torch.library.Library("mlkit", "FRAGMENT")
_library.define(
    "sparse_mlp(Tensor x, Tensor? router_weight, Tensor? router_bias, Tensor gate_up, "
    "Tensor down_t, Tensor? gate_up_bias, Tensor? down_bias, Tensor? mask, float threshold, "
    "str activation, str backend, Tensor? prices) -> Tensor"
)

_direct: Callable[..., Tensor] | None = None
"""The C++ op once it is loaded: what `sparse_mlp` calls where nothing needs the outer op."""


def _cpp_loads() -> bool:
    global _direct
    loaded = load_cpu_kernel("sparse_mlp", _SOURCES, _HEADERS)
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
        ('dense', 'reference')
    """
    device = torch.device(device)
    found = ["dense", "reference"]
    if device.type == "cpu" and _cpp_loads():
        found.insert(0, "cpp")
    if device.type == "cuda" and _triton_refusal(device) is None:
        found.insert(0, "triton")
    return tuple(found)


def _is_decode(x: Tensor) -> bool:
    return x.dim() > 0 and x.numel() <= MAX_DECODE_TOKENS * x.shape[-1]


def _types_fit(tensors: tuple[Tensor | None, ...], allowed: tuple[torch.dtype, ...]) -> bool:
    return all(t is None or t.dtype in allowed for t in tensors)


def _resolve(
    backend: str,
    tensors: tuple[Tensor | None, ...],
    x: Tensor,
    same_type: bool,
    has_prices: bool,
) -> str:
    """Return the backend that runs, for a name that the caller gave."""
    if backend == "reference":
        return backend
    if backend == "auto":
        if not same_type:
            return "reference"
        device = x.device.type
        if device == "cpu" and (_is_decode(x) or has_prices):
            return "cpp" if _types_fit(tensors, _CPP_TYPES) and _cpp_loads() else "dense"
        if device == "cuda" and _is_decode(x) and _types_fit(tensors, _TRITON_TYPES):
            return "triton" if _triton_refusal(x.device) is None else "dense"
        return "dense"
    if backend == "dense" and same_type:
        return backend
    allowed = _CPP_TYPES if backend == "cpp" else _TRITON_TYPES
    if not _types_fit(tensors, allowed) or not same_type:
        got = ", ".join(sorted({str(t.dtype) for t in tensors if t is not None}))
        taken = "any types" if backend == "dense" else ", ".join(map(str, allowed))
        raise InvalidTypeError(
            f"backend={backend!r} takes {taken}, with gate_up and down_t "
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
    return backend


def _forward(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gate_up: Tensor,
    down_t: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    mask: Tensor | None,
    threshold: float,
    activation: str,
    backend: str,
    prices: Tensor | None,
) -> Tensor:
    tensors = (x, router_weight, router_bias, gate_up, down_t, gate_up_bias, down_bias)
    chosen = _resolve(backend, tensors, x, gate_up.dtype == down_t.dtype, prices is not None)
    if chosen == "cpp":
        if backend == "cpp":
            prices = None
        code = _CODES[activation]
        return torch.ops.mlkit.sparse_mlp_cpu.default(*tensors, mask, threshold, code, prices)
    options: dict[str, Any] = {"mask": mask, "threshold": threshold, "activation": activation}
    if chosen == "triton":
        if _is_decode(x):
            from mlkit_kernels.sparse_mlp.triton import sparse_mlp_triton

            return sparse_mlp_triton(*tensors, **options)
        from mlkit_kernels.sparse_mlp.triton_prefill import sparse_mlp_prefill

        return sparse_mlp_prefill(*tensors, **options)
    run = sparse_mlp_dense if chosen == "dense" else sparse_mlp_reference
    return run(*tensors, **options)


def _fake(x: Tensor, *others: object) -> Tensor:
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            raise InvalidValueError(
                f"sparse_mlp needs all tensors on one device, got {x.device} and {other.device}."
            )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.threshold, ctx.activation, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, down_bias, mask = ctx.saved_tensors
    grads = sparse_mlp_backward(
        grad,
        *inputs,
        mask=mask,
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
        None,  # mask
        None,
        None,
        None,
        None,
    )


_library.impl("sparse_mlp", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("mlkit::sparse_mlp", _fake, lib=_library)
torch.library.register_autograd(
    "mlkit::sparse_mlp", _backward, setup_context=_setup_context, lib=_library
)


def sparse_mlp(
    x: Float[Tensor, "*batch hidden"],
    router_weight: Float[Tensor, "experts hidden"] | None,
    router_bias: Float[Tensor, " experts"] | None,
    gate_up: Float[Tensor, "experts rows hidden"],
    down_t: Float[Tensor, "experts size hidden"],
    gate_up_bias: Float[Tensor, "experts rows"] | None = None,
    down_bias: Float[Tensor, " hidden"] | None = None,
    *,
    mask: Bool[Tensor, "*batch experts"] | None = None,
    threshold: float = 0.0,
    activation: str = "silu",
    backend: str = "auto",
    prices: Float[Tensor, " prices"] | None = None,
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

    Limits: `cpp` takes float32 and bfloat16 on CPU, tokens in tiles of 32, any N, S, H; `triton`
    float32, bfloat16 and float16 on CUDA, N at most 65536, with launches of their own for up to 8
    tokens and for more; `gate_up` and `down_t` must have one type, x, the router and the biases
    may have others. `dense` and `reference` take any floating-point type and read all weights:
    `dense` multiplies in the weights' type, `reference` in fp32, with a copy of them. All other
    sums are fp32 (fp64 where x is fp64); the result has the type of x. Gradients flow to x, the
    experts and their biases (by the reference's formula); the router gets none.

    Args:
        x: Tokens; any leading dimensions, zero tokens included.
        router_weight: One row per expert; None where a `mask` says which experts run.
        router_bias: One number per expert, or None.
        gate_up: See the layout.
        down_t: See the layout.
        gate_up_bias: Bias of the rows of `gate_up`.
        down_bias: Added once for each token, also where no expert is selected.
        mask: The experts of each token, chosen by something else than router and threshold.
        threshold: The logit that a router's output must exceed (equal is off, NaN is off):
            log(tau / (1 - tau)) for the paper's tau; -inf runs all experts, inf none.
        activation: `silu`, `gelu`, `gelu_tanh`, `quick_gelu`, `relu`, `relu2`, `tanh` or
            `sigmoid`.
        backend: `auto` takes the decode kernel of x's device for at most 8 tokens, if it can be
            had, else `dense`; the others insist. With `prices`, `auto` decides on a CPU for any
            number of tokens from what they selected.
        prices: What `measure_prices` returned for these weights.

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
        and (backend == "cpp" or (backend == "auto" and (prices is not None or _is_decode(x))))
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
                mask,
                threshold,
                _CODES[activation],
                None if backend == "cpp" else prices,
            )
    check_arguments(
        x,
        router_weight,
        router_bias,
        gate_up,
        down_t,
        gate_up_bias,
        down_bias,
        mask,
        threshold,
        activation,
        backend,
        prices,
    )
    tokens, chosen = x, mask
    if x.dim() != 2:
        tokens = x.reshape(-1, x.shape[-1])
        chosen = None if mask is None else mask.reshape(-1, mask.shape[-1])
    y = torch.ops.mlkit.sparse_mlp.default(
        tokens,
        router_weight,
        router_bias,
        gate_up,
        down_t,
        gate_up_bias,
        down_bias,
        chosen,
        threshold,
        activation,
        backend,
        prices,
    )
    return y if x.dim() == 2 else y.view(x.shape)
