"""What a dynamic embedding decided: whole rows or parts, and who got how much."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from mlkit.data.ctr import CTRStream, SyntheticCTR
from mlkit.embeddings import dynamic_stores

__all__ = ["chunk_statistics"]


def chunk_statistics(net: nn.Module, stream: CTRStream) -> dict[str, Any]:
    """Return the share of all-or-nothing rows, and how dimensions follow the planted ones.

    `dims_given_frequency` is the partial rank correlation of learned with true dimensions given the
    frequency of a row, over all rows; `frequency_alone` that of frequency with the true dimensions.
    Both need a generated stream.
    """
    stores = dynamic_stores(net)
    whole = part = 0
    for store in stores:
        resident = store.resident(slice(0, store.tables.num_rows))
        ends = int((resident.all(1) | ~resident.any(1)).sum())
        whole, part = whole + ends, part + len(resident) - ends
    found: dict[str, Any] = {
        "density": sum(s.num_resident for s in stores)
        / sum(s.tables.num_rows * s.config.num_chunks for s in stores),
        "all_or_nothing": whole / (whole + part),
    }
    if isinstance(stream, SyntheticCTR) and len(stores) == 1:
        learned = torch.cat([stores[0].dims(t) for t in range(len(stores[0].tables.specs))])
        true, frequency = (np.concatenate(x) for x in (stream.true_dims(), stream.frequency()))
        found["dims_given_frequency"] = partial_rank_correlation(
            learned.numpy(), true, given=frequency
        )
        found["frequency_alone"] = _rank_correlation(frequency, true)
    return found


def partial_rank_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Spearman's correlation of x and y, given a third."""
    xy, xz, yz = (_rank_correlation(a, b) for a, b in ((x, y), (x, given), (y, given)))
    rest = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / rest**0.5 if rest > 0 else 0.0


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)
