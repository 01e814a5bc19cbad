# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""A peer on GPUs: matrix-vector products that skip input channels of small magnitude.

The idea of TEAL (arXiv 2408.14690), written anew for this comparison: weights [in, out] so that an
input channel is one row, products split over inputs and outputs, partial sums added by atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["skipping_mlp"]


@triton.jit
def _skipping_kernel(
    x, weight_t, y, threshold, inputs, outputs, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr
):
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    value = tl.load(x + i, mask=i < inputs, other=0.0).to(tl.float32)
    on = tl.abs(value) > threshold
    w = tl.load(
        weight_t + i[:, None].to(tl.int64) * outputs + o[None, :],
        mask=on[:, None] & (o[None, :] < outputs),
        other=0.0,
    ).to(tl.float32)
    tl.atomic_add(y + o, tl.sum(value[:, None] * w, 0), mask=o < outputs)


def _product(x: Tensor, weight_t: Tensor, threshold: float) -> Tensor:
    inputs, outputs = weight_t.shape
    y = torch.zeros(outputs, dtype=torch.float32, device=x.device)
    block_in, block_out = 16, 256
    grid = (triton.cdiv(outputs, block_out), triton.cdiv(inputs, block_in))
    _skipping_kernel[grid](
        x, weight_t, y, threshold, inputs, outputs, BLOCK_IN=block_in, BLOCK_OUT=block_out
    )
    return y


def skipping_mlp(
    x: Tensor, gate_t: Tensor, up_t: Tensor, down: Tensor, low: float, inner: float
) -> Tensor:
    """Compute a gated MLP of one token; channels of at most these magnitudes are skipped.

    Args:
        x: [1, H].
        gate_t: [H, I].
        up_t: [H, I].
        down: [I, H].
        low: For x.
        inner: For the intermediate values.
    """
    h = F.silu(_product(x[0], gate_t, low)) * _product(x[0], up_t, low)
    return _product(h, down, inner).to(x.dtype).unsqueeze(0)
