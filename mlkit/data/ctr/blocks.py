"""Lines of text files, a block at a time, plain or gzip, from any marked place."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlkit.errors import InvalidValueError, MissingDataError

__all__ = ["Block", "Mark", "files_of", "first_mark", "read_blocks"]

_LONGEST_LINE = 65_536


@dataclass(frozen=True)
class Mark:
    """Where a block begins.

    Attributes:
        path: The file.
        offset: In its unpacked text, in bytes.
        line: Number of the first line among the rows of all files, from 0.
        line_in_file: Number of the first line in its own file, from 1.
    """

    path: Path
    offset: int
    line: int
    line_in_file: int


Block = tuple[bytes, list[bytes], Mark]
"""Text, its lines without their ends, and where it begins."""


def first_mark(path: Path, line: int, header: bytes | None) -> Mark:
    """Where the rows of a file begin.

    Args:
        path: The file.
        line: Number of its first row among those of all files.
        header: What its first line must be, if it has a header.

    Raises:
        InvalidValueError: If the first line is another.
    """
    if header is None:
        return Mark(path, 0, line, 1)
    with _open(path) as file:
        first = file.readline(_LONGEST_LINE)
    if first.rstrip(b"\r\n") != header:
        raise InvalidValueError(
            f"{path}, line 1: expected the header {header.decode()}, got {first[:80]!r}"
        )
    return Mark(path, len(first), line, 2)


def read_blocks(mark: Mark, block_bytes: int, expected: str) -> Iterator[Block]:
    """Whole lines from a mark to the end of its file.

    Args:
        mark: Where to begin.
        block_bytes: Text that is read at once.
        expected: What a line holds, for people.

    Raises:
        InvalidValueError: If the file is damaged, or a line has no end.
    """
    path = mark.path
    with _open(path) as file:
        file.seek(mark.offset)
        rest, is_end = b"", False
        while not is_end:
            read = file.read(block_bytes)
            is_end = not read
            text = rest + read
            end = len(text) if is_end else text.rfind(b"\n") + 1
            block, rest = text[:end], text[end:]
            if len(rest) > _LONGEST_LINE:
                raise InvalidValueError(
                    f"{path} has no line end within {_LONGEST_LINE} bytes after byte "
                    f"{mark.offset + end}; expected {expected} in each line"
                )
            if not block:
                continue
            lines = [item.removesuffix(b"\r") for item in block.split(b"\n")]
            if block.endswith(b"\n"):
                lines.pop()
            yield block, lines, mark
            mark = Mark(
                path, mark.offset + end, mark.line + len(lines), mark.line_in_file + len(lines)
            )


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A file, unpacked if it is gzip by its first bytes."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not is_gzip:
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidValueError(
                f"{path} is no whole gzip file: {error}; fetch it again"
            ) from error


def files_of(name: str, path: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    """The files that a configuration names.

    Args:
        name: Name of the data set.
        path: One file, or several in the order of time.

    Raises:
        MissingDataError: If none is named, or one is absent.
        InvalidValueError: If one is named twice.
    """
    named = [path] if isinstance(path, str | Path) else list(path or ())
    if not named:
        raise MissingDataError(
            f"{name} cannot be fetched for you, because its terms have to be agreed to: get your "
            "own copy and set data.path=/path/to/the/file (or a list of files in the order of time)"
        )
    files = tuple(Path(item).expanduser() for item in named)
    if len(set(files)) < len(files):
        raise InvalidValueError(f"{name}: data.path names a file twice: {named}")
    for file in files:
        if not file.is_file():
            raise MissingDataError(
                f"{name}: there is no file {file}; set data.path=/path/to/your/copy"
            )
    return files
