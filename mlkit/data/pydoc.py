"""The running Python's own help texts: a third of a megabyte of English prose on every machine."""

from __future__ import annotations

import re
from typing import Literal

from mlkit.data.split import hold_out, keyed_order
from mlkit.errors import InvalidValueError

__all__ = ["pydoc"]

_TEST_FRACTION = 0.1


def pydoc(split: Literal["train", "test"]) -> list[dict[str, str]]:
    """Return rows `{"topic", "text"}` of `pydoc_data.topics`, a document per help topic.

    The help holds many passages twice (the topic "for" is a part of "compound"), a quarter of all
    characters in Python 3.11; a topic that mostly repeats longer ones is left out, or the test
    would be on training text. The split by topic is ours: a keyed hash orders the topics, and those
    that make up a tenth of the characters are the test part. Texts differ between versions of
    Python, and so do results. Licence: PSF-2.0.

    Raises:
        InvalidValueError: For another split.
    """
    from pydoc_data.topics import topics

    if split not in ("train", "test"):
        raise InvalidValueError(f"split must be 'train' or 'test', got {split!r}")
    names = sorted(_without_repeats(topics))
    sizes = [len(topics[name]) for name in names]
    test = set(hold_out(sizes, _TEST_FRACTION, keyed_order(names, salt="pydoc")))
    return [
        {"topic": name, "text": topics[name]}
        for number, name in enumerate(names)
        if (number in test) == (split == "test")
    ]


def _without_repeats(topics: dict[str, str]) -> list[str]:
    """Names of the topics less than half of whose text is in the paragraphs of longer ones."""
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        blocks = re.split(r"\n\s*\n", topics[name])
        paragraphs = [" ".join(block.split()) for block in blocks]
        repeated = sum(len(p) for p in paragraphs if p in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept.append(name)
        seen.update(paragraphs)
    return kept
