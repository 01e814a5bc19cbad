"""What the arguments of `sparse_mlp` must be, said in the names that its caller used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlkit.errors import InvalidTypeError, InvalidValueError, nearest
from mlkit_kernels.sparse_mlp.reference import ACTIVATIONS

__all__ = ["BACKENDS", "NUM_PRICES", "TILE", "check_arguments"]

BACKENDS = ("auto", "reference", "dense", "cpp", "triton")
TILE = 32
"""Tokens that share one pass over the weights, as in cpu.cpp."""
NUM_PRICES = 2 * TILE + 2


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InvalidValueError(
            f"{name} must have shape {shape} ({meaning}), got {tuple(tensor.shape)}."
        )


def check_arguments(
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
) -> None:
    """Refuse what does not fit, naming the argument.

    Raises:
        InvalidValueError: For a shape, a device, a number or a name.
        InvalidTypeError: For a type of tensor.
    """
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
    if (router_weight is None) == (mask is None) or (mask is not None and router_bias is not None):
        given = [n for n, t in (("router_weight", router_weight), ("router_bias", router_bias),
                                ("mask", mask)) if t is not None]  # fmt: skip
        raise InvalidValueError(
            "sparse_mlp takes either a router (router_weight, and perhaps router_bias) or a mask, "
            f"got {' and '.join(given) or 'neither'}."
        )
    if router_weight is not None:
        _expect("router_weight", router_weight, (experts, hidden), "experts, hidden")
    if router_bias is not None:
        _expect("router_bias", router_bias, (experts,), "experts")
    if mask is not None:
        _expect("mask", mask, (*x.shape[:-1], experts), "dimensions of x, experts")
        if mask.dtype != torch.bool:
            raise InvalidTypeError(f"mask must be of type bool, got {mask.dtype}.")
        if mask.device != x.device:
            raise InvalidValueError(f"mask is on {mask.device} but x is on {x.device}.")
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
    if prices is not None and not (
        prices.shape == (NUM_PRICES,) and prices.dtype == torch.float64 and prices.is_cpu
    ):
        raise InvalidValueError(
            f"prices must be {NUM_PRICES} numbers of float64 on the CPU, as measure_prices returns "
            f"them, got {prices.dtype} of shape {tuple(prices.shape)} on {prices.device}."
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
