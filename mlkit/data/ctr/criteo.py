"""Criteo's click logs from your own copy: Kaggle's `train.txt`, or Terabyte's days."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlkit.data.ctr.blocks import files_of
from mlkit.data.ctr.hashing import hash_cells, sizes_of
from mlkit.data.ctr.lines import LineFormat, LineStream
from mlkit.data.ctr.stream import CTRBatch, TestShare

__all__ = ["criteo"]

_NUM_INTEGERS, _NUM_CATEGORIES = 13, 26
_NAMES = tuple(f"C{number}" for number in range(1, _NUM_CATEGORIES + 1))

_PATTERN = re.compile(
    rb"[01](?:\t(?:-?[0-9]{1,18})?){%d}(?:\t[0-9a-f]{0,16}){%d}" % (_NUM_INTEGERS, _NUM_CATEGORIES)
)


def criteo(
    path: str | Path | Sequence[str | Path] | None,
    *,
    seed: int = 0,
    table_sizes: int | Sequence[int] = 100_000,
    val_fraction: float = 0.05,
    test_fraction: TestShare = 1 / 7,
    max_malformed: int = 100,
    block_bytes: int = 1 << 22,
) -> LineStream:
    """Stream Criteo's rows: tab separated, without header.

    A row is the label, 13 integers (may be empty, may be negative) and 26 categories in hexadecimal
    (may be empty). An integer x becomes sign(x) log(1 + |x|), and 0 where it is empty. A category
    is hashed into its table; an empty one is a category of its own. Both are choices of ours.

    Kaggle's file holds seven days in the order of time without saying when a day begins, so a
    seventh of the rows stands for the last day. Terabyte's `day_0` .. `day_23` are a file each:
    give them as a list, and `test_fraction="last_day"`.

    Args:
        path: The file, or the files in the order of time; plain or gzip.
        seed: Not used: nothing is drawn.
        table_sizes: Rows of every table, or of each of the 26.
        val_fraction: Share of all rows for validation.
        test_fraction: Share of all rows for testing, or "last_day".
        max_malformed: How many malformed rows a pass over a part may meet.
        block_bytes: Text that is read at once.

    Raises:
        MissingDataError: If no file is named, or it is absent.
        InvalidValueError: For a value out of range.
    """
    sizes = sizes_of(table_sizes, _NAMES)

    def parse(lines: list[bytes]) -> CTRBatch:
        cells = np.array(b"\t".join(lines).split(b"\t")).reshape(len(lines), -1)
        integers = cells[:, 1 : 1 + _NUM_INTEGERS]
        values = np.where(integers == b"", b"0", integers).astype(np.float64)
        return CTRBatch(
            dense=(np.sign(values) * np.log1p(np.abs(values))).astype(np.float32),
            sparse=hash_cells(cells[:, 1 + _NUM_INTEGERS :], sizes),
            label=(cells[:, 0] == b"1").astype(np.float32),
        )

    expected = (
        f"label 0 or 1, {_NUM_INTEGERS} integers and {_NUM_CATEGORIES} hexadecimal categories, "
        "separated by tabs, any but the label may be empty"
    )
    return LineStream(
        name="criteo",
        paths=files_of("criteo", path),
        line_format=LineFormat(_PATTERN, expected, parse),
        table_sizes=sizes,
        table_names=_NAMES,
        num_dense=_NUM_INTEGERS,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_malformed=max_malformed,
        block_bytes=block_bytes,
    )
