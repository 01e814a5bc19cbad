"""The sample of the Open Bandit Dataset: real clicks on ZOZOTOWN's recommendations."""

from __future__ import annotations

import csv
import shutil
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mlkit.data.ctr.columns import data_of_columns
from mlkit.data.ctr.stream import CTRData, TestShare
from mlkit.data.offline import lookup, require
from mlkit.errors import InvalidValueError, nearest

__all__ = ["convert_obd", "obd"]

Policy = Literal["random", "bts"]
Campaign = Literal["all", "men", "women"]

_LOG = ("timestamp", "item_id", "position", "click", *(f"user_feature_{i}" for i in range(4)))
_ITEMS = ("item_id", *(f"item_feature_{i}" for i in range(4)))


def convert_obd(source: Path, destination: Path) -> None:
    """Copy the logs and the items of all policies and campaigns as they are."""
    (root,) = source.rglob("obd")
    for name in lookup("obd").produces:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, destination / name)


def obd(
    root: str | Path | None = None,
    *,
    seed: int = 0,
    policy: Policy = "random",
    campaign: Campaign = "all",
    val_fraction: float = 0.1,
    test_fraction: TestShare = "last_day",
) -> CTRData:
    """Return the log of one policy and campaign, 10,000 rows of a week, oldest first.

    Tables: item, position, hour of the day (UTC), four features of the user, three of the item; the
    item's other feature is dense. Some 40 to 70 rows are clicks: enough for throughput and format,
    not for claims about AUC.

    Args:
        root: Folder of the files `<policy>/<campaign>/*.csv`, or of fetched sets.
        seed: Not used: nothing is drawn.
        policy: Who chose the items: "random", or "bts" (Bernoulli Thompson sampling).
        campaign: "all", "men" or "women".
        val_fraction: Share of the rows for validation.
        test_fraction: Share of the rows for testing, or "last_day".

    Raises:
        MissingDataError: If a file is absent.
        InvalidValueError: For an unknown policy or campaign, or a malformed file; the message names
            the file and the line.
    """
    for key, value, known in (
        ("policy", policy, get_args(Policy)),
        ("campaign", campaign, get_args(Campaign)),
    ):
        if value not in known:
            raise InvalidValueError(f"no {key} {value!r}; {nearest(str(value), known)}")
    folder = require("obd", root) / policy / campaign
    log_path, item_path = folder / f"{campaign}.csv", folder / "item_context.csv"
    log, items = _read_csv(log_path, _LOG), _read_csv(item_path, _ITEMS)
    rows = {item: row for row, item in enumerate(items["item_id"])}
    numbers = enumerate(zip(log["item_id"], log["click"], strict=True), 2)
    for number, (item, click) in numbers:
        if item not in rows or click not in ("0", "1"):
            raise InvalidValueError(
                f"{log_path}, line {number}: expected an item of {item_path.name} and click 0 or "
                f"1, got item {item!r} and click {click!r}"
            )
    of_item = [rows[item] for item in log["item_id"]]
    seconds = _seconds(log_path, log["timestamp"])
    columns = {
        "item": np.array(log["item_id"]),
        "position": np.array(log["position"]),
        "hour": (seconds // 3600 % 24).astype(int),
        **{name: np.array(log[name]) for name in _LOG[4:]},
        **{name: np.array(items[name])[of_item] for name in _ITEMS[2:]},
    }
    return data_of_columns(
        name="obd",
        licence=lookup("obd").licence,
        seconds=seconds,
        columns=columns,
        dense=np.array(items["item_feature_0"], dtype=np.float64)[of_item, None],
        label=np.array(log["click"]) == "1",
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )


def _read_csv(path: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Some columns of a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if absent := [name for name in names if name not in header]:
            raise InvalidValueError(f"{path}, line 1: there is no column {', '.join(absent)}")
        wanted = [header.index(name) for name in names]
        rows = []
        for row in reader:
            if len(row) != len(header):
                raise InvalidValueError(
                    f"{path}, line {reader.line_num}: expected {len(header)} cells, got {len(row)}"
                )
            rows.append([row[column] for column in wanted])
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def _seconds(path: Path, stamps: list[str]) -> np.ndarray:
    """Seconds since 1970 of times such as `2019-11-24 00:00:17.004101+00:00`."""
    found = np.empty(len(stamps))
    for row, stamp in enumerate(stamps):
        try:
            found[row] = datetime.fromisoformat(stamp).timestamp()
        except ValueError:
            raise InvalidValueError(
                f"{path}, line {row + 2}: timestamp must be an ISO time with a zone, got {stamp!r}"
            ) from None
    return found
