"""How `mlkit.convert` and `mlkit.restore` turn stock embeddings into dynamic ones and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mlkit.convert import Candidate, Cost
from mlkit.embeddings.fiited.bag import DynamicEmbeddingBag
from mlkit.embeddings.fiited.budget import plan
from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.dense import write_dense
from mlkit.embeddings.fiited.embedding import DynamicEmbedding
from mlkit.embeddings.fiited.module import DynamicTable
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.embeddings.fiited.tables import TableSpec
from mlkit.embeddings.memory import dense_bytes, parse_budget
from mlkit.errors import InvalidValueError

__all__ = ["FIITEDConverter", "StoreSize", "split_budget"]

_CLASSES: dict[type[nn.Module], type[DynamicTable]] = {
    nn.Embedding: DynamicEmbedding,
    nn.EmbeddingBag: DynamicEmbeddingBag,
}
_Stock = nn.Embedding | nn.EmbeddingBag


class _Kind(NamedTuple):
    """What tables of one store have in common."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    sparse: bool
    learns: bool


class StoreSize(NamedTuple):
    """What a store holds: the rows of its tables, their dimension, the bytes of a weight."""

    tables: Sequence[int]
    dim: int
    element_size: int


class FIITEDConverter:
    """The `Converter` of `FIITEDConfig`: tables of one dimension, type and device share a store."""

    def __init__(self) -> None:
        self._config: FIITEDConfig | None = None

    def candidates(self, model: nn.Module, config: FIITEDConfig) -> list[Candidate]:
        """Every `nn.Embedding` and `nn.EmbeddingBag`, with the reason where one is left alone."""
        self._config = config
        holders: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
        found = []
        for name, module in model.named_modules():
            if not isinstance(module, _Stock):
                continue
            kind, left_out = type(module).__name__, None
            if module.num_embeddings < config.min_rows:
                left_out = f"a table of {module.num_embeddings} rows, below min_rows"
            refusal = None if left_out else _refusal(name, module, config, holders)
            found.append(Candidate(name, kind, refusal, left_out))
        return found

    def build(
        self,
        model: nn.Module,
        names: Sequence[str],
        config: FIITEDConfig,
        *,
        structure_only: bool,
    ) -> dict[str, nn.Module]:
        """Make the stores and their modules; fill them where the weights are to be kept."""
        groups: dict[_Kind, dict[str, _Stock]] = {}
        for name in names:
            site = model.get_submodule(name)
            assert isinstance(site, _Stock)
            groups.setdefault(_kind(site), {})[name] = site
        sizes = [
            StoreSize(
                [site.num_embeddings for site in sites.values()], kind.dim, kind.dtype.itemsize
            )
            for kind, sites in groups.items()
        ]
        new: dict[str, nn.Module] = {}
        configs = split_budget(config, sizes)
        for (kind, sites), own in zip(groups.items(), configs, strict=True):
            specs = [TableSpec(n, s.num_embeddings, s.padding_idx) for n, s in sites.items()]
            store = DynamicEmbeddingStore(
                specs, kind.dim, own, sparse=kind.sparse, device=kind.device, dtype=kind.dtype
            )
            store.root.requires_grad_(kind.learns)
            keeps = store.is_whole or config.warm_start is not None
            for number, (name, site) in enumerate(sites.items()):
                new[name] = _module(store, number, site)
                if keeps and not structure_only:
                    write_dense(store, number, site.weight.detach())
        return new

    def restore(self, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
        """Stock modules with dense weights."""
        new: dict[str, nn.Module] = {}
        for name in names:
            site = model.get_submodule(name)
            assert isinstance(site, DynamicTable)
            new[name] = site.to_dense()
        return new

    def cost(self, site: nn.Module) -> Cost:
        """Weights; bytes with optimizer state, headers and all; additions of a lookup.

        A table's part of its store is that of its rows.
        """
        if isinstance(site, DynamicTable):
            plan = site.store.plan
            share = site.num_embeddings / plan.num_rows
            return Cost(
                round(site.store.pool.numel() * share),
                round(plan.total_bytes * share),
                site.embedding_dim,
            )
        assert isinstance(site, _Stock)
        assert self._config is not None
        optimizer = self._config.optimizer or self._config.unfused_optimizer
        rows, dim = site.num_embeddings, site.embedding_dim
        size = site.weight.element_size()
        return Cost(rows * dim, dense_bytes(rows, dim, optimizer, size), dim)


def split_budget(config: FIITEDConfig, stores: Sequence[StoreSize]) -> list[FIITEDConfig]:
    """Divide a budget over stores: their headers first, the rest by the bytes of the dense tables.

    A density holds for each of them as it is.

    Args:
        config: Its budget is for all of them.
        stores: What each of them holds.

    Raises:
        InvalidValueError: If the budget does not hold the headers and a chunk of each table.
    """
    if config.memory_budget is None or len(stores) == 1:
        return [config] * len(stores)
    spare = config.id_map == "exact"
    rows = [sum(s.tables) + spare * len(s.tables) for s in stores]
    least = [
        plan(config, n, s.dim, element_size=s.element_size, chunks=len(s.tables))
        for n, s in zip(rows, stores, strict=True)
    ]
    dense = sum(p.dense_bytes for p in least)
    budget, fixed = parse_budget(config.memory_budget, dense), sum(p.total_bytes for p in least)
    if budget < fixed:
        raise InvalidValueError(
            f"memory_budget {config.memory_budget!r} is {budget} bytes, but the headers of "
            f"{sum(rows)} rows and a chunk of each table take {fixed} bytes "
            f"({fixed / dense:.1%} of the dense tables): give at least that, fewer chunks "
            "(num_chunks), one-byte utilities (utility_dtype='uint8'), or min_rows"
        )
    return [
        dataclasses.replace(
            config, memory_budget=p.total_bytes + (budget - fixed) * p.dense_bytes // dense
        )
        for p in least
    ]


def _kind(site: _Stock) -> _Kind:
    weight = site.weight
    return _Kind(site.embedding_dim, weight.dtype, weight.device, site.sparse, weight.requires_grad)


def _module(store: DynamicEmbeddingStore, number: int, site: _Stock) -> nn.Module:
    options: dict[str, Any] = {
        "max_norm": site.max_norm,
        "norm_type": site.norm_type,
        "scale_grad_by_freq": site.scale_grad_by_freq,
    }
    if isinstance(site, nn.EmbeddingBag):
        options |= {"mode": site.mode, "include_last_offset": site.include_last_offset}
    return _CLASSES[type(site)].of_store(store, number, **options).train(site.training)


def _refusal(
    name: str, site: _Stock, config: FIITEDConfig, holders: dict[int, list[str]]
) -> str | None:
    if type(site) not in _CLASSES:
        return f"{type(site).__name__} is a class of its own: what it computes is not known"
    others = [held for held in holders[id(site.weight)] if held != f"{name}.weight".lstrip(".")]
    if others:
        return f"its weight is shared with {others[0]}, which needs it as a matrix"
    if site._forward_hooks or site._forward_pre_hooks or site._backward_hooks:
        return "it has hooks, which would be lost: remove them, and register them afterwards"
    if site.weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"its weight is {site.weight.dtype}; float32, bfloat16 and float64 can be converted"
    if site.embedding_dim % config.num_chunks:
        return f"num_chunks={config.num_chunks} does not divide its dimension {site.embedding_dim}"
    if isinstance(site, nn.EmbeddingBag) and site.mode == "max" and site.scale_grad_by_freq:
        return "mode 'max' with scale_grad_by_freq is not defined"
    is_fresh = config.target_density != 1 and config.warm_start is None
    if not site.weight.requires_grad and is_fresh:
        return "it is frozen and would stay empty: warm_start='magnitude' keeps its largest chunks"
    is_padded = isinstance(site, nn.Embedding) and site.padding_idx is not None
    if is_padded and not site.weight.is_meta and bool(site.weight[site.padding_idx].any()):
        return f"its row padding_idx={site.padding_idx} is not zeros, and would be"
    return None
