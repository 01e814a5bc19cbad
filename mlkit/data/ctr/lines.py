"""A `CTRStream` out of text files that do not fit in memory: one block of lines at a time."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mlkit.data.ctr.blocks import Block, Mark, first_mark, read_blocks
from mlkit.data.ctr.stream import CTRBatch, Split, TestShare, check_split, split_ends
from mlkit.errors import InvalidValueError

__all__ = ["LineFormat", "LineStream"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LineFormat:
    """How a line becomes an example.

    Args:
        pattern: What a line without its end must match in full.
        expected: The same for people.
        parse: Turns lines that match into a batch.
        header: The first line of each file, if it has one.
        hour: Gives the time of a line as digits, of which all but the last two are the day; None
            where lines do not say. Lines must be in the order of time.
    """

    pattern: re.Pattern[bytes]
    expected: str
    parse: Callable[[list[bytes]], CTRBatch]
    header: bytes | None = None
    hour: Callable[[bytes], bytes | None] | None = None


@dataclass(frozen=True)
class _Index:
    num_lines: int
    marks: tuple[Mark, ...]
    days: tuple[int, ...]
    sha256: str


class LineStream:
    """Examples of one or more text files, plain or gzip, read in the order of the files.

    The first use of a split reads all files once, to count lines and to hash them. Parts are
    divided by lines. A malformed line is left out and counted.

    Args:
        name: Name in reports.
        paths: The files, in the order of time.
        line_format: How a line becomes an example.
        table_sizes: Rows of each table.
        table_names: What each table's ids are.
        num_dense: Number of dense features.
        val_fraction: Share of all lines for validation, before the test part.
        test_fraction: Share of all lines for testing, or "last_day": the last day by the lines'
            times, or the last file where there are several without times.
        max_malformed: How many malformed lines a pass over a part may meet.
        block_bytes: Text that is read at once.

    Attributes:
        malformed: Malformed lines in the last whole pass over each part.

    Raises:
        InvalidValueError: For a limit below 0.
    """

    def __init__(
        self,
        *,
        name: str,
        paths: Sequence[Path],
        line_format: LineFormat,
        table_sizes: Sequence[int],
        table_names: Sequence[str],
        num_dense: int,
        val_fraction: float,
        test_fraction: TestShare,
        max_malformed: int = 100,
        block_bytes: int = 1 << 22,
    ) -> None:
        if max_malformed < 0 or block_bytes < 1:
            raise InvalidValueError(
                "max_malformed must be at least 0 and block_bytes at least 1, got "
                f"{max_malformed} and {block_bytes}"
            )
        self.name, self.num_dense = name, num_dense
        self.table_sizes, self.table_names = tuple(table_sizes), tuple(table_names)
        self.malformed: dict[str, int] = {}
        self._paths, self._format = tuple(paths), line_format
        self._fractions = (val_fraction, test_fraction)
        self._max_malformed, self._block_bytes = max_malformed, block_bytes

    @property
    def source(self) -> str:
        """The names of the files and a hash of their text."""
        names = ", ".join(path.name for path in self._paths)
        return f"{self.name} ({names}), text sha256 {self._index.sha256}"

    def num_samples(self, split: Split) -> int:
        """How many lines a part has, malformed ones counted in."""
        start, stop = self._lines(split)
        return stop - start

    def batches(self, split: Split, batch_size: int) -> Iterator[CTRBatch]:
        """The examples of a part in the order of the files; the last batch may be short.

        Raises:
            InvalidValueError: For another part, a size below 1, a damaged file, or more malformed
                lines than allowed; the message names the file and the line.
        """
        check_split(split)
        if batch_size < 1:
            raise InvalidValueError(f"batch_size must be at least 1, got {batch_size}")
        return _rebatch(self._parsed(split), batch_size)

    def _lines(self, split: Split) -> tuple[int, int]:
        check_split(split)
        index = self._index
        train, val = split_ends(index.num_lines, *self._fractions, days=index.days)
        parts = {"train": (0, train), "val": (train, val), "test": (val, index.num_lines)}
        return parts[split]

    def _parsed(self, split: Split) -> Iterator[CTRBatch]:
        start, stop = self._lines(split)
        malformed = 0
        for mark, lines in self._blocks_from(start):
            if mark.line >= stop:
                break
            skipped = max(start - mark.line, 0)
            good = []
            for number, line in enumerate(lines[skipped : stop - mark.line], skipped):
                if self._format.pattern.fullmatch(line):
                    good.append(line)
                    continue
                malformed += 1
                if malformed > self._max_malformed:
                    raise InvalidValueError(
                        f"{mark.path}, line {mark.line_in_file + number}: malformed row number "
                        f"{malformed} of the {split} part, more than max_malformed="
                        f"{self._max_malformed}; expected {self._format.expected}, got "
                        f"{line[:80]!r}"
                    )
            if good:
                yield self._format.parse(good)
        self.malformed[split] = malformed
        if malformed:
            logger.warning("%s: left out %d malformed rows of %s", self.name, malformed, split)

    @cached_property
    def _index(self) -> _Index:
        """Read everything once."""
        digest = hashlib.sha256()
        marks: list[Mark] = []
        days: list[int] = []
        num_lines, last_hour = 0, b""
        for path in self._paths:
            first_line = num_lines
            for block, lines, mark in self._blocks(path, num_lines):
                digest.update(block)
                marks.append(mark)
                num_lines = mark.line + len(lines)
                if self._format.hour is None:
                    if len(self._paths) > 1 and mark.line == first_line:
                        days.append(first_line)
                    continue
                for number, line in enumerate(lines):
                    hour = self._format.hour(line)
                    if hour is None or hour == last_hour:
                        continue
                    if hour < last_hour:
                        raise InvalidValueError(
                            f"{path}, line {mark.line_in_file + number}: hour {hour.decode()} "
                            f"comes after {last_hour.decode()}; rows must be in the order of time"
                        )
                    if hour[:-2] != last_hour[:-2]:
                        days.append(mark.line + number)
                    last_hour = hour
        if not num_lines:
            raise InvalidValueError(
                f"{', '.join(str(path) for path in self._paths)}: there is no row; expected "
                f"{self._format.expected}"
            )
        return _Index(num_lines, tuple(marks), tuple(days), digest.hexdigest()[:16])

    def _blocks_from(self, line: int) -> Iterator[tuple[Mark, list[bytes]]]:
        """Blocks of lines from the one that holds `line` to the end of the last file."""
        marks = self._index.marks
        first = max(int(np.searchsorted([mark.line for mark in marks], line, side="right")) - 1, 0)
        begins = {mark.path: mark for mark in reversed(marks[first:])}
        for path, begin in reversed(begins.items()):
            for _, lines, mark in self._blocks(path, begin):
                yield mark, lines

    def _blocks(self, path: Path, begin: Mark | int) -> Iterator[Block]:
        """Blocks of a file from a mark, or all of them; its first line is then number `begin`."""
        if isinstance(begin, int):
            begin = first_mark(path, begin, self._format.header)
        return read_blocks(begin, self._block_bytes, self._format.expected)


def _rebatch(parts: Iterator[CTRBatch], batch_size: int) -> Iterator[CTRBatch]:
    """The same rows in batches of one size."""
    kept: list[CTRBatch] = []
    count = 0
    for part in parts:
        kept.append(part)
        count += len(part.label)
        if count < batch_size:
            continue
        whole = _join(kept)
        full = count - count % batch_size
        for start in range(0, full, batch_size):
            yield CTRBatch(*(array[start : start + batch_size] for array in whole))
        kept, count = [CTRBatch(*(array[full:] for array in whole))], count - full
    if count:
        yield _join(kept)


def _join(parts: Sequence[CTRBatch]) -> CTRBatch:
    return CTRBatch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
