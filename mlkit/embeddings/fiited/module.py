"""What `DynamicEmbedding` and `DynamicEmbeddingBag` have in common: a table of a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.dense import dense_weight, write_dense
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.embeddings.fiited.round import RoundStats
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.embeddings.fiited.tables import TableSpec
from mlkit.embeddings.memory import MemoryReport
from mlkit.errors import InvalidTypeError, nearest

__all__ = ["DynamicTable", "resize_store", "resolve_config"]


def resolve_config(config: FIITEDConfig | None, settings: Mapping[str, Any]) -> FIITEDConfig:
    """Return the config, or one of its fields by name; not both.

    Raises:
        InvalidTypeError: For both, neither, or a name that is no field.
    """
    known = [f.name for f in dataclasses.fields(FIITEDConfig)]
    for name in settings:
        if name not in known:
            raise InvalidTypeError(
                f"{name!r} is neither an argument nor a field of FIITEDConfig; "
                f"{nearest(name, known)}"
            )
    if config is None:
        return FIITEDConfig(**settings)
    if settings:
        raise InvalidTypeError(
            f"give config or its fields, not both; got config and {', '.join(settings)}"
        )
    if not isinstance(config, FIITEDConfig):
        raise InvalidTypeError(f"config must be a FIITEDConfig, got {type(config).__name__}")
    return config


def resize_store(
    store: DynamicEmbeddingStore,
    target_density: float | None,
    memory_budget: int | float | str | None,
) -> None:
    """Give a store another budget."""
    config = dataclasses.replace(
        store.config,
        target_density=target_density,
        memory_budget=memory_budget,
        ramp=None,
        ramp_from=None,
    )
    store.rebudget(config)


class DynamicTable(nn.Module):
    """A table of a `DynamicEmbeddingStore`, which it may share with others.

    There is no attribute `weight`: nothing could be written through it. `dense_weight()` returns a
    copy, `to_dense()` a stock module; a stock checkpoint's key `weight` is read.

    Attributes:
        store: Where the rows are.
        table: Number of the table in the store.
    """

    store: DynamicEmbeddingStore
    table: int
    _stock: type[nn.Module]

    @classmethod
    def of_store(cls, store: DynamicEmbeddingStore, table: int, **options: Any) -> Self:
        """Make a module for a table of a store that is there already.

        Args:
            store: Shared with the modules of its other tables.
            table: The table's number in it.
            **options: `max_norm`, `norm_type`, `scale_grad_by_freq`, and for bags `mode` and
                `include_last_offset`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._set_up(store, table, **options)
        return made

    def _set_up(
        self,
        store: DynamicEmbeddingStore,
        table: int,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
    ) -> None:
        spec = store.tables.specs[table]
        self.store, self.table = store, table
        self.num_embeddings, self.embedding_dim = spec.num_embeddings, store.embedding_dim
        self.padding_idx, self.sparse = spec.padding_idx, store.sparse
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq = scale_grad_by_freq

    @classmethod
    def _new_store(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        name: str,
        config: FIITEDConfig,
        **kwargs: Any,
    ) -> DynamicEmbeddingStore:
        spec = TableSpec(name, num_embeddings, padding_idx)
        return DynamicEmbeddingStore([spec], embedding_dim, config, **kwargs)

    # ------------------------------------------------------------------- lookups

    @property
    def name(self) -> str:
        """Of the table, as it is in messages."""
        return self.store.tables.specs[self.table].name

    def _flat(self, input: Int[Tensor, "*shape"]) -> Int[Tensor, " n"]:
        if input.dtype not in (torch.int64, torch.int32):
            raise InvalidTypeError(
                f"ids of table {self.name!r} must be int64 or int32, got {input.dtype}"
            )
        return input.reshape(-1)

    def _lookup(
        self,
        ids: Int[Tensor, " n"],
        offsets: Int[Tensor, " bags_plus_1"] | None = None,
        weights: Float[Tensor, " n"] | None = None,
        *,
        bag_size: int = 1,
        mode: str = "sum",
    ) -> Float[Tensor, "bags dim"]:
        found = lookup(
            self.store,
            ids,
            offsets,
            weights,
            tables=(self.table,),
            bag_size=bag_size,
            mode=mode,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
        return found.to(self.store.pool.dtype)

    # -------------------------------------------------------------------- budget

    @property
    def density(self) -> float:
        """Fraction of the table's chunks that have storage now."""
        resident = self.store.resident(self.store.tables.rows_of(self.table))
        return int(resident.sum()) / resident.numel()

    def dims(self) -> Int[Tensor, " rows"]:
        """Return the present dimension of every row."""
        return self.store.dims(self.table)

    def memory_report(self) -> MemoryReport:
        """Return the bytes of the store: of this table and of those that share it."""
        return self.store.memory_report()

    def prune_now(self) -> RoundStats | None:
        """Run a pruning round of the store now, whatever the trigger says."""
        return self.store.prune_now(force=True)

    def resize(
        self,
        *,
        target_density: float | None = None,
        memory_budget: int | float | str | None = None,
    ) -> None:
        """Give the store another budget; see `FIITEDConfig` and `DynamicEmbeddingStore.resize`.

        Raises:
            InvalidValueError: For both or neither, or a budget that does not hold the headers.
        """
        resize_store(self.store, target_density, memory_budget)

    # --------------------------------------------------------------------- dense

    def dense_weight(self) -> Float[Tensor, "rows dim"]:
        """Return a copy of the table as one matrix; chunks without storage are zeros."""
        return dense_weight(self.store, self.table)

    def to_dense(self) -> nn.Module:
        """Return the stock module that computes the same, with weights of its own."""
        options = {name: getattr(self, name) for name in self._stock_options()}
        made = self._stock(
            self.num_embeddings,
            self.embedding_dim,
            _weight=self.dense_weight(),
            **options,
        )
        made.requires_grad_(self.store.root.requires_grad)
        return made.train(self.training)

    def _stock_options(self) -> tuple[str, ...]:
        return ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def _fill(self, embeddings: Tensor, freeze: bool) -> Self:
        write_dense(self.store, self.table, embeddings.detach())
        self.store.root.requires_grad_(not freeze)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Read the `weight` of a stock checkpoint; the rest is the store's."""
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            self._check_padding(weight)
            write_dense(self.store, self.table, weight)
            self.store.is_first_visit(error_msgs)  # it has nothing of its own to load
        elif strict and not any(key.startswith(f"{prefix}store.") for key in state_dict):
            missing_keys.append(f"{prefix}weight")
            self.store.is_first_visit(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_padding(self, weight: Tensor) -> None:
        """Refuse a weight that this module could not reproduce."""

    def extra_repr(self) -> str:
        """Return the table in short."""
        return f"{self.num_embeddings}, {self.embedding_dim}, table={self.name!r}"
