"""WikiText by article (Merity et al. 2016), from its files or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mlkit.data.datasets import load_rows
from mlkit.data.split import hold_out, keyed_order
from mlkit.errors import InvalidValueError, MissingDataError

__all__ = ["wikitext"]

_FILES = ("wiki.{}.raw", "wiki.{}.tokens")
_ONE_FILE = "wikitext2_valid.txt"
_TEST_FRACTION = 0.1
_TITLE = re.compile(r"= (?!=).*(?<!=) =")


def wikitext(
    split: Literal["train", "test"],
    root: str | None = None,
    *,
    path: str = "Salesforce/wikitext",
    config_name: str = "wikitext-2-raw-v1",
    revision: str | None = None,
) -> list[dict[str, str]]:
    """Return rows `{"text"}`, an article each with its title.

    `root` holds the files as published, `wiki.train.raw` and `wiki.test.raw` (or `.tokens`). Where
    it holds the validation file alone, `wikitext2_valid.txt`, that is parted by us: a keyed hash of
    the articles' texts orders them, and those that make up a tenth of the characters are the test
    part; results on it are not WikiText-2's.

    Args:
        split: "train" or "test".
        root: Folder of the files; from the hub if None.
        path: Name on the hub.
        config_name: Configuration there, such as "wikitext-103-raw-v1".
        revision: Revision there.

    Raises:
        InvalidValueError: For another split.
        MissingDataError: If the files are absent, or the hub is out of reach.
    """
    if split not in ("train", "test"):
        raise InvalidValueError(f"split must be 'train' or 'test', got {split!r}")
    if root is None:
        rows = load_rows(path=path, config_name=config_name, revision=revision, split=split)
        return _rows(_articles(rows["text"][:]))
    folder = Path(root).expanduser()
    for name in _FILES:
        if (file := folder / name.format(split)).is_file():
            return _rows(_articles(_lines(file)))
    if not (folder / _ONE_FILE).is_file():
        raise MissingDataError(
            f"data.root={root} holds none of {_FILES[0].format(split)}, {_FILES[1].format(split)} "
            f"and {_ONE_FILE}; get WikiText-2 (CC-BY-SA), or set data.root=null for the hub"
        )
    texts = list(_articles(_lines(folder / _ONE_FILE)))
    order = keyed_order(texts, salt="wikitext")
    test = set(hold_out([len(text) for text in texts], _TEST_FRACTION, order))
    return _rows(text for i, text in enumerate(texts) if (i in test) == (split == "test"))


def _rows(texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split("\n")


def _articles(lines: Iterable[str]) -> Iterable[str]:
    """Join lines to articles; a title is ` = Title = `, sections have more signs."""
    article: list[str] = []
    for line in lines:
        if _TITLE.fullmatch(line.strip()) and any(article):
            yield "\n".join(article)
            article = []
        if line.strip():
            article.append(line.strip())
    if article:
        yield "\n".join(article)
