"""Distance to the nearest of a set of rows: matrix products to find it, a difference to measure it.

Source: our decision. |x|^2 + |a|^2 - 2 x.a is fast and loses all digits for near-copies; the
difference of two rows is accurate and slow over all pairs. So products pick, differences measure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mlkit.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["Metric", "as_matrix", "distances_to_nearest"]

Metric = Literal["l2", "cosine"]

_TILE = 4096
"""Anchors compared at once."""

_TOLERANCE = 1e-4
"""Relative error of a squared distance above which a row is searched again in float64."""


def distances_to_nearest(
    targets: torch.Tensor,
    rows: Int[np.ndarray, " t"],
    features: torch.Tensor,
    anchors: Int[np.ndarray, " a"],
    metric: Metric,
    chunk_bytes: int,
) -> Float[np.ndarray, " t"]:
    """Distance of `targets[rows]` to the nearest of `features[anchors]`.

    The search runs in float32 where `features` are, in blocks, with the mean of the anchors as the
    origin. Rows whose product is not accurate to a relative 1e-4 (near-copies, or products in
    reduced precision) are searched again in float64. The distance of the anchor found comes from
    the difference of the two rows, in at least float32.

    Raises:
        InvalidValueError: If widths differ or a feature is not finite.
    """
    import torch

    if targets.shape[1] != features.shape[1]:
        raise InvalidValueError(
            f"features have {features.shape[1]} columns and eval_features {targets.shape[1]}"
        )
    with torch.no_grad():
        device = features.device
        chosen = _prepared(features[torch.from_numpy(anchors).to(device)], metric)
        search = _searcher(chosen)
        step = max(1, chunk_bytes // (4 * max(min(len(chosen), _TILE), features.shape[1], 1)))
        parts = []
        for start in range(0, len(rows), step):
            wanted = torch.from_numpy(rows[start : start + step]).to(targets.device)
            parts.append(search(_prepared(targets[wanted].to(device), metric)).cpu().numpy())
    distances = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    return distances**2 / 2 if metric == "cosine" else distances


def as_matrix(name: str, rows: Any) -> torch.Tensor:
    """Rows as a tensor, without a copy where possible.

    Raises:
        InvalidValueError: If they are not a matrix of real numbers.
    """
    import torch

    if not isinstance(rows, torch.Tensor):
        with warnings.catch_warnings():
            # A read-only array (a memory map) is only read here.
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            rows = torch.as_tensor(np.asarray(rows))
    rows = rows.detach()
    if rows.ndim != 2 or rows.is_complex() or rows.dtype == torch.bool:
        raise InvalidValueError(
            f"{name} must be 2-dimensional real numbers, got shape {tuple(rows.shape)} of "
            f"{rows.dtype}"
        )
    return rows


def _prepared(rows: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Rows in at least float32, of length 1 for the cosine."""
    import torch

    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    wrong = int((~torch.isfinite(rows)).any(dim=1).sum())
    if wrong:
        raise InvalidValueError(
            f"features of {wrong} examples are NaN or infinite; leave these examples out"
        )
    return torch.nn.functional.normalize(rows, dim=1) if metric == "cosine" else rows


def _searcher(anchors: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that maps rows to their distance to the nearest anchor."""
    import torch

    origin = anchors.mean(dim=0)
    fast = (anchors - origin).float()
    squares = fast.square().sum(dim=1)
    noise = (2 + anchors.shape[1] ** 0.5 / 8) * torch.finfo(torch.float32).eps
    tiny = torch.finfo(torch.float32).tiny
    accurate: list[torch.Tensor] = []

    def search(rows: torch.Tensor) -> torch.Tensor:
        x = (rows - origin).float()
        product, nearest = _nearest(x, fast, squares)
        own = x.square().sum(dim=1)
        distance = torch.linalg.vector_norm(rows - anchors[nearest], dim=1)
        square, scale = distance.square(), (own + squares[nearest]).clamp_min(tiny)
        # The anchors found tell how exact the products are: TF32 shows here.
        measured = ((product + own - square).abs() / scale).max()
        doubtful = scale * measured.clamp_min(noise) > _TOLERANCE * square
        again = doubtful.nonzero()[:, 0]
        if len(again):
            device = "cpu" if rows.device.type == "mps" else rows.device  # MPS has no float64.
            middle = origin.to(device).double()
            if not accurate:
                accurate.append(anchors.to(device).double() - middle)
            exact = accurate[0]
            candidates = rows[again].to(device).double() - middle
            _, better = _nearest(candidates, exact, exact.square().sum(dim=1))
            difference = rows[again] - anchors[better.to(rows.device)]
            distance[again] = torch.linalg.vector_norm(difference, dim=1)
        return distance

    return search


def _nearest(
    x: torch.Tensor, anchors: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row: min over anchors of |a|^2 - 2 x.a, and which anchor it is."""
    import torch

    best = torch.full((len(x),), float("inf"), dtype=x.dtype, device=x.device)
    which = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for start in range(0, len(anchors), _TILE):
        part = slice(start, start + _TILE)
        value, row = torch.addmm(squares[part], x, anchors[part].T, alpha=-2).min(dim=1)
        better = value < best
        best = torch.where(better, value, best)
        which = torch.where(better, row + start, which)
    return best, which
