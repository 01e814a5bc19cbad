"""Tables whose rows are pruned (K = 1) for FBGEMM's inference kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlkit.embeddings.fiited.bag import DynamicEmbeddingBag
from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDependencyError

__all__ = ["to_fbgemm"]


@torch.no_grad()
def to_fbgemm(bags: DynamicEmbeddingBag | Sequence[DynamicEmbeddingBag]) -> Any:
    """Return an `IntNBitTableBatchedEmbeddingBagsCodegen` on the CPU with the rows that are left.

    Weights are float32, exactly those of the tables; rows without storage are dropped and found by
    an index remapping, so that they are zeros as before. Its call takes ids and offsets of all
    tables, one after the other, as int32.

    Args:
        bags: One or more with one mode, "sum" or "mean"; of K = 1, since FBGEMM drops whole rows.

    Raises:
        InvalidTypeError: For something else than `DynamicEmbeddingBag`.
        InvalidValueError: For K above 1, mode "max", several modes, or what FBGEMM has not.
        MissingDependencyError: If FBGEMM is not installed.
    """
    bags = [bags] if isinstance(bags, DynamicEmbeddingBag) else list(bags)
    _check(bags)
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError as error:
        raise MissingDependencyError(
            "to_fbgemm needs fbgemm_gpu: pip install 'mlkit-torch[torchrec]'"
        ) from error
    specs, remappings, weights = [], [], []
    for bag in bags:
        kept, remapping = _kept(bag)
        specs.append(
            (bag.name, len(kept), bag.embedding_dim, SparseType.FP32, EmbeddingLocation.HOST)
        )
        remappings.append(remapping)
        weights.append(kept)
    mode = PoolingMode.SUM if bags[0].mode == "sum" else PoolingMode.MEAN
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs,
        index_remapping=remappings,
        pooling_mode=mode,
        output_dtype=SparseType.FP32,
        device="cpu",
    )
    made.initialize_weights()
    for (stored, _), kept in zip(made.split_embedding_weights(), weights, strict=True):
        raw = kept.contiguous().view(torch.uint8)
        stored.zero_()
        stored[:, : raw.shape[1]] = raw
    return made


def _kept(bag: DynamicEmbeddingBag) -> tuple[Tensor, Tensor]:
    """Return the rows that are resident, and the place of every row among them or -1."""
    resident = bag.dims().cpu() > 0
    remapping = torch.where(resident, resident.cumsum(0) - 1, -1).int()
    kept = bag.dense_weight().cpu().float()[resident]
    return (kept if len(kept) else kept.new_zeros(1, bag.embedding_dim)), remapping


def _check(bags: Sequence[DynamicEmbeddingBag]) -> None:
    for bag in bags:
        if not isinstance(bag, DynamicEmbeddingBag):
            raise InvalidTypeError(f"bags must be DynamicEmbeddingBags, got {type(bag).__name__}")
        if bag.store.config.num_chunks != 1:
            raise InvalidValueError(
                f"FBGEMM drops whole rows: table {bag.name!r} must have num_chunks=1, got "
                f"{bag.store.config.num_chunks}; to_dense() exports any"
            )
        if bag.mode == "max" or (bag.mode == "mean" and bag.padding_idx is not None):
            extra = "" if bag.mode == "max" else " with padding_idx"
            raise InvalidValueError(
                f"FBGEMM has no mode {bag.mode!r}{extra} (table {bag.name!r}); to_dense() exports it"
            )
        if bag.store.config.id_map != "identity":
            raise InvalidValueError(
                f"ids of table {bag.name!r} are hashed, which FBGEMM does not do; to_dense() exports "
                "its rows"
            )
    if not bags or len({bag.mode for bag in bags}) > 1:
        raise InvalidValueError(f"bags must be some of one mode, got {[b.mode for b in bags]}")
