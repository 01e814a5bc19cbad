"""Click-through-rate networks on stock PyTorch: DLRM, DeepFM and DCN-v2.

Every number that belongs to one id is in `tables`, a list of `nn.EmbeddingBag`s, so that whatever
replaces these (`mlkit.convert`) holds all that grows with the data. Networks are built anywhere,
`meta` included; there, give them memory and values afterwards::

    with torch.device("meta"):
        net = DLRM(table_sizes, 64, num_dense)
    net.to_empty(device="cpu")
    initialise(net, seed=0)

Departures of ours: one id per table and example; no dropout, no batch normalisation; DeepFM's
first-order term is a linear read-out of the vectors (see there).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.errors import InvalidValueError

__all__ = ["DCN", "DLRM", "DeepFM", "initialise"]


def initialise(model: nn.Module, seed: int) -> None:
    """Give every module of a network its initial values, in place.

    Stock embedding tables are uniform in ±1/sqrt(rows), as the official DLRM code draws them; any
    other module does it by its own `reset_parameters`. What a module gets depends on the seed and
    on its name alone: networks that differ in their tables begin with the same other layers.

    Args:
        model: Any network, on any device but `meta`.
        seed: Any integer.
    """
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(cuda)), torch.no_grad():
        for name, module in model.named_modules():
            torch.manual_seed(_key(name, seed))
            if type(module) is nn.EmbeddingBag:
                _draw_table(module)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()


@torch.no_grad()
def _draw_table(table: nn.EmbeddingBag) -> None:
    bound = 1 / math.sqrt(table.num_embeddings)
    table.weight.uniform_(-bound, bound)


def _key(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class _CTRNetwork(nn.Module):
    """What the three share: checked sizes, the tables and their look-up."""

    def __init__(self, table_sizes: Sequence[int], embedding_dim: int, num_dense: int) -> None:
        super().__init__()
        if not table_sizes or min(table_sizes) < 1:
            raise InvalidValueError(
                f"table_sizes must name at least one table of at least one row, got "
                f"{list(table_sizes)}"
            )
        if embedding_dim < 1 or num_dense < 0:
            raise InvalidValueError(
                "embedding_dim must be at least 1 and num_dense at least 0, got "
                f"{embedding_dim} and {num_dense}"
            )
        self.embedding_dim, self.num_dense = embedding_dim, num_dense
        tables = [
            nn.EmbeddingBag(rows, embedding_dim, mode="sum", sparse=True) for rows in table_sizes
        ]
        for table in tables:
            _draw_table(table)
        self.tables = nn.ModuleList(tables)

    def look_up(self, sparse: Int[Tensor, "batch tables"]) -> Float[Tensor, "batch tables dim"]:
        """The vector of each id."""
        if sparse.shape[1:] != (len(self.tables),):
            raise InvalidValueError(
                f"sparse must have one column per table, ({len(self.tables)}), got shape "
                f"{tuple(sparse.shape)}"
            )
        columns = sparse.split(1, dim=1)
        vectors = [table(ids) for table, ids in zip(self.tables, columns, strict=True)]
        return torch.stack(vectors, dim=1)


def _mlp(sizes: Sequence[int], *, ends_linear: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*(layers[:-1] if ends_linear else layers))


class DLRM(_CTRNetwork):
    """Dot products of all pairs of vectors, then fully connected layers (Naumov et al. 2019).

    The dense features go through a bottom network to one more vector; the top network sees that
    vector and the products of all pairs. arXiv 1906.00091; the sizes of layers are ours.

    Args:
        table_sizes: Rows of each table.
        embedding_dim: Length of a vector, D.
        num_dense: Dense features; with 0 there is no bottom network.
        bottom_sizes: Hidden layers of the bottom network.
        top_sizes: Hidden layers of the top network.

    Shape:
        dense (batch, num_dense), sparse (batch, tables) -> logits (batch,).

    Raises:
        InvalidValueError: For an empty list of tables, or a size out of range.

    Example:
        >>> net = DLRM([7, 5], embedding_dim=4, num_dense=3)
        >>> net(torch.zeros(2, 3), torch.tensor([[6, 0], [1, 4]])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        num_dense: int,
        bottom_sizes: Sequence[int] = (64,),
        top_sizes: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__(table_sizes, embedding_dim, num_dense)
        num_vectors = len(table_sizes) + (num_dense > 0)
        self.bottom: nn.Module | None = None
        if num_dense:
            self.bottom = _mlp([num_dense, *bottom_sizes, embedding_dim], ends_linear=False)
        width = num_vectors * (num_vectors - 1) // 2 + (embedding_dim if num_dense else 0)
        if not width:
            raise InvalidValueError("DLRM needs two tables, or one table and a dense feature")
        self.top = _mlp([width, *top_sizes, 1], ends_linear=True)

    def forward(
        self, dense: Float[Tensor, "batch features"], sparse: Int[Tensor, "batch tables"]
    ) -> Float[Tensor, " batch"]:
        """Return the logits."""
        vectors, parts = self.look_up(sparse), []
        if self.bottom is not None:
            bottom = self.bottom(dense)
            vectors = torch.cat([bottom[:, None], vectors], dim=1)
            parts.append(bottom)
        rows, columns = torch.tril_indices(
            vectors.shape[1], vectors.shape[1], -1, device=vectors.device
        )
        products = (vectors @ vectors.transpose(1, 2))[:, rows, columns]
        return self.top(torch.cat([*parts, products], dim=1)).squeeze(1)


class DeepFM(_CTRNetwork):
    """A factorisation machine beside fully connected layers, on the same vectors (Guo et al. 2017).

    The paper (arXiv 1703.04247) gives each id a scalar weight of its own. Here the first-order term
    is linear in the vectors and dense features instead: a table of scalars cannot be made narrower,
    and it would hold numbers per id outside `tables`.

    Args:
        table_sizes: Rows of each table.
        embedding_dim: Length of a vector, D.
        num_dense: Dense features; they enter the first-order term and the fully connected layers.
        hidden_sizes: Hidden layers.

    Shape:
        dense (batch, num_dense), sparse (batch, tables) -> logits (batch,).

    Raises:
        InvalidValueError: For an empty list of tables, or a size out of range.
    """

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        num_dense: int,
        hidden_sizes: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__(table_sizes, embedding_dim, num_dense)
        width = len(table_sizes) * embedding_dim + num_dense
        self.first_order = nn.Linear(width, 1)
        self.deep = _mlp([width, *hidden_sizes, 1], ends_linear=True)

    def forward(
        self, dense: Float[Tensor, "batch features"], sparse: Int[Tensor, "batch tables"]
    ) -> Float[Tensor, " batch"]:
        """Return the logits."""
        vectors = self.look_up(sparse)
        flat = torch.cat([dense, vectors.flatten(1)], dim=1)
        # the sum over pairs, by (sum² - sum of squares) / 2
        second_order = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        return (self.first_order(flat) + self.deep(flat)).squeeze(1) + second_order


class DCN(_CTRNetwork):
    """Cross layers beside fully connected layers: DCN-v2, parallel (Wang et al. 2021).

    A cross layer is x₀ * (W x + b) + x, with the full matrix W (arXiv 2008.13535, eq. 1).

    Args:
        table_sizes: Rows of each table.
        embedding_dim: Length of a vector, D.
        num_dense: Dense features.
        num_cross_layers: How many cross layers.
        rank: Of W = U V (eq. 2 there), or None for a full matrix.
        hidden_sizes: Hidden layers of the fully connected part.

    Shape:
        dense (batch, num_dense), sparse (batch, tables) -> logits (batch,).

    Raises:
        InvalidValueError: For an empty list of tables, or a size out of range.
    """

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        num_dense: int,
        num_cross_layers: int = 2,
        rank: int | None = 32,
        hidden_sizes: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__(table_sizes, embedding_dim, num_dense)
        if num_cross_layers < 1 or (rank is not None and rank < 1):
            raise InvalidValueError(
                "num_cross_layers and rank must be at least 1 (rank may be None), got "
                f"{num_cross_layers} and {rank}"
            )
        width = len(table_sizes) * embedding_dim + num_dense
        self.cross = nn.ModuleList(_cross_matrix(width, rank) for _ in range(num_cross_layers))
        self.deep = _mlp([width, *hidden_sizes], ends_linear=False)
        self.head = nn.Linear(width + ([width, *hidden_sizes][-1]), 1)

    def forward(
        self, dense: Float[Tensor, "batch features"], sparse: Int[Tensor, "batch tables"]
    ) -> Float[Tensor, " batch"]:
        """Return the logits."""
        first = crossed = torch.cat([dense, self.look_up(sparse).flatten(1)], dim=1)
        for layer in self.cross:
            crossed = first * layer(crossed) + crossed
        return self.head(torch.cat([crossed, self.deep(first)], dim=1)).squeeze(1)


def _cross_matrix(width: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
