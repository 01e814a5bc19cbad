"""How well a coreset covers the data: distances to the nearest chosen example, and their mean.

Source: CCS (Zheng et al., ICLR 2023, arXiv 2210.15809), from memory: S is a p-partial r-cover if
a share p of the distribution lies within r of S, and AUC_pr(S) = integral of r(p) over p in
[0, 1] = E_x[min_{s in S} d(x, s)]; lower is better cover. D2's code takes the
mean over the examples left out; here it runs over all examples, chosen ones included, or over
`eval_features`.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Float, Int

from mlkit.coresets.nearest import Metric, as_matrix, distances_to_nearest
from mlkit.coresets.selection import Selection
from mlkit.errors import InvalidValueError

__all__ = ["coverage_auc", "coverage_curve", "min_distances"]


def min_distances(
    features: Any,
    selected: Any,
    *,
    eval_features: Any = None,
    metric: Metric = "l2",
    chunk_bytes: int = 1 << 26,
) -> Float[np.ndarray, " n"]:
    """Distance of every example to the nearest selected one.

    Memory is bounded by `chunk_bytes` and a copy of the selected features; accuracy is that of
    direct differences, so that copies are at exactly 0 (see `distances_to_nearest`).

    Args:
        features: (N, d) array or tensor, on any device; the search runs there.
        selected: A `Selection`, or positions in `features`.
        eval_features: (M, d), other examples to measure from, such as held-out ones; `features`
            itself if None.
        metric: "l2", or "cosine": 1 - cosine, in [0, 2]; a zero vector is at 1/2 from all others.
        chunk_bytes: Bound on the block of distances, at least 1.

    Returns:
        (N,) or (M,) array, float32, or float64 for float64 features.

    Raises:
        InvalidValueError: If nothing is selected, a position does not exist, shapes do not fit or
            a feature is not finite.

    Example:
        >>> min_distances(np.array([[0.0], [1.0], [5.0]]), [0])
        array([0., 1., 5.])
    """
    if metric not in ("l2", "cosine"):
        raise InvalidValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    if chunk_bytes < 1:
        raise InvalidValueError(f"chunk_bytes must be at least 1, got {chunk_bytes!r}")
    x = as_matrix("features", features)
    positions = _positions(selected, len(x))
    if eval_features is not None:
        targets = as_matrix("eval_features", eval_features)
        rows = np.arange(len(targets))
        return distances_to_nearest(targets, rows, x, positions, metric, chunk_bytes)
    left_out = np.setdiff1d(np.arange(len(x)), positions, assume_unique=True)
    away = distances_to_nearest(x, left_out, x, positions, metric, chunk_bytes)
    distances = np.zeros(len(x), dtype=away.dtype)
    distances[left_out] = away
    return distances


@overload
def coverage_auc(
    features: Any,
    selected: Any,
    *,
    eval_features: Any = None,
    metric: Metric = "l2",
    labels: Any = None,
    eval_labels: Any = None,
    per_class: Literal[False] = False,
    chunk_bytes: int = 1 << 26,
) -> float: ...


@overload
def coverage_auc(
    features: Any,
    selected: Any,
    *,
    eval_features: Any = None,
    metric: Metric = "l2",
    labels: Any = None,
    eval_labels: Any = None,
    per_class: Literal[True],
    chunk_bytes: int = 1 << 26,
) -> dict[int, float]: ...


def coverage_auc(
    features: Any,
    selected: Any,
    *,
    eval_features: Any = None,
    metric: Metric = "l2",
    labels: Any = None,
    eval_labels: Any = None,
    per_class: bool = False,
    chunk_bytes: int = 1 << 26,
) -> float | dict[int, float]:
    """AUC_pr: mean distance to the nearest selected example; lower is better cover.

    Args:
        features: See `min_distances`.
        selected: See `min_distances`.
        eval_features: See `min_distances`.
        metric: See `min_distances`.
        labels: Class of each row of `features`, integers; needed for `per_class`.
        eval_labels: Class of each row of `eval_features`, if these are given.
        per_class: Return class -> mean distance of the class's examples to the nearest selected
            one of the same class; infinite where none is selected.
        chunk_bytes: See `min_distances`.

    Example:
        >>> coverage_auc(np.array([[0.0], [1.0], [5.0]]), [0])
        2.0
    """
    if not per_class:
        distances = min_distances(
            features,
            selected,
            eval_features=eval_features,
            metric=metric,
            chunk_bytes=chunk_bytes,
        )
        if not len(distances):
            raise InvalidValueError("eval_features is empty: there is nothing to cover")
        return float(distances.mean(dtype=np.float64))
    x = as_matrix("features", features)
    own = _classes("labels", labels, len(x))
    chosen = _positions(selected, len(x))
    others = None if eval_features is None else as_matrix("eval_features", eval_features)
    asked = own if others is None else _classes("eval_labels", eval_labels, len(others))
    result = {}
    for label in np.unique(asked):
        members = np.flatnonzero(own == label)
        inside = np.flatnonzero(np.isin(members, chosen))
        if not len(inside):
            result[int(label)] = float("inf")
            continue
        result[int(label)] = coverage_auc(
            x[members],
            inside,
            eval_features=None if others is None else others[np.flatnonzero(asked == label)],
            metric=metric,
            chunk_bytes=chunk_bytes,
        )
    return result


def coverage_curve(
    features: Any,
    selected: Any,
    *,
    eval_features: Any = None,
    metric: Metric = "l2",
    chunk_bytes: int = 1 << 26,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The curve r(p): radius at which a share p of the examples is covered.

    Args:
        features: See `min_distances`.
        selected: See `min_distances`.
        eval_features: See `min_distances`.
        metric: See `min_distances`.
        chunk_bytes: See `min_distances`.

    Returns:
        p = 1/n, 2/n, ..., 1, and the radii, ascending; the mean of the radii is `coverage_auc`.

    Example:
        >>> p, r = coverage_curve(np.array([[0.0], [5.0], [1.0], [2.0]]), [0])
        >>> p.tolist(), r.tolist()
        ([0.25, 0.5, 0.75, 1.0], [0.0, 1.0, 2.0, 5.0])
    """
    distances = min_distances(
        features, selected, eval_features=eval_features, metric=metric, chunk_bytes=chunk_bytes
    )
    n = len(distances)
    return np.arange(1, n + 1) / n, np.sort(distances)


def _positions(selected: Any, num_samples: int) -> Int[np.ndarray, " m"]:
    """Selected positions, checked."""
    if isinstance(selected, Selection):
        selected = selected.indices
    if hasattr(selected, "detach"):
        selected = selected.detach().cpu().numpy()
    indices = np.asarray(selected)
    if indices.size == 0:
        raise InvalidValueError("nothing is selected: no example covers anything")
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise InvalidValueError(
            f"selected must be a Selection or integer positions, got shape {indices.shape} of "
            f"{indices.dtype}"
        )
    if indices.min() < 0 or indices.max() >= num_samples:
        raise InvalidValueError(
            f"selected must lie in [0, {num_samples}), got {indices.min()} to {indices.max()}"
        )
    return np.unique(indices).astype(np.int64)


def _classes(name: str, labels: Any, num_samples: int) -> Int[np.ndarray, " n"]:
    if labels is None:
        raise InvalidValueError(f"per_class=True needs {name}: pass {name}=...")
    if hasattr(labels, "detach"):
        labels = labels.detach().cpu().numpy()
    labels = np.asarray(labels)
    if labels.shape != (num_samples,) or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidValueError(
            f"{name} must be {num_samples} integers, got shape {labels.shape} of {labels.dtype}"
        )
    return labels
