"""Which chunks keep storage, in plain PyTorch: the definition of a pruning round's choice.

The score of a chunk is its utility times a factor of its table (`inverse`), in float32; with
`prefix`, the smallest of that and of the scores of the row's earlier chunks, so that a row keeps
its first chunks only. Non-negative floats are ordered as their bits are: a histogram of the upper
16 bits, then one of the lower 16 within one bin of it, finds the n-th largest score exactly and
without a sort. Scores of zero (chunks never read) take no part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit_kernels.dynamic_embedding.header import HeaderLayout, decode

__all__ = [
    "BINS",
    "Candidates",
    "candidates_reference",
    "histogram_reference",
    "kth_largest",
    "percentile",
    "scores_reference",
]

BINS = 1 << 16
_BLOCK = 1 << 18  # rows at a time: what is made on the way stays small beside the tables


class Candidates(NamedTuple):
    """Chunks that may change sides, by number (row * K + chunk), ascending."""

    evict: Int[Tensor, " evict"]
    evict_scores: Float[Tensor, " evict"]
    admit: Int[Tensor, " admit"]
    admit_scores: Float[Tensor, " admit"]


def scores_reference(
    header: Int[Tensor, "rows words"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: float,
    exponent: int,
    prefix: bool,
) -> Float[Tensor, "rows chunks"]:
    """Scores of the chunks of some rows of one table.

    Args:
        header: These rows of it.
        layout: How it is read.
        num_chunks: K.
        inverse: The table's factor, a float32.
        exponent: Of one-byte utilities.
        prefix: See above.
    """
    utility = layout.utilities(header, num_chunks)
    if layout.utility_bytes == 1:
        utility = decode(utility, exponent)
    score = utility * torch.tensor(inverse, dtype=torch.float32, device=header.device)
    return score.cummin(1).values if prefix else score


def _blocks(tables: Tensor) -> list[tuple[int, int, int]]:
    """Return (table, first row of the header, end) of blocks of rows."""
    return [
        (number, start, min(start + _BLOCK, first + size))
        for number, (first, size, _) in enumerate(tables.tolist())
        for start in range(first, first + size, _BLOCK)
    ]


def histogram_reference(
    header: Int[Tensor, "rows words"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Float[Tensor, " tables"],
    exponent: int = 0,
    prefix: bool = False,
    resident_only: bool = False,
    within: int = -1,
) -> Int[Tensor, "tables 65536"]:
    """Count positive scores, for each table, by the upper 16 bits of the float32.

    Args:
        header: See `header.py`.
        tables: See `reference.py`.
        layout: How the header is read.
        num_chunks: K.
        inverse: Factor of each table, float32.
        exponent: Of one-byte utilities.
        prefix: See above.
        resident_only: Leave chunks without storage out.
        within: A bin of such a histogram: count only its scores, by their lower 16 bits.
    """
    counts = torch.zeros(len(tables), BINS, dtype=torch.int64, device=header.device)
    for table, start, stop in _blocks(tables):
        rows = header[start:stop]
        score = scores_reference(rows, layout, num_chunks, float(inverse[table]), exponent, prefix)
        counted = score > 0
        if resident_only:
            counted &= layout.slots(layout.addresses(rows, num_chunks), num_chunks) >= 0
        bits = score[counted].view(torch.int32).long()
        bits = bits >> 16 if within < 0 else bits[bits >> 16 == within] & 0xFFFF
        counts[table] += torch.bincount(bits, minlength=BINS)
    return counts


def kth_largest(histogram: Int[Tensor, " bins"], k: int) -> tuple[int, int]:
    """Return the bin of the k-th largest entry (k from 1), and how many lie above that bin."""
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, torch.tensor(k, device=above.device)))
    return BINS - 1 - place, int(above[place] - histogram.flip(0)[place])


def percentile(histogram: Int[Tensor, " bins"], share: float) -> float:
    """Return a percentile of the scores behind a histogram, rounded down to 16 bits; 0 if none.

    Args:
        histogram: One table's row of `histogram_reference`.
        share: 0.95 for the smallest score that at least 95 % of the scores do not exceed.
    """
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    rank = max(int(-(-share * total // 1)), 1)
    place = int(
        torch.searchsorted(histogram.cumsum(0), torch.tensor(rank, device=histogram.device))
    )
    return float(torch.tensor(place << 16, dtype=torch.int32).view(torch.float32))


def candidates_reference(
    header: Int[Tensor, "rows words"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    inverse: Float[Tensor, " tables"],
    low: float,
    high: float,
    exponent: int = 0,
    prefix: bool = False,
) -> Candidates:
    """Find resident chunks with a score below `low`, and others with one above `high`.

    The thresholds are float32; padding rows have no utility, so that they are never found.
    """
    evict: list[Tensor] = []
    evict_scores: list[Tensor] = []
    admit: list[Tensor] = []
    admit_scores: list[Tensor] = []
    for table, start, stop in _blocks(tables):
        rows = header[start:stop]
        score = scores_reference(rows, layout, num_chunks, float(inverse[table]), exponent, prefix)
        resident = layout.slots(layout.addresses(rows, num_chunks), num_chunks) >= 0
        score, resident = score.flatten(), resident.flatten()
        for chosen, numbers, scores in (
            (resident & (score < low), evict, evict_scores),
            (~resident & (score > high), admit, admit_scores),
        ):
            place = chosen.nonzero().squeeze(1)
            numbers.append(place + start * num_chunks)
            scores.append(score[place])
    none, no_score = (
        header.new_zeros(0, dtype=torch.int64),
        header.new_zeros(0, dtype=torch.float32),
    )
    return Candidates(
        torch.cat([none, *evict]),
        torch.cat([no_score, *evict_scores]),
        torch.cat([none, *admit]),
        torch.cat([no_score, *admit_scores]),
    )
