"""Sparse expert MLP in plain PyTorch: the definition, the test oracle and the fallback.

Zheng et al., "Learn To be Efficient: Build Structured Sparsity in Large Language Models", 2024,
arXiv 2402.06126, equations 1 and 2. Because the sigmoid is monotone, its score is never computed:
the router's *logit* is compared with the logit of the paper's threshold, log(tau / (1 - tau)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["ACTIVATIONS", "expert_mask", "sparse_mlp_backward", "sparse_mlp_reference"]

_aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "relu": F.relu,
    "relu2": lambda a: F.relu(a).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Activation functions by the name that the op takes."""


def _quick_gelu_backward(grad: Tensor, a: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * a)
    return grad * s * (1 + 1.702 * a * (1 - s))


_ACTIVATION_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, a: _aten.silu_backward(grad, a),
    "gelu": lambda grad, a: _aten.gelu_backward(grad, a),
    "gelu_tanh": lambda grad, a: _aten.gelu_backward(grad, a, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
    "relu": lambda grad, a: _aten.threshold_backward(grad, a, 0),
    "relu2": lambda grad, a: grad * 2 * F.relu(a),
    "tanh": lambda grad, a: _aten.tanh_backward(grad, torch.tanh(a)),
    "sigmoid": lambda grad, a: _aten.sigmoid_backward(grad, torch.sigmoid(a)),
}


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of every sum: fp32, or fp64 for fp64 input (numerical gradient checks)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def expert_mask(
    x: Float[Tensor, "*batch hidden"],
    router_weight: Float[Tensor, "experts hidden"],
    router_bias: Float[Tensor, " experts"] | None = None,
    threshold: float = 0.0,
) -> Bool[Tensor, "*batch experts"]:
    r"""Say which experts each token runs: $x w_i + b_i > t$, logits in fp32, strictly greater.

    A logit of exactly `threshold` is off, and so is NaN. `mask.sum(-1)` is the number of experts
    that a token runs, `1 - mask.float().mean()` the sparsity.

    Args:
        x: Tokens.
        router_weight: One row per expert.
        router_bias: One number per expert, or None.
        threshold: A logit; -inf runs every expert whose logit is finite, +inf none.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> expert_mask(x, torch.tensor([[0.5, 9.0], [0.6, 9.0]]), threshold=0.5)
        tensor([[False,  True]])
    """
    dtype = _compute_dtype(x)
    return F.linear(x.to(dtype), router_weight.to(dtype), _cast(router_bias, dtype)) > threshold


def _selected(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    mask: Tensor | None,
    threshold: float,
) -> Tensor:
    if mask is not None:
        return mask
    assert router_weight is not None, "router_weight or mask"
    return expert_mask(x, router_weight, router_bias, threshold)


def _pre_activations(x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input of the activation (and of the gate's product), [tokens, experts, rows]."""
    flat = F.linear(x, gate_up.flatten(0, 1), None if bias is None else bias.flatten())
    return flat.unflatten(-1, gate_up.shape[:2])


def sparse_mlp_reference(
    x: Float[Tensor, "tokens hidden"],
    router_weight: Float[Tensor, "experts hidden"] | None,
    router_bias: Float[Tensor, " experts"] | None,
    gate_up: Float[Tensor, "experts rows hidden"],
    down_t: Float[Tensor, "experts size hidden"],
    gate_up_bias: Float[Tensor, "experts rows"] | None = None,
    down_bias: Float[Tensor, " hidden"] | None = None,
    *,
    mask: Bool[Tensor, "tokens experts"] | None = None,
    threshold: float = 0.0,
    activation: str = "silu",
) -> Float[Tensor, "tokens hidden"]:
    r"""Compute the MLP of the experts that the router selects, everything summed in fp32.

    $$y = b_{down} + \sum_{i:\ x w_i + b_i > t} E_i(x)$$

    with, for the experts' blocks of S neurons,

    - gated (`gate_up` has 2 S rows, the S of the gate first):
      $E_i(x) = (act(G_i x + b_{g,i}) \odot (U_i x + b_{u,i}))^T D_i$
    - ungated (`gate_up` has S rows): $E_i(x) = act(U_i x + b_{u,i})^T D_i$

    The router's score does not multiply the output, so the router gets no gradient.
    Every expert is computed and the unselected ones are masked, which costs what the dense MLP
    costs (and a copy of the weights in fp32 where they have another type).

    Args:
        x: Tokens; the result has their type.
        router_weight: See `expert_mask`; None if there is a mask.
        router_bias: See `expert_mask`.
        gate_up: Rows of the gate then of the up projection for each expert, or of up alone.
        down_t: The down projection, transposed: row j belongs to neuron j of its expert.
        gate_up_bias: Bias of the rows of `gate_up`.
        down_bias: Added once for each token, also where no expert is selected.
        mask: The experts of each token, where something else than this router chose them.
        threshold: A logit, see `expert_mask`.
        activation: A key of `ACTIVATIONS`.
    """
    dtype = _compute_dtype(x)
    size = down_t.shape[1]
    mask = _selected(x, router_weight, router_bias, mask, threshold)
    pre = _pre_activations(x.to(dtype), gate_up.to(dtype), _cast(gate_up_bias, dtype))
    h = ACTIVATIONS[activation](pre[..., :size])
    if gate_up.shape[1] != size:
        h = h * pre[..., size:]
    h = torch.where(mask.unsqueeze(-1), h, 0.0)
    y = h.flatten(1) @ down_t.to(dtype).flatten(0, 1)
    if down_bias is not None:
        y = y + down_bias.to(dtype)
    return y.to(x.dtype)


def sparse_mlp_backward(
    grad: Tensor,
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gate_up: Tensor,
    down_t: Tensor,
    gate_up_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    threshold: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Return the gradients for x, gate_up, down_t, gate_up_bias and down_bias.

    With $a, u$ the gate's and up's pre-activations of the selected neurons, $h = act(a) \odot u$
    and $g$ the gradient that comes in: $dD = h^T g$, $dh = g D^T$, $du = dh \odot act(a)$,
    $da = dh \odot u \odot act'(a)$, $dx = [da, du]\,[G; U]$, $d[G; U] = [da, du]^T x$.
    The forward's values are computed again instead of being stored.
    """
    dtype = _compute_dtype(x)
    size = down_t.shape[1]
    mask = _selected(x, router_weight, router_bias, mask, threshold).unsqueeze(-1)
    g, x_, weight, down = (t.to(dtype) for t in (grad, x, gate_up, down_t))
    pre = _pre_activations(x_, weight, _cast(gate_up_bias, dtype))
    a = pre[..., :size]
    act = ACTIVATIONS[activation](a)
    dh = F.linear(g, down.flatten(0, 1)).unflatten(-1, down.shape[:2])
    if gate_up.shape[1] != size:
        up = pre[..., size:]
        h = act * up
        d_pre = torch.cat([_ACTIVATION_BACKWARDS[activation](dh * up, a), dh * act], -1)
    else:
        h = act
        d_pre = _ACTIVATION_BACKWARDS[activation](dh, a)
    d_pre = torch.where(mask, d_pre, 0.0).flatten(1)
    h = torch.where(mask, h, 0.0).flatten(1)
    return (
        (d_pre @ weight.flatten(0, 1)).to(x.dtype),
        (d_pre.t() @ x_).view(weight.shape).to(gate_up.dtype),
        (h.t() @ g).view(down.shape).to(down_t.dtype),
        d_pre.sum(0).view(weight.shape[:2]),
        g.sum(0),
    )
