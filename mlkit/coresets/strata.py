"""Strata of equal score width, and the cut of the hardest: the two halves of CCS.

Source: CCS (arXiv 2210.15809), Algorithm 1. Departures, all our decision: the last stratum is
closed on the right (the official code multiplies the maximum by 1.0001 and loses it when it is not
positive); infinite scores belong to the outermost strata; equal scores are cut by keyed hash.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer

from mlkit.coresets.keyed import CHUNK, draw
from mlkit.coresets.scores import Hard

__all__ = ["Binning", "cut_hardest", "official_strata", "score_range", "stratify"]

Binning = Literal["equal-width", "quantile-clipped"]

_CUT_KEY = 0x6375746F6666
"""Separates the hashes that settle the cut from those that draw the sample."""

_TAIL = 0.001
"""Share of each tail that `quantile-clipped` binning folds into the outermost strata."""


def cut_hardest(
    values: Float[np.ndarray, " n"],
    hard: Hard,
    count: int,
    seed: int,
    ids: Integer[np.ndarray, " n"] | None = None,
) -> tuple[Bool[np.ndarray, " n"], float | None]:
    """Mark the `count` hardest of `values`; among equal ones the smallest hashes go first.

    Returns:
        The mask, and the score of the easiest example removed (None if none is).
    """
    removed = np.zeros(len(values), dtype=bool)
    if count == 0:
        return removed, None
    kth = count - 1 if hard == "low" else len(values) - count
    boundary = np.partition(values, kth)[kth]
    removed = values < boundary if hard == "low" else values > boundary
    ties = np.flatnonzero(values == boundary)
    missing = count - int(np.count_nonzero(removed))
    if missing < len(ties):
        tied_ids = ties if ids is None else ids[ties]
        one_stratum = np.zeros(len(ties), dtype=np.uint8)
        chosen = draw(one_stratum, np.array([missing]), seed ^ _CUT_KEY, tied_ids)
        ties = ties[chosen]
    removed[ties] = True
    return removed, float(boundary)


def score_range(
    values: Float[np.ndarray, " n"], dropped: Bool[np.ndarray, " n"], binning: Binning
) -> tuple[float, float]:
    """Lowest and highest finite score that the strata span, of the rows not dropped."""
    low, high = np.inf, -np.inf
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        part = part[~dropped[start : start + CHUNK]]
        if len(part) and not (np.isfinite(part.min()) and np.isfinite(part.max())):
            part = part[np.isfinite(part)]
        if len(part):
            low, high = min(low, float(part.min())), max(high, float(part.max()))
    if binning == "quantile-clipped" and low < high:
        kept = values[~dropped & np.isfinite(values)]
        low, high = (float(q) for q in np.quantile(kept, [_TAIL, 1 - _TAIL], method="nearest"))
    return (low, high) if low <= high else (0.0, 0.0)


def stratify(
    values: Float[np.ndarray, " n"],
    dropped: Bool[np.ndarray, " n"],
    num_strata: int,
    low: float,
    high: float,
) -> Integer[np.ndarray, " n"]:
    """Stratum of each example, 0 .. num_strata - 1; `num_strata` where dropped.

    stratum = min(k - 1, floor((s - low) / width)), width = (high - low) / k, in float64; scores
    outside [low, high] fall into the outermost strata, and a width of 0 makes one stratum.
    """
    strata = np.empty(len(values), dtype=np.uint8 if num_strata < 256 else np.int32)
    width = (high - low) / num_strata
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK].astype(np.float64)
        part -= low
        if width > 0:
            part /= width
        np.clip(part, 0, num_strata - 1 if width > 0 else 0, out=part)
        strata[start : start + CHUNK] = part
    strata[dropped] = num_strata
    return strata


def official_strata(
    values: Float[np.ndarray, " n"], dropped: Bool[np.ndarray, " n"], num_strata: int
) -> tuple[Integer[np.ndarray, " n"], float, float]:
    """Strata as the official code draws them: half-open, up to maximum * 1.0001, in float32.

    Returns:
        Stratum of each example (`num_strata` where dropped or outside), lowest and highest edge.
    """
    kept = values[~dropped].astype(np.float32)
    low, high = kept.min(), kept.max() * np.float32(1.0001)
    edges = low + np.arange(num_strata + 1, dtype=np.float32) * np.float32(
        (high - low) / num_strata
    )
    strata = np.searchsorted(edges, values.astype(np.float32), side="right") - 1
    strata[dropped | (strata < 0) | (strata >= num_strata)] = num_strata
    return strata, float(low), float(high)
