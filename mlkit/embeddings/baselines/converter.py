"""How `mlkit.convert` and `mlkit.restore` exchange `nn.EmbeddingBag` for a baseline and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from mlkit.convert import Candidate, Cost, conversions
from mlkit.embeddings.baselines.base import CompressedEmbeddingBag
from mlkit.embeddings.baselines.cafe import CAFEEmbeddingBag
from mlkit.embeddings.baselines.config import (
    CAFEConfig,
    HashingConfig,
    MDEConfig,
    NarrowConfig,
    QRConfig,
)
from mlkit.embeddings.baselines.hashing import HashingEmbeddingBag
from mlkit.embeddings.baselines.mixed_dimensions import MDEEmbeddingBag, mixed_dimensions
from mlkit.embeddings.baselines.narrow import NarrowEmbeddingBag
from mlkit.embeddings.baselines.projected import ProjectedEmbeddingBag
from mlkit.embeddings.baselines.quotient_remainder import QREmbeddingBag
from mlkit.embeddings.memory import dense_bytes, parse_budget
from mlkit.errors import InvalidValueError

__all__ = ["BaselineConverter"]

_OWN_KEYS: Mapping[type, tuple[Callable[..., CompressedEmbeddingBag], tuple[str, ...]]] = {
    HashingConfig: (HashingEmbeddingBag, ("seed",)),
    QRConfig: (QREmbeddingBag, ("operation",)),
    NarrowConfig: (NarrowEmbeddingBag, ("project",)),
    CAFEConfig: (CAFEEmbeddingBag, ("hash_share", "threshold", "decay", "decay_every", "seed")),
}
"""A config's class to that of its tables, and the fields that these take; MDE is not per table."""


class BaselineConverter:
    """The `Converter` of all baselines for embedding tables.

    Tables start to train anew, on `meta` after `model.to_empty(device=...)` and the tables'
    `reset_parameters()`. Restored tables hold the row of every id.
    """

    def candidates(self, model: nn.Module, config: Any) -> list[Candidate]:
        """Every embedding of the model; with the reason for those that stay."""
        owners = Counter(
            id(parameter) for module in model.modules() for parameter in module._parameters.values()
        )
        done = conversions(model)
        found = []
        for name, site in model.named_modules():
            if name in done or not isinstance(site, nn.EmbeddingBag | nn.Embedding):
                continue
            left_out = None
            if site.num_embeddings < config.min_rows:
                left_out = f"of {site.num_embeddings} rows, fewer than min_rows={config.min_rows}"
            refusal = _refusal(site, owners[id(site.weight)])
            found.append(Candidate(name, type(site).__name__, refusal, left_out))
        return found

    def build(
        self, model: nn.Module, names: Sequence[str], config: Any, *, structure_only: bool
    ) -> dict[str, nn.Module]:
        """Make the tables, with initial values of their own."""
        sites = {name: _bag(model, name) for name in names}
        dense = {name: _dense_bytes(site, config.optimizer) for name, site in sites.items()}
        total = sum(dense.values())
        budget = parse_budget(config.memory_budget, total)
        if isinstance(config, MDEConfig):
            return _mixed(sites, config, budget)
        kind, keys = next(v for cls, v in _OWN_KEYS.items() if isinstance(config, cls))
        own = {key: getattr(config, key) for key in keys}
        new: dict[str, nn.Module] = {}
        for name, site in sites.items():
            if isinstance(config.memory_budget, float):
                share = parse_budget(config.memory_budget, dense[name])
            else:
                share = min(dense[name], budget * dense[name] // total)
            try:
                made = kind(**_like(site), optimizer=config.optimizer, memory_budget=share, **own)
            except InvalidValueError as error:
                raise InvalidValueError(f"table {name!r}: {error}") from error
            new[name] = made.train(site.training)
        return new

    def restore(self, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
        """Stock tables with the row of every id, computed from what was trained."""
        new: dict[str, nn.Module] = {}
        for name in names:
            site = model.get_submodule(name)
            assert isinstance(site, CompressedEmbeddingBag)
            new[name] = site.to_dense()
        return new

    def cost(self, site: nn.Module) -> Cost:
        """Parameters, bytes of parameters and buffers, and FLOPs of adding a row to its bag."""
        tensors = [*site.parameters(), *site.buffers()]
        count = sum(p.numel() for p in site.parameters())
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        return Cost(count, nbytes, _flops(site))


def _bag(model: nn.Module, name: str) -> nn.EmbeddingBag:
    site = model.get_submodule(name)
    assert isinstance(site, nn.EmbeddingBag)
    return site


def _refusal(site: nn.EmbeddingBag | nn.Embedding, owners: int) -> str | None:
    if isinstance(site, nn.Embedding):
        return (
            "nn.Embedding gives a vector for each id and these tables pool bags of ids: use "
            "nn.EmbeddingBag with bags of one id"
        )
    if type(site) is not nn.EmbeddingBag:
        return f"{type(site).__name__} is a class of its own, whose forward pass is not known"
    if site.mode == "max":
        return "mode='max' has no compressed table; 'sum' and 'mean' have"
    if site.max_norm is not None:
        return f"max_norm={site.max_norm} changes rows as they are read, which shared rows cannot"
    if site.scale_grad_by_freq:
        return "scale_grad_by_freq=True counts ids, which share rows here"
    if owners > 1:
        return "its weight is shared with another module, and would be no longer"
    return None


def _dense_bytes(site: nn.EmbeddingBag, optimizer: str) -> int:
    size = site.weight.element_size()
    return dense_bytes(site.num_embeddings, site.embedding_dim, optimizer, size)


def _like(site: nn.EmbeddingBag) -> dict[str, Any]:
    """The arguments that make a table for the same calls."""
    return {
        "num_embeddings": site.num_embeddings,
        "embedding_dim": site.embedding_dim,
        "mode": site.mode,
        "padding_idx": site.padding_idx,
        "include_last_offset": site.include_last_offset,
        "sparse": site.sparse,
        "device": site.weight.device,
        "dtype": site.weight.dtype,
    }


def _mixed(
    sites: Mapping[str, nn.EmbeddingBag], config: MDEConfig, budget: int
) -> dict[str, nn.Module]:
    sizes = {site.weight.element_size() for site in sites.values()}
    if len(sizes) > 1:
        raise InvalidValueError(
            f"MDE needs tables of one dtype, got weights of {sorted(sizes)} bytes; convert them "
            "in groups"
        )
    dims = mixed_dimensions(
        [site.num_embeddings for site in sites.values()],
        [site.embedding_dim for site in sites.values()],
        budget,
        alpha=config.alpha,
        optimizer=config.optimizer,
        element_size=sizes.pop(),
    )
    return {
        name: MDEEmbeddingBag(**_like(site), table_dim=dim, optimizer=config.optimizer).train(
            site.training
        )
        for (name, site), dim in zip(sites.items(), dims, strict=True)
    }


def _flops(site: nn.Module) -> int:
    dim = int(getattr(site, "embedding_dim", 0))
    if isinstance(site, ProjectedEmbeddingBag) and site.projection is not None:
        return site.table_dim + 2 * site.table_dim * dim
    if isinstance(site, QREmbeddingBag):
        return 2 * dim
    return dim
