"""What a checkpoint and the store that loads it must have in common, and how they may differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mlkit.embeddings.fiited.config import CHOICES

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.store import DynamicEmbeddingStore

__all__ = ["CLOCK", "clashes", "structure"]

CLOCK = 8
"""Numbers of a store's extra state before those of its `structure`."""

_MATCHING = ("layout", "optimizer", "utility_dtype", "id_map")


def structure(store: DynamicEmbeddingStore) -> dict[str, int]:
    """Return what a checkpoint must have in common with this store, as numbers."""
    config = store.config
    found = {
        "num_tables": len(store.tables.specs),
        "embedding_dim": store.embedding_dim,
        "num_chunks": config.num_chunks,
        **{f: CHOICES[f].index(getattr(config, f)) for f in _MATCHING},
        "seed": 0 if config.id_map == "identity" else config.seed,
    }
    for number, spec in enumerate(store.tables.specs):
        found[f"rows of table {number}"] = spec.num_embeddings
    return found


def clashes(store: DynamicEmbeddingStore, extra: Tensor) -> list[str]:
    """Say in which way the checkpoint behind an extra state is not one of such a store."""
    mine = structure(store)
    found = []
    for (name, own), theirs in zip(mine.items(), extra[CLOCK:].tolist(), strict=False):
        if own == theirs:
            continue
        values = [CHOICES[name][int(v)] if name in CHOICES else int(v) for v in (theirs, own)]
        found.append(f"{name} is {values[0]!r} there and {values[1]!r} here")
        if name == "num_tables":
            break  # what follows depends on it
    return found
