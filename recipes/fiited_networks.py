"""The networks that recipe `fiited` compares: stock ones, whose tables `mlkit.convert` replaces.

They are built on `meta`, converted, and given memory afterwards: the dense tables never exist in
the process that trains smaller ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

import mlkit
from mlkit.embeddings import (
    CAFEEmbeddingBag,
    FIITEDConfig,
    FusedEmbeddingOptimizer,
    RowWiseAdagrad,
    TableSpec,
    dynamic_stores,
)
from mlkit.embeddings.fiited.initial import initial_values
from mlkit.embeddings.fiited.tables import Tables
from mlkit.embeddings.settings import FIITEDSettings
from mlkit.models import initialise

__all__ = ["network", "table_optimizers"]

_OPTIMIZERS: dict[str, Any] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def network(
    model: Mapping[str, Any],
    sizes: Mapping[str, Any],
    settings: FIITEDSettings,
    method: str,
    fraction: float,
    seed: int,
) -> nn.Module:
    """Return a network on the CPU with the tables of a method.

    Args:
        model: Configuration of a `CTRModule`.
        sizes: Its `table_sizes` and `num_dense`.
        settings: The arguments `fiited.*`.
        method: One of `METHODS`.
        fraction: Bytes of the tables, as a fraction of the dense ones.
        seed: Of all initial values; layers outside of the tables get the same for every method.
    """
    with torch.device("meta"):
        net: nn.Module = instantiate(model["net"], **sizes)
        conversion = settings.conversion(method, fraction, seed)
        if conversion is not None:
            mlkit.convert(net, conversion)
    net.to_empty(device="cpu")
    initialise(net, seed)
    if conversion is None:
        _pair(net, seed)
    return net


@torch.no_grad()
def _pair(net: nn.Module, seed: int) -> None:
    """Begin dense tables with the values of FIITED's rows, so that differences are paired."""
    config = FIITEDConfig(target_density=1.0, seed=seed)
    stock = [t for t in net.get_submodule("tables").children() if isinstance(t, nn.EmbeddingBag)]
    tables = Tables([TableSpec(str(n), t.num_embeddings) for n, t in enumerate(stock)])
    for number, table in enumerate(stock):
        rows = torch.arange(tables.num_rows)[tables.rows_of(number)]
        table.weight.copy_(initial_values(config, tables, rows, table.embedding_dim))


def table_optimizers(
    net: nn.Module, settings: FIITEDSettings, method: str
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a network's tables: a fused one where the method has its own."""
    stores = dynamic_stores(net)
    fused = {id(p) for store in stores for p in store.parameters()}
    rest = [p for p in net.get_submodule("tables").parameters() if id(p) not in fused]
    found: list[torch.optim.Optimizer] = [FusedEmbeddingOptimizer(net)] if stores else []
    if rest:
        found.append(_OPTIMIZERS[settings.optimizer](rest, lr=settings.lr(method)))
        for table in net.get_submodule("tables").children():
            if isinstance(table, CAFEEmbeddingBag):
                table.register_optimizer(found[-1])
    return found
