"""MovieLens-100k: who liked which film, in the order of time, from RecBole's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from mlkit.data.ctr.columns import data_of_columns
from mlkit.data.ctr.stream import CTRData, TestShare
from mlkit.data.offline import lookup, require
from mlkit.errors import InvalidValueError

__all__ = ["convert_movielens100k", "movielens100k"]

_LIKED = 4
_AGES = (18, 25, 35, 45, 50, 56)
_FILES = {
    "ml-100k.inter": ("user_id", "item_id", "rating", "timestamp"),
    "ml-100k.user": ("user_id", "age", "gender", "occupation", "zip_code"),
    "ml-100k.item": ("item_id", "movie_title", "release_year", "class"),
}


def convert_movielens100k(source: Path, destination: Path) -> None:
    """Copy RecBole's three files as they are."""
    for name in _FILES:
        (found,) = source.rglob(name)
        shutil.copyfile(found, destination / name)


def movielens100k(
    root: str | Path | None = None,
    *,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: TestShare = 0.1,
) -> CTRData:
    """Return the 100,000 ratings, oldest first; the label says whether the rating is 4 or 5.

    Tables: user, item, the user's age (in MovieLens-1M's seven groups), gender, occupation and the
    first character of the zip code, the item's year and first genre. There is no dense feature. A
    random split would be easier by 0.075 in AUC, because it looks into the future.

    Args:
        root: Folder of the files `ml-100k.inter`, `.user`, `.item`, or of fetched sets.
        seed: Not used: nothing is drawn.
        val_fraction: Share of the ratings for validation.
        test_fraction: Share of the ratings for testing, or "last_day".

    Raises:
        MissingDataError: If a file is absent.
        InvalidValueError: If a file is malformed; the message names the file and the line.
    """
    folder = require("movielens100k", root)
    ratings, users, items = (
        _read_atomic(folder / name, columns) for name, columns in _FILES.items()
    )
    user_rows = _positions(folder / "ml-100k.inter", "user_id", ratings, users)
    item_rows = _positions(folder / "ml-100k.inter", "item_id", ratings, items)
    ages = np.array(_numbers(folder / "ml-100k.user", "age", users))
    scores = np.array(_numbers(folder / "ml-100k.inter", "rating", ratings))
    columns = {
        "user": np.array(ratings["user_id"]),
        "item": np.array(ratings["item_id"]),
        "age": np.searchsorted(_AGES, ages, side="right")[user_rows],
        "gender": np.array(users["gender"])[user_rows],
        "occupation": np.array(users["occupation"])[user_rows],
        "zip_prefix": np.array([code[:1] for code in users["zip_code"]])[user_rows],
        "year": np.array(items["release_year"])[item_rows],
        "genre": np.array([genres.split(" ")[0] for genres in items["class"]])[item_rows],
    }
    return data_of_columns(
        name="movielens100k",
        licence=lookup("movielens100k").licence,
        seconds=_numbers(folder / "ml-100k.inter", "timestamp", ratings),
        columns=columns,
        dense=np.empty((len(scores), 0)),
        label=scores >= _LIKED,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )


def _read_atomic(path: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """The columns of one of RecBole's atomic files: tab separated, header `name:type`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [cell.partition(":")[0] for cell in lines[0].split("\t")] if lines else []
    if header != list(names):
        raise InvalidValueError(
            f"{path}, line 1: expected the columns {', '.join(names)} (name:type, separated by "
            f"tabs), got {lines[0][:80] if lines else 'nothing'!r}"
        )
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise InvalidValueError(
                f"{path}, line {number}: expected {len(names)} cells, got {len(row)}: "
                f"{lines[number - 1][:80]!r}"
            )
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def _positions(
    path: Path, key: str, ratings: dict[str, list[str]], side: dict[str, list[str]]
) -> list[int]:
    """Row of the side file for each rating."""
    known = {value: row for row, value in enumerate(side[key])}
    for number, value in enumerate(ratings[key], 2):
        if value not in known:
            raise InvalidValueError(
                f"{path}, line {number}: {key} {value!r} is in no row of the side file"
            )
    return [known[value] for value in ratings[key]]


def _numbers(path: Path, name: str, columns: dict[str, list[str]]) -> list[float]:
    found = []
    for number, text in enumerate(columns[name], 2):
        try:
            found.append(float(text))
        except ValueError:
            raise InvalidValueError(
                f"{path}, line {number}: {name} must be a number, got {text!r}"
            ) from None
    return found
