"""Python's help texts: split by topic, without the passages that the help holds twice."""

import re
from pydoc_data.topics import topics

import pytest

from mlkit.data.pydoc import pydoc
from mlkit.errors import InvalidValueError


def paragraphs(rows):
    blocks = (b for row in rows for b in re.split(r"\n\s*\n", row["text"]))
    return [" ".join(b.split()) for b in blocks]


def test_rows_are_whole_topics_and_the_test_part_is_a_tenth():
    train, test = pydoc("train"), pydoc("test")
    names = [row["topic"] for row in train + test]
    assert len(names) == len(set(names))
    assert all(row["text"] == topics[row["topic"]] for row in train + test)
    sizes = [sum(len(row["text"]) for row in rows) for rows in (train, test)]
    assert 0.09 < sizes[1] / sum(sizes) <= 0.1
    assert sizes[0] > 200_000


def test_nothing_but_repeated_text_is_left_out():
    rows = pydoc("train") + pydoc("test")
    kept = set(paragraphs(rows))
    for name in set(topics) - {row["topic"] for row in rows}:
        own = paragraphs([{"text": topics[name]}])
        assert sum(len(p) for p in own if p in kept) >= 0.5 * sum(map(len, own)), name


def test_little_of_the_test_text_is_in_the_training_text():
    train = set(paragraphs(pydoc("train")))
    test = paragraphs(pydoc("test"))
    assert sum(len(p) for p in test if p in train) < 0.02 * sum(map(len, test))


def test_other_split_is_refused():
    with pytest.raises(InvalidValueError, match="'train' or 'test', got 'val'"):
        pydoc("val")
