"""Many tables by the names of their features; one kernel call for those of one dimension.

What TorchRec's `EmbeddingBagCollection` does, for dictionaries of tensors; a `KeyedJaggedTensor` is
taken where TorchRec is present (`collection_torchrec.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.converter import StoreSize, split_budget
from mlkit.embeddings.fiited.dense import dense_weight
from mlkit.embeddings.fiited.lookup import lookup
from mlkit.embeddings.fiited.module import resolve_config
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.embeddings.fiited.tables import TableSpec
from mlkit.embeddings.memory import MemoryReport
from mlkit.errors import InvalidTypeError, InvalidValueError, UnknownNameError, nearest

__all__ = ["DynamicEmbeddingBagCollection", "EmbeddingTable"]

_MODES = ("sum", "mean")


@dataclass(frozen=True)
class EmbeddingTable:
    """One table of a collection; TorchRec's `EmbeddingBagConfig` can stand in its place.

    Args:
        name: Differs from those of the other tables.
        num_embeddings: Rows.
        embedding_dim: D.
        feature_names: Features that are looked up in it; the name of the table if there are none.
        pooling: "sum" or "mean".
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: Sequence[str] = ()
    pooling: str = "sum"


class _Call(NamedTuple):
    """Features that one kernel call looks up, with the table of each."""

    store: int
    mode: str
    features: tuple[str, ...]
    tables: tuple[int, ...]
    names: tuple[str, ...]


class _Jagged(NamedTuple):
    """Bags of one feature: of one size, or with offsets [batch + 1]."""

    values: Tensor
    offsets: Tensor | None
    size: int
    weights: Tensor | None

    @property
    def batch(self) -> int:
        return len(self.values) // self.size if self.offsets is None else len(self.offsets) - 1

    def offsets_from(self, start: int) -> Tensor:
        """Offsets of all bags but the end, where `start` ids come before."""
        if self.offsets is not None:
            return self.offsets[:-1].long() + start
        stop = start + len(self.values)
        return torch.arange(start, stop, self.size, device=self.values.device)


class DynamicEmbeddingBagCollection(nn.Module):
    """Tables whose vectors grow and shrink (FIITED), by the names of features.

    Args:
        tables: `EmbeddingTable`s or TorchRec's `EmbeddingBagConfig`s; of the latter's fields,
            initialisers are left to the config.
        config: Its budget holds for all tables together.
        is_weighted: Whether features come with a weight for each id; for pooling "sum".
        sparse: Whether gradients of the pools are sparse tensors.
        device: Of everything.
        dtype: float32, bfloat16 or float64.
        **settings: Fields of `FIITEDConfig`, instead of `config`.

    Attributes:
        embedding_names: Of the outputs, in their order: the features table by table, as
            "feature@table" where several tables share a feature.

    Raises:
        InvalidValueError: For tables of one name, an unknown pooling, and what the config raises.

    Example:
        >>> import torch
        >>> tables = [
        ...     EmbeddingTable("users", 100, 8, ["user"]),
        ...     EmbeddingTable("items", 500, 8, ["seen", "bought"]),
        ... ]
        >>> collection = DynamicEmbeddingBagCollection(tables, target_density=1.0)
        >>> batch = {
        ...     "user": torch.tensor([3, 4]),
        ...     "seen": torch.tensor([[1, 2], [2, 7]]),
        ...     "bought": (torch.tensor([1, 5, 9]), torch.tensor([0, 0, 3])),
        ... }
        >>> collection(batch).shape
        torch.Size([2, 24])
    """

    def __init__(
        self,
        tables: Sequence[Any],
        *,
        config: FIITEDConfig | None = None,
        is_weighted: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = resolve_config(config, settings)
        self.tables = tuple(_own(table, is_weighted) for table in tables)
        self.is_weighted = is_weighted
        groups: dict[int, list[EmbeddingTable]] = {}
        for table in self.tables:
            groups.setdefault(table.embedding_dim, []).append(table)
        names = [table.name for table in self.tables]
        if not names or len(set(names)) < len(names):
            raise InvalidValueError(f"tables must be some, with names of their own, got {names}")
        size = (dtype or torch.get_default_dtype()).itemsize
        sizes = [
            StoreSize([t.num_embeddings for t in group], dim, size) for dim, group in groups.items()
        ]
        stores = []
        for (dim, group), own in zip(groups.items(), split_budget(config, sizes), strict=True):
            specs = [TableSpec(t.name, t.num_embeddings) for t in group]
            stores.append(
                DynamicEmbeddingStore(specs, dim, own, sparse=sparse, device=device, dtype=dtype)
            )
        self.stores = nn.ModuleList(stores)
        self._place = {
            table.name: (number, at)
            for number, group in enumerate(groups.values())
            for at, table in enumerate(group)
        }
        readers = Counter(f for table in self.tables for f in table.feature_names)
        outputs = [
            (table, feature, f"{feature}@{table.name}" if readers[feature] > 1 else feature)
            for table in self.tables
            for feature in table.feature_names
        ]
        self.embedding_names = tuple(name for _, _, name in outputs)
        self.embedding_dims = tuple(table.embedding_dim for table, _, _ in outputs)
        self._calls = self._plan_calls(outputs)

    def _plan_calls(self, outputs: list[tuple[EmbeddingTable, str, str]]) -> list[_Call]:
        made: dict[tuple[int, str], list[tuple[str, int, str]]] = {}
        for table, feature, name in outputs:
            store, at = self._place[table.name]
            made.setdefault((store, table.pooling), []).append((feature, at, name))
        return [
            _Call(store, mode, *(tuple(column) for column in zip(*rows, strict=True)))
            for (store, mode), rows in made.items()
        ]

    def forward(self, features: Any) -> Any:
        """Look all features up.

        Args:
            features: A mapping of each feature's name to ids [batch], ids [batch, size of a bag],
                (values, offsets [batch + 1]), or, with `is_weighted`, (values, offsets, weights);
                others are ignored. Or a `KeyedJaggedTensor`.

        Returns:
            [batch, sum of the dimensions], in the order of `embedding_names`; a `KeyedTensor` for a
            `KeyedJaggedTensor`.

        Raises:
            UnknownNameError: If a feature is not there.
            IndexOutOfRange: For an id outside its table.
            InvalidValueError: For batches of several sizes, or offsets that do not fit.
        """
        if not isinstance(features, Mapping):
            from mlkit.embeddings.fiited.collection_torchrec import pool_keyed

            return pool_keyed(self, features)
        pieces: dict[str, Tensor] = {}
        for call in self._calls:
            found = self._look_up(call, [self._jagged(features, f) for f in call.features])
            if call.names == self.embedding_names:
                return found
            pieces |= zip(call.names, found.chunk(len(call.names), 1), strict=True)
        return torch.cat([pieces[name] for name in self.embedding_names], 1)

    def _jagged(self, features: Mapping[str, Any], name: str) -> _Jagged:
        if name not in features:
            raise UnknownNameError(
                f"feature {name!r} is not in the batch; {nearest(name, features)}"
            )
        given = features[name]
        values, *rest = given if isinstance(given, tuple | list) else (given,)
        if values.dtype not in (torch.int64, torch.int32):
            raise InvalidTypeError(
                f"ids of feature {name!r} must be int64 or int32, got {values.dtype}"
            )
        if len(rest) > 1 and not self.is_weighted:
            raise InvalidValueError(
                f"feature {name!r} has weights: the collection must be made with is_weighted=True"
            )
        weights = rest[1] if len(rest) > 1 else None
        if weights is not None and weights.requires_grad:
            raise InvalidValueError(
                f"weights of feature {name!r} need a gradient, which a collection does not give: "
                "use DynamicEmbeddingBag"
            )
        if rest:
            if not torch.compiler.is_compiling():
                _check_ends(name, rest[0], len(values))
            return _Jagged(values, rest[0], 1, weights)
        if values.dim() == 2 and values.shape[1] == 0:
            return _Jagged(values.flatten(), values.new_zeros(len(values) + 1), 1, None)
        size = values.shape[1] if values.dim() == 2 else 1
        return _Jagged(values.flatten(), None, size, None)

    def _look_up(self, call: _Call, jagged: list[_Jagged]) -> Float[Tensor, "batch columns"]:
        batches = {name: j.batch for name, j in zip(call.features, jagged, strict=True)}
        if len(set(batches.values())) > 1:
            raise InvalidValueError(f"features must have one batch size, got {batches}")
        store = self.stores[call.store]
        assert isinstance(store, DynamicEmbeddingStore)
        values = [j.values for j in jagged]
        offsets = None
        if any(j.offsets is not None or j.size != jagged[0].size for j in jagged):
            offsets, start = [], 0
            for j in jagged:
                offsets.append(j.offsets_from(start))
                start += len(j.values)
            offsets.append(torch.full((1,), start, device=values[0].device))
        weights = None
        if any(j.weights is not None for j in jagged):
            weights = torch.cat([
                torch.ones(len(j.values), device=j.values.device) if j.weights is None
                else j.weights
                for j in jagged
            ])  # fmt: skip
        found = lookup(
            store,
            torch.cat(values),
            None if offsets is None else torch.cat(offsets),
            weights,
            tables=call.tables,
            bag_size=jagged[0].size if offsets is None else 1,
            mode=call.mode,
        )
        return found.to(store.pool.dtype)

    def split(self, found: Float[Tensor, "batch columns"]) -> dict[str, Tensor]:
        """Return the columns of an output by the names of its embeddings."""
        return dict(zip(self.embedding_names, found.split(self.embedding_dims, 1), strict=True))

    @property
    def density(self) -> float:
        """Fraction of all chunks that have storage now."""
        stores: list[Any] = list(self.stores)
        everything = sum(s.tables.num_rows * s.config.num_chunks for s in stores)
        return sum(s.num_resident for s in stores) / everything

    def memory_report(self) -> MemoryReport:
        """Return the bytes of all tables."""
        first, *others = (store.memory_report() for store in self.stores)  # type: ignore[operator]
        for other in others:
            first += other
        return first

    def to_dense(self) -> dict[str, nn.EmbeddingBag]:
        """Return a stock module, with `include_last_offset`, for each table by its name."""
        made = {}
        for table in self.tables:
            number, at = self._place[table.name]
            store: Any = self.stores[number]
            made[table.name] = nn.EmbeddingBag(
                table.num_embeddings,
                table.embedding_dim,
                mode=table.pooling,
                include_last_offset=True,
                _weight=dense_weight(store, at),
            )
        return made


def _own(table: Any, is_weighted: bool) -> EmbeddingTable:
    """Read a config of either kind."""
    pooling = getattr(table.pooling, "value", table.pooling)
    if not isinstance(pooling, str) or pooling.lower() not in _MODES:
        raise InvalidValueError(
            f"pooling of table {table.name!r} must be sum or mean, got {pooling!r}"
        )
    if is_weighted and pooling.lower() != "sum":
        raise InvalidValueError(f"weights are for pooling 'sum', table {table.name!r} has 'mean'")
    features = tuple(table.feature_names) or (table.name,)
    if len(set(features)) < len(features):
        raise InvalidValueError(f"table {table.name!r} has a feature twice: {list(features)}")
    return EmbeddingTable(
        table.name, table.num_embeddings, table.embedding_dim, features, pooling.lower()
    )


def _check_ends(name: str, offsets: Tensor, num_ids: int) -> None:
    """Offsets of several features are put together, so they must end where the ids of each do."""
    ends = offsets[:: max(len(offsets) - 1, 1)].tolist()
    if not ends or (ends[0], ends[-1]) != (0, num_ids):
        raise InvalidValueError(
            f"offsets of feature {name!r} must begin with 0 and end with the number of its ids, "
            f"{num_ids} (one more than there are bags); got "
            f"{f'{ends[0]} to {ends[-1]}' if ends else 'none'}"
        )
