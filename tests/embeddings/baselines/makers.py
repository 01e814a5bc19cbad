"""Every compressed table by name, and a slow pooling to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlkit.embeddings.baselines.cafe import CAFEEmbeddingBag
from mlkit.embeddings.baselines.hashing import HashingEmbeddingBag
from mlkit.embeddings.baselines.mixed_dimensions import MDEEmbeddingBag
from mlkit.embeddings.baselines.narrow import NarrowEmbeddingBag
from mlkit.embeddings.baselines.quotient_remainder import QREmbeddingBag


def _mde(rows: int, dim: int, *, memory_budget: float = 0.5, **more: Any) -> MDEEmbeddingBag:
    return MDEEmbeddingBag(rows, dim, table_dim=max(1, int(memory_budget * dim)), **more)


MAKERS: dict[str, Callable[..., Any]] = {
    "hashing": HashingEmbeddingBag,
    "qr": QREmbeddingBag,
    "qr_add": lambda *a, **k: QREmbeddingBag(*a, operation="add", **k),
    "narrow": NarrowEmbeddingBag,
    "narrow_padded": lambda *a, **k: NarrowEmbeddingBag(*a, project=False, **k),
    "mde": _mde,
    "cafe": CAFEEmbeddingBag,
}

BUDGETED = sorted(set(MAKERS) - {"mde"})


def pooled(
    row: Callable[[int], Tensor],
    bags: list[list[int]],
    weights: list[list[float]] | None,
    mode: str,
    padding: int | None,
    dim: int,
) -> Tensor:
    """The sum or mean of each bag, one id after the other."""
    out = []
    for number, bag in enumerate(bags):
        total, count = torch.zeros(dim), 0
        for position, one in enumerate(bag):
            if one == padding:
                continue
            factor = 1.0 if weights is None else weights[number][position]
            total = total + factor * row(one)
            count += 1
        out.append(total / max(count, 1) if mode == "mean" else total)
    return torch.stack(out)


def flat(bags: list[list[int]], include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """Ids and offsets of ragged bags."""
    ends = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
    ids = torch.tensor([one for bag in bags for one in bag], dtype=torch.long)
    return ids, ends if include_last_offset else ends[:-1]
