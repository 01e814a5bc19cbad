"""Rows of a text data set, read from a configuration and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlkit.errors import InvalidTypeError, InvalidValueError, MlkitError

if TYPE_CHECKING:
    from mlkit.data.text_spec import TextSpec

__all__ = ["TextRows", "read_rows"]


@dataclass(frozen=True)
class TextRows:
    """The columns that a run needs.

    Args:
        texts: A document, or a sentence, a row.
        prompts: What stands before each text, or None.
        labels: Class of each text, or None.
    """

    texts: list[str]
    prompts: list[str] | None = None
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, positions: Sequence[int]) -> TextRows:
        """The rows at these positions."""

        def pick(column: list[Any] | None) -> list[Any] | None:
            return None if column is None else [column[i] for i in positions]

        return TextRows([self.texts[i] for i in positions], pick(self.prompts), pick(self.labels))

    def content_hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of all columns, whatever the file format was."""
        digest = hashlib.sha256()
        for column in (self.prompts, self.texts, self.labels):
            for value in column or ():
                digest.update(json.dumps(value).encode() + b"\n")
            digest.update(b"\0")
        return digest.hexdigest()[:16]


def read_rows(spec: TextSpec, part: str) -> TextRows:
    """Read the "train" or "test" rows of a specification.

    Rows of a language model without any text are left out.

    Raises:
        InvalidTypeError: If the configuration yields something else than rows.
        InvalidValueError: If a column is absent, a text is no string, or a label out of range.
    """
    rows = _load(getattr(spec, part))
    where = f"data.{part} of {spec.name}"
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, str):
        raise InvalidTypeError(
            f"{where} must yield rows (a list of dicts, or a datasets.Dataset), got "
            f"{type(rows).__name__}"
        )
    texts = _texts(rows, spec.text_key, "data.text_key", where)
    prompts = labels = None
    if spec.prompt_key is not None:
        prompts = _texts(rows, spec.prompt_key, "data.prompt_key", where)
    if spec.task == "classification":
        labels = _labels(rows, spec, where)
        empty = next((i for i, text in enumerate(texts) if not text.strip()), None)
        if empty is not None:
            raise InvalidValueError(f"row {empty} of {where} has no text to classify; leave it out")
    else:
        filled = [i for i, text in enumerate(texts) if text.strip()]
        texts = [texts[i] for i in filled]
        prompts = None if prompts is None else [prompts[i] for i in filled]
    if not texts:
        raise InvalidValueError(f"{where} is empty")
    return TextRows(texts, prompts, labels)


def _load(node: Any) -> Any:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, MlkitError):
            raise error.__cause__ from None
        raise


def _column(rows: Any, key: str, option: str, where: str) -> list[Any]:
    names = getattr(rows, "column_names", None)  # of a datasets.Dataset
    if names is None:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise InvalidTypeError(
                    f"row {number} of {where} must be a mapping, got {type(row).__name__}"
                )
            if key not in row:
                names = list(row)
                break
        else:
            return [row[key] for row in rows]
    if key not in names:
        raise InvalidValueError(
            f"a row of {where} has the keys {sorted(names)}, not {key!r}; set {option}"
        )
    return list(rows[key][:])


def _texts(rows: Any, key: str, option: str, where: str) -> list[str]:
    values = _column(rows, key, option, where)
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise InvalidValueError(
                f"row {number} of {where} has the {key} {value!r}, which is no text; set {option}, "
                "or leave the row out"
            )
    return values


def _labels(rows: Any, spec: TextSpec, where: str) -> list[int]:
    values = _column(rows, spec.label_key, "data.label_key", where)
    for number, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < (spec.num_classes or 0):
            raise InvalidValueError(
                f"row {number} of {where} has the label {value!r}; labels must be integers "
                f"0 .. {(spec.num_classes or 0) - 1} (data.num_classes={spec.num_classes})"
            )
    return values
