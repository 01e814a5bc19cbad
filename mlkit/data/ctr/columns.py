"""Columns of small sets: values numbered, rows put in the order of time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mlkit.data.ctr.stream import CTRData, TestShare, split_ends

__all__ = ["data_of_columns"]

_DAY_S = 86_400


def data_of_columns(
    *,
    name: str,
    licence: str,
    seconds: Sequence[float] | np.ndarray,
    columns: Mapping[str, Sequence[str] | np.ndarray],
    dense: np.ndarray,
    label: np.ndarray,
    val_fraction: float,
    test_fraction: TestShare,
) -> CTRData:
    """A `CTRData` whose tables have one row per value that occurs, in any part.

    Args:
        name: Name in reports.
        licence: Goes into the source.
        seconds: When each example happened. Examples of an instant keep their order and are never
            in two parts.
        columns: The values of each table.
        dense: (n, features).
        label: 0 or 1.
        val_fraction: Share of all examples for validation.
        test_fraction: Share of all examples for testing, or "last_day".
    """
    times = np.asarray(seconds, dtype=np.float64)
    order = np.argsort(times, kind="stable")
    times = times[order]
    sizes, ids = [], []
    for values in columns.values():
        known, numbers = np.unique(np.asarray(values), return_inverse=True)
        sizes.append(len(known))
        ids.append(numbers[order].astype(np.int32))
    sparse = np.column_stack(ids)
    dense = np.ascontiguousarray(dense[order], dtype=np.float32)
    label = np.ascontiguousarray(label[order], dtype=np.float32)
    digest = hashlib.sha256()
    for array in (dense, sparse, label):
        digest.update(array.tobytes())
    days = np.flatnonzero(np.diff(times // _DAY_S, prepend=np.nan) != 0)
    return CTRData(
        name=name,
        source=f"{name} (licence: {licence}), arrays sha256 {digest.hexdigest()[:16]}",
        dense=dense,
        sparse=sparse,
        label=label,
        table_sizes=sizes,
        table_names=list(columns),
        ends=split_ends(len(times), val_fraction, test_fraction, days=days, times=times),
    )
