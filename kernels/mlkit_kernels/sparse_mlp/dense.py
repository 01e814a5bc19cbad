"""The exact masked GEMM over the packed weights: for prompts, and where most experts run anyhow.

It reads every weight once, in its own type, and multiplies the values of unselected neurons by
zero. That is the dense MLP's work plus the router's, 1 / (3 S) of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlkit_kernels.sparse_mlp.reference import ACTIVATIONS, expert_mask

__all__ = ["sparse_mlp_dense"]


def sparse_mlp_dense(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gate_up: Tensor,
    down_t: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    mask: Tensor | None,
    *,
    threshold: float,
    activation: str,
) -> Tensor:
    """Compute what `sparse_mlp_reference` defines, rounded to the weights' type in between.

    The arguments are those of the reference, checked before; router logits are fp32.
    """
    if mask is None:
        assert router_weight is not None, "router_weight or mask"
        mask = expert_mask(x, router_weight, router_bias, threshold)
    experts, size, _ = down_t.shape
    dtype = gate_up.dtype
    bias = None if gate_up_bias is None else gate_up_bias.to(dtype).flatten()
    pre = F.linear(x.to(dtype), gate_up.flatten(0, 1), bias).unflatten(-1, gate_up.shape[:2])
    h = ACTIVATIONS[activation](pre[..., :size])
    if gate_up.shape[1] != size:
        h = h * pre[..., size:]
    # not a product with the mask: 0 x inf would be NaN
    h = torch.where(mask.unsqueeze(-1), h, 0).flatten(1)
    down = down_t.view(experts * size, -1)
    if down_bias is None:
        return (h @ down).to(x.dtype)
    return torch.addmm(down_bias.to(dtype), h, down).to(x.dtype)
