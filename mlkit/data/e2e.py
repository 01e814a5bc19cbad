"""The E2E set: restaurant facts to sentences (Novikova, Dusek, Rieser 2017)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from mlkit.data.datasets import load_rows
from mlkit.errors import InvalidValueError, MissingDataError

if TYPE_CHECKING:
    import datasets

__all__ = ["e2e"]

Part = Literal["train", "dev", "test"]

_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
_ON_THE_HUB = {"train": "train", "dev": "validation", "test": "test"}


def e2e(
    part: Part,
    root: str | None = None,
    *,
    path: str = "GEM/e2e_nlg",
    revision: str | None = "refs/convert/parquet",
) -> datasets.Dataset:
    """Return rows with `meaning_representation` and `target`, one per reference sentence.

    Args:
        part: "train", "dev" or "test".
        root: Folder with the challenge's CSV files, as published (`devset.csv`) or with "e2e_"
            before the name; from the hub if None.
        path: Name on the hub.
        revision: Revision there.

    Raises:
        InvalidValueError: For another part.
        MissingDataError: If the file is absent, or the hub is out of reach.
    """
    if part not in get_args(Part):
        raise InvalidValueError(f"part must be 'train', 'dev' or 'test', got {part!r}")
    if root is None:
        return load_rows(path=path, revision=revision, split=_ON_THE_HUB[part])
    name = _FILES[part]
    folder = Path(root).expanduser()
    for file in (folder / name, folder / f"e2e_{name}"):
        if file.is_file():
            return load_rows(
                data_files=str(file),
                format="csv",
                rename={"mr": "meaning_representation", "ref": "target"},
            )
    raise MissingDataError(
        f"neither {name} nor e2e_{name} is in data.root={root}; get the E2E challenge's files "
        "(github.com/tuetschek/e2e-dataset, CC-BY-SA-4.0), or set data.root=null for the hub"
    )
