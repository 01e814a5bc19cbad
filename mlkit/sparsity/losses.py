"""The two auxiliary losses of LTE, and a way into the gradient that no trainer has to know.

L_eff = 1/(L N) sum_l sum_i G_l(x)_i^2 and L_sep = 1/(L N) sum_l sum_i 1 / (G_l(x)_i - tau)^2, both
averaged over tokens (Zheng et al. 2024, arXiv 2402.06126, equations 4 and 5). Equation 5 is
singular at tau, where routers start; ours is 1 / ((G - tau)^2 + eps), at most 1/eps, with a slope
of at most 0.65 eps^(-3/2).

The losses are not added to the loss of the model. `inject_aux_loss` is an identity on the scores
whose backward starts the gradient of the auxiliary loss, so that it arrives under any trainer,
activation checkpointing, DDP and FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from mlkit.errors import InvalidValueError

__all__ = [
    "aux_loss_scale",
    "efficiency_loss",
    "efficiency_terms",
    "inject_aux_loss",
    "mean_tokens_per_rank",
    "separability_loss",
    "separability_terms",
    "set_aux_loss_scale",
    "token_mean",
]


def efficiency_loss(
    scores: Float[Tensor, "*tokens experts"],
    mask: Bool[Tensor, " *tokens"] | None = None,
    tokens: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over tokens and experts of G^2 (equation 4, one layer).

    Args:
        scores: G, in float32 or float64.
        mask: False for padding.
        tokens: What to divide by; the number of valid tokens if None.
    """
    return token_mean(efficiency_terms(scores), mask, tokens)


def separability_loss(
    scores: Float[Tensor, "*tokens experts"],
    threshold: float = 0.5,
    eps: float = 1e-3,
    mask: Bool[Tensor, " *tokens"] | None = None,
    tokens: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over tokens and experts of 1 / ((G - tau)^2 + eps) (equation 5, one layer).

    Its floor is 1 / (0.25 + eps) at tau = 0.5: scores of 0 and 1.
    """
    return token_mean(separability_terms(scores, threshold, eps), mask, tokens)


def efficiency_terms(scores: Float[Tensor, "*tokens experts"]) -> Float[Tensor, " *tokens"]:
    """Return the efficiency loss of each token."""
    return scores.square().mean(-1)


def separability_terms(
    scores: Float[Tensor, "*tokens experts"], threshold: float, eps: float
) -> Float[Tensor, " *tokens"]:
    """Return the separability loss of each token."""
    return ((scores - threshold).square() + eps).reciprocal().mean(-1)


def token_mean(
    per_token: Float[Tensor, " *tokens"],
    mask: Bool[Tensor, " *tokens"] | None,
    tokens: Tensor | float | None,
) -> Float[Tensor, ""]:
    """Return the mean over valid tokens, or the sum over them divided by `tokens`."""
    if mask is not None:
        per_token = torch.where(mask, per_token, 0.0)
    if tokens is None:
        tokens = per_token.numel() if mask is None else mask.sum()
    divisor = tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)
    return per_token.sum() / divisor


def mean_tokens_per_rank(count: Tensor) -> Tensor:
    """Return the mean over ranks of the number of tokens; `count` itself in one process.

    DDP and FSDP average gradients over ranks. A sum divided by this mean, averaged over ranks, is
    the sum over all tokens divided by their number: what one process has on the joined batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return count
    total = count.to(torch.float64 if count.device.type != "mps" else torch.float32)
    dist.all_reduce(total)
    return total / dist.get_world_size()


# ------------------------------------------------------------------- injection

_scale = torch.ones((), device="cpu")


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, aux: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.aux_dtype, ctx.aux_device = aux.dtype, aux.device
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale.to(ctx.aux_device, ctx.aux_dtype), None


def inject_aux_loss(
    scores: Float[Tensor, " *shape"], aux: Float[Tensor, ""]
) -> Float[Tensor, " *shape"]:
    """Return `scores`; the backward pass adds the gradient of `aux` times `aux_loss_scale`.

    Whatever is computed from the result must reach the loss, or nothing is added.

    Example:
        >>> g = torch.tensor([0.5, 2.0], requires_grad=True)
        >>> inject_aux_loss(g, g.square().sum()).sum().backward()
        >>> g.grad
        tensor([2., 5.])
    """
    injected: Tensor = _Inject.apply(scores, aux, _scale)
    return injected


def set_aux_loss_scale(scale: float) -> float:
    """Set what auxiliary gradients are multiplied by, and return the former value."""
    global _scale
    if not scale >= 0:
        raise InvalidValueError(f"the scale of the auxiliary loss must be at least 0, got {scale}")
    former = float(_scale)
    _scale = torch.tensor(float(scale), device="cpu")
    return former


@contextmanager
def aux_loss_scale(scale: float) -> Iterator[None]:
    """Multiply auxiliary gradients as the task loss is multiplied: 65536 / 4, for instance.

    The scale cannot be seen from inside a backward pass, so it is said here: the factor of a
    gradient scaler, one over the number of accumulated batches. Put forward *and* backward into
    the block: activation checkpointing runs the forward pass again in the backward pass.
    """
    former = set_aux_loss_scale(scale)
    try:
        yield
    finally:
        set_aux_loss_scale(former)
