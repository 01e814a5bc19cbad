"""Small models with embeddings, the same at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bags(nn.Module):
    """Three tables of one dimension and one of another, as in a network for click rates."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(40, 8, mode="sum")
        self.item = nn.EmbeddingBag(30, 8, mode="mean", padding_idx=0)
        self.tag = nn.EmbeddingBag(20, 8, mode="max")
        self.city = nn.EmbeddingBag(12, 16, mode="sum", include_last_offset=True)
        self.out = nn.Linear(40, 1)

    def forward(self, ids: Tensor) -> Tensor:
        parts = [bag(ids % bag.num_embeddings) for bag in (self.user, self.item, self.tag)]
        flat = (ids % self.city.num_embeddings).flatten()
        offsets = torch.arange(0, ids.numel() + 1, ids.shape[1])
        return self.out(torch.cat([*parts, self.city(flat, offsets)], 1))


class Words(nn.Module):
    """An embedding with padding, and a bag without."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(50, 8, padding_idx=2)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.word(ids % 50).mean(1))


def bags() -> nn.Module:
    torch.manual_seed(1)
    return Bags()


def words() -> nn.Module:
    torch.manual_seed(2)
    return Words()


def ids() -> tuple[Tensor]:
    return (torch.randint(0, 1000, (8, 3), generator=torch.Generator().manual_seed(3)),)
