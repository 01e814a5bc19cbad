"""Dense tables in and out of a store."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.embeddings.fiited.placement import masks_of
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.errors import InvalidValueError

__all__ = ["dense_weight", "write_dense"]

_BLOCK = 1 << 16


@torch.no_grad()
def dense_weight(store: DynamicEmbeddingStore, table: int) -> Float[Tensor, "rows dim"]:
    """Return a table as one matrix, with zeros where a chunk has no storage."""
    place = store.tables.rows_of(table)
    shape = (place.stop - place.start, store.embedding_dim)
    if store.header.is_meta:
        return store.pool.new_empty(shape)
    found = store.pool.new_empty(shape)
    for part, rows in zip(found.split(_BLOCK), _rows(store, table).split(_BLOCK), strict=True):
        part.copy_(store.read(rows))
    return found


@torch.no_grad()
def write_dense(
    store: DynamicEmbeddingStore, table: int, weight: Float[Tensor, "rows dim"]
) -> None:
    """Fill a table from a dense one.

    At density 1 every row is taken as it is. Below, the chunks with the largest norms are, as many
    as the table's share of the budget by its rows (norms of different tables do not compare).

    Raises:
        InvalidValueError: For another shape, or a density below 1 without
            `warm_start="magnitude"`.
    """
    spec = store.tables.specs[table]
    shape = (spec.num_embeddings, store.embedding_dim)
    if tuple(weight.shape) != shape:
        raise InvalidValueError(
            f"the weight of table {spec.name!r} must be of shape {shape}, got {tuple(weight.shape)}"
        )
    if store.header.is_meta:
        raise InvalidValueError(
            f"table {spec.name!r} is on the meta device: model.to_empty(device=...) and "
            "store.reset_parameters() first"
        )
    rows = _rows(store, table)
    if not store.is_whole:
        if store.config.warm_start != "magnitude":
            density = store.density_of(store.target)
            raise InvalidValueError(
                f"a dense weight does not fit into table {spec.name!r} at density {density:.3g}: "
                "FIITEDConfig(warm_start='magnitude') keeps the chunks with the largest norm"
            )
        store.is_warm = True
        masks = _largest(store, table, weight)
        for part in rows.split(_BLOCK):
            store.placement.set_masks(part, torch.zeros_like(part))
        for part, mask in zip(rows.split(_BLOCK), masks.split(_BLOCK), strict=True):
            store.placement.set_masks(part, mask)
    for part, values in zip(rows.split(_BLOCK), weight.split(_BLOCK), strict=True):
        store.write(part, values.to(store.pool.device))


def _rows(store: DynamicEmbeddingStore, table: int) -> Int[Tensor, " rows"]:
    place = store.tables.rows_of(table)
    return torch.arange(place.start, place.stop, device=store.header.device)


def _largest(store: DynamicEmbeddingStore, table: int, weight: Tensor) -> Int[Tensor, " rows"]:
    """Return the mask of the chunks of each row that are kept."""
    spec, per_row = store.tables.specs[table], store.config.num_chunks
    chunks = weight.to(store.pool.device).unflatten(1, (per_row, -1))
    norms = torch.linalg.vector_norm(chunks.float(), dim=2)
    if store.config.prefix:
        norms = norms.cummin(1).values
    if spec.padding_idx is not None:
        norms[spec.padding_idx] = -1
    mine = int(store.resident(store.tables.rows_of(table)).sum())
    count = min(store.share_of(table), store.target - (store.num_resident - mine))
    # Stable: among equals the lower chunk stays, as `prefix` needs it.
    best = torch.sort(norms.flatten(), descending=True, stable=True).indices[:count]
    kept = torch.zeros(norms.numel(), dtype=torch.bool, device=norms.device)
    kept[best] = True
    return masks_of(kept.view_as(norms))
