"""What the subject `embeddings` trains: tables, ids, and one training step of each provider.

A case is one gradient of the output of all tables, one id a table and sample. What is measured is
the lookup, the backward pass and the update, without a model on top. All pages of all memory are
touched before anything is timed: the first touch of a page costs more than a lookup.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, TableSpec
from mlkit.embeddings.fiited.lookup import lookup
from scripts.benchmarks._harness import Bench

__all__ = ["IDS", "Case", "Provider", "bags", "batches", "has_fbgemm", "ours", "store_of", "tbe"]

IDS = ("uniform", "Zipf(1.05)")
_LR, _EPS = 0.01, 1e-8
_VALUE = 0.01
_BLOCK = 1 << 18
_STRIDE = 611_953  # prime: spreads the popular ids over a table


@dataclass(frozen=True)
class Case:
    """Sizes of one case.

    Args:
        tables: How many.
        rows: Of each.
        dim: D.
        batch: Samples a step, each with one id per table.
    """

    tables: int
    rows: int
    dim: int
    batch: int

    @classmethod
    def of(cls, bench: Bench, dim: int, tables: int = 26, rows: int = 1_000_000) -> Case:
        """The case of the issue, or its tiny sister."""
        return cls(
            bench.size(tables, 3), bench.size(rows, 1_000), bench.size(dim, 8), bench.size(4096, 16)
        )

    def __str__(self) -> str:
        return f"{self.tables} tables x {self.rows:,}, D={self.dim}, batch {self.batch}"


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        forward: Indices of a batch, ordered by table, to outputs, with a graph where one is asked.
        step: The same with its backward pass and the update.
        rows: The present rows of the first table, for a check.
    """

    forward: Callable[[Tensor], Any]
    step: Callable[[Tensor], None]
    rows: Callable[[], Tensor]


def has_fbgemm() -> bool:
    """Whether the extra `torchrec` is installed."""
    return importlib.util.find_spec("fbgemm_gpu") is not None


def batches(case: Case, ids: str, count: int, device: str = "cpu") -> list[Tensor]:
    """Batches of indices, ordered by table: popular rows lie anywhere in a table."""
    rng = np.random.default_rng(0)
    size = (count, case.tables * case.batch)
    if ids == "uniform":
        found = rng.integers(0, case.rows, size)
    else:
        weight = np.cumsum(np.arange(1, case.rows + 1, dtype=np.float64) ** -1.05)
        rank = np.searchsorted(weight, rng.random(size) * weight[-1])
        found = rank * _STRIDE % case.rows
    return list(torch.from_numpy(found).to(device))


def _gradient(case: Case, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(case.batch, case.tables * case.dim, device=device) * 1e-3


# -------------------------------------------------------------------------------------- mlkit


def store_of(
    case: Case, density: float, device: str = "cpu", seed: int = 0, **options: Any
) -> DynamicEmbeddingStore:
    """A store whose pool is full: of all chunks, or of chunks drawn one by one."""
    settings = {
        "optimizer": "rowwise_adagrad", "lr": _LR, "eps": _EPS, "init": "zeros",
        "schedule": "fixed", "prune_every": 1 << 30, **options,
    }  # fmt: skip
    config = FIITEDConfig(target_density=density, **settings)
    specs = [TableSpec(f"t{number}", case.rows) for number in range(case.tables)]
    store = DynamicEmbeddingStore(specs, case.dim, config, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    per_row, total = config.num_chunks, len(store.header)
    bits = torch.arange(per_row, device=device)
    for start in range(0, total, _BLOCK):
        free = store.target - store.num_resident
        if free <= 0:
            break
        rows = torch.arange(start, min(start + _BLOCK, total), device=device)
        drawn = torch.rand(len(rows), per_row, device=device, generator=generator) < density
        drawn &= (drawn.flatten().cumsum(0) <= free).view_as(drawn)
        store.placement.set_masks(rows, (drawn.long() << bits).sum(1))
    values, *states = store.columns()
    values.fill_(_VALUE)
    for state in states:
        state.zero_()
    return store


def ours(case: Case, store: DynamicEmbeddingStore) -> Provider:
    """All tables in one call, the optimizer fused."""
    device = store.header.device.type
    grad = _gradient(case, device)

    def forward(indices: Tensor) -> Tensor:
        return lookup(store, indices)

    def step(indices: Tensor) -> None:
        lookup(store, indices).backward(grad)
        store.step()

    first = torch.arange(case.rows, device=device)
    return Provider(forward, step, lambda: store.read(first))


# -------------------------------------------------------------------------------------- peers


def tbe(case: Case, optimizer: str, device: str = "cpu") -> Provider:
    """FBGEMM's table-batched embeddings, the optimizer fused.

    Args:
        case: Sizes.
        optimizer: "rowwise_adagrad" or "sgd".
        device: "cpu" or "cuda".
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        OptimType,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_cpu = device == "cpu"
    place = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    where = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(case.rows, case.dim, place, where)] * case.tables,
        optimizer=getattr(OptimType, f"EXACT_{optimizer.upper()}"),
        learning_rate=_LR,
        eps=_EPS,
    )
    for weight in module.split_embedding_weights():
        weight.fill_(_VALUE)
    for states in module.split_optimizer_states():
        for state in states:
            state.zero_()
    offsets = torch.arange(case.tables * case.batch + 1, device=device)
    grad = _gradient(case, device)
    return Provider(
        lambda indices: module(indices, offsets),
        lambda indices: module(indices, offsets).backward(grad),
        lambda: module.split_embedding_weights()[0],
    )


def bags(case: Case, optimizer: str, device: str = "cpu") -> Provider:
    """An `nn.EmbeddingBag` for each table with sparse gradients, and an optimizer of torch.

    Args:
        case: Sizes.
        optimizer: "Adagrad" or "SGD".
        device: "cpu" or "cuda".
    """
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; torch warns if unsaid
    tables = [
        nn.EmbeddingBag.from_pretrained(
            torch.full((case.rows, case.dim), _VALUE, device=device),
            freeze=False, mode="sum", sparse=True,
        )
        for _ in range(case.tables)
    ]  # fmt: skip
    grads = list(_gradient(case, device).split(case.dim, dim=1))
    weights = [table.weight for table in tables]
    updater = {
        "Adagrad": lambda: torch.optim.Adagrad(weights, lr=_LR, eps=_EPS),
        "SGD": lambda: torch.optim.SGD(weights, lr=_LR),
    }[optimizer]()

    def forward(indices: Tensor) -> Sequence[Tensor]:
        parts = indices.view(case.tables, case.batch, 1)
        return [table(part) for table, part in zip(tables, parts, strict=True)]

    def step(indices: Tensor) -> None:
        updater.zero_grad()
        torch.autograd.backward(forward(indices), grads)
        updater.step()

    return Provider(forward, step, lambda: tables[0].weight.detach())
