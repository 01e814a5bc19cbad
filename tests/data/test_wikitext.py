"""WikiText by article."""

import pytest

from mlkit.data.wikitext import wikitext
from mlkit.errors import InvalidValueError, MissingDataError
from tests.helpers.data import write_wikitext
from tests.helpers.text import public_file


@pytest.mark.parametrize("suffix", ["raw", "tokens"])
def test_an_article_has_its_title_and_its_sections(tmp_path, suffix):
    root = tmp_path / "wikitext"
    write_wikitext(root)
    for file in list(root.iterdir()):
        file.rename(file.with_suffix(f".{suffix}"))
    train, test = wikitext("train", str(root)), wikitext("test", str(root))
    assert (len(train), len(test)) == (12, 3)
    text = "= Train 3 =\nSome text , of it .\n= = Part = =\nMore of it ."
    assert train[3] == {"text": text}


def test_one_file_is_parted_by_article(tmp_path):
    write_wikitext(tmp_path / "whole", num_train=40)
    (tmp_path / "whole/wiki.train.raw").rename(tmp_path / "wikitext2_valid.txt")
    train, test = wikitext("train", str(tmp_path)), wikitext("test", str(tmp_path))
    titles = [row["text"].splitlines()[0] for row in train + test]
    assert sorted(titles) == sorted(f"= Train {i} =" for i in range(40))
    assert 3 <= len(test) <= 4
    assert test == wikitext("test", str(tmp_path))


def test_absent_file_is_an_error_in_words(tmp_path):
    with pytest.raises(MissingDataError, match=r"holds none of wiki\.train\.raw, .*wikitext2_vali"):
        wikitext("train", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"Salesforce/wikitext cannot be loaded"):
        wikitext("train", None)
    with pytest.raises(InvalidValueError, match="'train' or 'test', got 'valid'"):
        wikitext("valid", str(tmp_path))


def test_genuine_file():
    folder = public_file("wikitext2_valid.txt", "WikiText-2 (pytorch/examples)")
    train, test = wikitext("train", str(folder)), wikitext("test", str(folder))
    texts = [row["text"] for row in train + test]
    assert len(texts) == len(set(texts)) == 60
    words = (folder / "wikitext2_valid.txt").read_text(encoding="utf-8").split()
    assert sum(len(text.split()) for text in texts) == len(words)
    share = sum(len(row["text"]) for row in test) / sum(map(len, texts))
    assert 0.08 < share <= 0.1
