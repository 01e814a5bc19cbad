"""Avazu's mobile advertising log from your own copy: Kaggle's `train.csv` (or `train.gz`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlkit.data.ctr.blocks import files_of
from mlkit.data.ctr.hashing import hash_cells, sizes_of
from mlkit.data.ctr.lines import LineFormat, LineStream
from mlkit.data.ctr.stream import CTRBatch, TestShare

__all__ = ["avazu"]

_HEADER = (
    b"id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    b"app_category,device_id,device_ip,device_model,device_type,device_conn_type,"
    b"C14,C15,C16,C17,C18,C19,C20,C21"
)
_COLUMNS = tuple(_HEADER.decode().split(","))
_NAMES = _COLUMNS[2:]
_HOUR = rb"[0-9]{6}(?:[01][0-9]|2[0-3])"
_PATTERN = re.compile(
    rb"[^,\0]{1,32},[01],%s(?:,[0-9A-Za-z_.-]{0,32}){%d}" % (_HOUR, len(_NAMES) - 1)
)
_START = re.compile(rb"[^,]*,[^,]*,(%s)," % _HOUR)


def avazu(
    path: str | Path | Sequence[str | Path] | None,
    *,
    seed: int = 0,
    table_sizes: int | Sequence[int] = 100_000,
    val_fraction: float = 0.05,
    test_fraction: TestShare = "last_day",
    max_malformed: int = 100,
    block_bytes: int = 1 << 22,
) -> LineStream:
    """Stream Avazu's rows: comma separated, with a header, in the order of time.

    `hour` (YYMMDDHH) becomes the hour of the day; it and the other 21 columns are tables, hashed
    where the values are not hours. There is no dense feature, and `id` is not used.

    Args:
        path: The file, or several in the order of time; plain or gzip.
        seed: Not used: nothing is drawn.
        table_sizes: Rows of every table but the hours', which has 24; or of each of the 21.
        val_fraction: Share of all rows for validation.
        test_fraction: Share of all rows for testing, or "last_day".
        max_malformed: How many malformed rows a pass over a part may meet.
        block_bytes: Text that is read at once.

    Raises:
        MissingDataError: If no file is named, or it is absent.
        InvalidValueError: For a value out of range.
    """
    sizes = sizes_of(table_sizes, _NAMES[1:])

    def parse(lines: list[bytes]) -> CTRBatch:
        cells = np.array(b",".join(lines).split(b",")).reshape(len(lines), -1)
        hours = cells[:, 2].astype(np.int64) % 100
        return CTRBatch(
            dense=np.empty((len(lines), 0), np.float32),
            sparse=np.column_stack([hours, hash_cells(cells[:, 3:], sizes)]),
            label=(cells[:, 1] == b"1").astype(np.float32),
        )

    expected = f"{len(_COLUMNS)} cells separated by commas, with click 0 or 1 and hour YYMMDDHH"
    return LineStream(
        name="avazu",
        paths=files_of("avazu", path),
        line_format=LineFormat(_PATTERN, expected, parse, header=_HEADER, hour=_hour_of),
        table_sizes=(24, *sizes),
        table_names=_NAMES,
        num_dense=0,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_malformed=max_malformed,
        block_bytes=block_bytes,
    )


def _hour_of(line: bytes) -> bytes | None:
    found = _START.match(line)
    return found and found[1]
