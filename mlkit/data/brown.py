"""The Brown corpus: 500 samples of edited American English of 1961, in 15 genres."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlkit.data.datasets import write_parquet
from mlkit.data.split import keyed_order
from mlkit.errors import RunError

__all__ = ["convert_brown"]

_TEST_FRACTION = 0.1


def convert_brown(source: Path, destination: Path) -> None:
    """Write `train.parquet` and `test.parquet` with the columns `text, document, genre`.

    A row is a document of the corpus, a sentence a line, its tokens apart by one space and without
    the word classes. The split is ours: of each genre a tenth of the documents (rounded, at least
    one) in the order of a keyed hash is the test part.
    """
    folder = source / "package"
    genres = dict(line.split() for line in (folder / "cats.txt").read_text().splitlines() if line)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    test = _test_documents(genres)
    for document, genre in sorted(genres.items()):
        text = _text(folder / document)
        part = "test" if document in test else "train"
        rows[part].append({"text": text, "document": document, "genre": genre})
    for part, own in rows.items():
        write_parquet(destination / f"{part}.parquet", own)


def _test_documents(genres: dict[str, str]) -> set[str]:
    chosen = set()
    for genre in set(genres.values()):
        own = sorted(document for document, g in genres.items() if g == genre)
        count = max(1, round(_TEST_FRACTION * len(own)))
        chosen |= {own[i] for i in keyed_order(own, salt="brown")[:count]}
    return chosen


def _text(path: Path) -> str:
    lines = path.read_text(encoding="latin-1").splitlines()
    sentences = [_words(line.split(), path) for line in lines if line.strip()]
    return "\n".join(sentences)


def _words(tokens: Sequence[str], path: Path) -> str:
    """The words of `word/class` tokens; a word may hold a slash, a class may not."""
    words = []
    for token in tokens:
        word, slash, _ = token.rpartition("/")
        if not slash:
            raise RunError(f"{path.name} is not tagged text: it holds {token!r}, not word/class")
        words.append(word)
    return " ".join(words)
