"""Initial values that depend on the row and nothing else: a row that comes back is the same."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.tables import Tables
from mlkit_kernels.dynamic_embedding.header import uniform_bits

__all__ = ["initial_values"]


def initial_values(
    config: FIITEDConfig, tables: Tables, rows: Int[Tensor, " rows"], dim: int
) -> Float[Tensor, "rows dim"]:
    """Return the initial vectors of rows of the header, float32.

    "uniform" has the bound 1 / sqrt(rows of the table) as in DLRM, unless `init_scale` is given.
    """
    if config.init == "zeros":
        return torch.zeros(len(rows), dim, device=rows.device)
    number = rows.unsqueeze(1) * dim + torch.arange(dim, device=rows.device)
    uniform = _uniform(number, 2 * config.seed)
    if config.init == "normal":
        radius = (-2 * torch.log(uniform)).sqrt()
        angle = 2 * math.pi * _uniform(number, 2 * config.seed + 1)
        scale = 1.0 if config.init_scale is None else config.init_scale
        return scale * radius * angle.cos()
    if config.init_scale is not None:
        return (2 * uniform - 1) * config.init_scale
    first = torch.tensor(tables.first, device=rows.device)
    size = torch.tensor([s.num_embeddings for s in tables.specs], device=rows.device)
    bound = size.float().rsqrt()[torch.searchsorted(first, rows, right=True) - 1]
    return (2 * uniform - 1) * bound.unsqueeze(1)


def _uniform(number: Tensor, seed: int) -> Tensor:
    """In (0, 1), float32; the high bits of the number take part too."""
    bits = uniform_bits(number ^ number >> 32, seed)
    return ((bits >> 8).float() + 0.5) * 2.0**-24
