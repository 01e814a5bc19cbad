"""Rows by Hugging Face `datasets`: from files, from a saved data set, or from the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlkit.errors import InvalidValueError, MissingDataError, nearest

if TYPE_CHECKING:
    import datasets

__all__ = ["load_rows", "write_parquet"]

_DEFAULTS = {"csv": {"keep_default_na": False}}
"""Options of a format: pandas would read the text "null" in a CSV file as no text."""


def load_rows(
    *,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    format: str = "text",
    path: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    rename: Mapping[str, str] | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Return one split of a data set, wherever it is.

    `data_files` come first; then `path`, the folder of a data set that `save_to_disk` wrote, or
    else anything that `datasets.load_dataset` takes: a name on the hub, or a folder of files.

    Args:
        split: Name of the split; a slice such as "train[:90%]" cuts one (not of a saved data set).
        data_files: One or more files, or patterns.
        format: Of the files: "text", "csv", "json" or "parquet".
        path: Folder, or name on the hub.
        config_name: Which configuration of a data set on the hub.
        revision: Branch, tag or commit on the hub.
        rename: New column names by old.
        options: Further arguments of `datasets.load_dataset`, such as `sample_by="paragraph"`.

    Raises:
        InvalidValueError: If neither or both of `data_files` and `path` are given, or there is no
            such split, configuration or column.
        MissingDataError: If the files are absent, or the hub is out of reach.
    """
    import datasets

    if (data_files is None) == (path is None):
        raise InvalidValueError(
            f"give either data_files or path, got data_files={data_files!r}, path={path!r}: "
            "data.train.data_files=/my/train.txt (and data.test), or data.train.path=owner/name"
        )
    try:
        if data_files is not None:
            base = re.split(r"\W", split)[0]
            files = [data_files] if isinstance(data_files, str) else list(data_files)
            options = {**_DEFAULTS.get(format, {}), **options}
            rows = datasets.load_dataset(format, data_files={base: files}, split=split, **options)
        elif path is not None and _is_saved(Path(path).expanduser()):
            rows = _split_of(datasets.load_from_disk(Path(path).expanduser()), split, path)
        else:
            rows = datasets.load_dataset(
                path, config_name, split=split, revision=revision, **options
            )
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise MissingDataError(
            f"{data_files or path} cannot be loaded: {_first_line(error)} Where the hub is out of "
            "reach, give files of your own: data.train.data_files=/my/train.txt "
            "data.test.data_files=/my/test.txt with data.train.format and data.test.format"
        ) from error
    except ValueError as error:
        raise InvalidValueError(f"{data_files or path}: {_first_line(error)}") from error
    for old in rename or {}:
        if old not in rows.column_names:
            raise InvalidValueError(
                f"{data_files or path} has no column {old!r}; {nearest(old, rows.column_names)}"
            )
    return rows.rename_columns(dict(rename)) if rename else rows


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _split_of(saved: Any, split: str, path: str) -> Any:
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise InvalidValueError(f"{path} has no split {split!r}; {nearest(split, saved)}")
    return saved[split]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def write_parquet(
    path: Path, rows: Sequence[Mapping[str, Any]], features: datasets.Features | None = None
) -> None:
    """Write rows as a parquet file that keeps `features` such as the names of classes.

    Args:
        path: The file; its folder must exist.
        rows: All with the same keys.
        features: Types of the columns; inferred if None.
    """
    import datasets
    from pyarrow import parquet

    table = datasets.Dataset.from_list([dict(row) for row in rows], features=features)
    content = table.with_format("arrow")[:]
    metadata = table.features.arrow_schema.metadata
    parquet.write_table(content.replace_schema_metadata(metadata), path)
