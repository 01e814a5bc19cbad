"""Whether the width of a feed-forward layer can be parted into experts, padding included."""

from __future__ import annotations

import torch
from torch import nn

from mlkit.sparsity.config import LTEConfig
from mlkit.sparsity.grouping import nearest_valid_sizes
from mlkit.sparsity.layout import FFNLayout, FFNShape
from mlkit_kernels.sparse_mlp import ACTIVATIONS as FUNCTIONS

__all__ = ["why_not_divisible", "why_not_padded"]


def why_not_divisible(shape: FFNShape, config: LTEConfig) -> str | None:
    """Return why a layer cannot be parted into experts, or None."""
    width, size = shape.intermediate_size, config.expert_size
    if width % size and not config.pad_to_multiple:
        return (
            f"expert_size must divide the intermediate size, got expert_size={size}, "
            f"intermediate size {width}; {nearest_valid_sizes(width, size)}; or set "
            f"pad_to_multiple=True, which adds {-width % size} zero neurons"
        )
    if config.min_experts > -(-width // size):
        return f"min_experts is {config.min_experts}, of {-(-width // size)} experts"
    return None


def why_not_padded(
    shape: FFNShape, layout: FFNLayout, config: LTEConfig, act: nn.Module | None
) -> str | None:
    """Return why neurons with zero weights would not be silent in a layer, or None."""
    width = shape.intermediate_size
    if width % config.expert_size == 0 or layout.is_gated:
        return None
    zero = torch.zeros(1, device="cpu")
    if act is None:
        assert layout.activation is not None
        value = float(FUNCTIONS[layout.activation](zero))
    else:
        like = next(act.parameters(), zero)
        if like.is_meta:
            return "pad_to_multiple needs act(0), and the parameters of the activation are on meta"
        with torch.no_grad():
            value = float(act(like.new_zeros(1)))
    if value == 0:
        return None
    return (
        "pad_to_multiple adds neurons with zero weights, which must compute zero, but the "
        f"activation gives {value:.3g} at 0; choose another expert_size than {config.expert_size}; "
        f"{nearest_valid_sizes(width, config.expert_size)}"
    )
