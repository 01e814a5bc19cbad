"""Rows by Hugging Face datasets: every place they can be in, and what is refused."""

import csv
import json

import datasets
import pytest

from mlkit.data.datasets import load_rows, write_parquet
from mlkit.errors import InvalidValueError, MissingDataError

ROWS = [{"text": f"line {i}", "label": i % 2} for i in range(10)]


@pytest.fixture
def files(tmp_path):
    texts = [row["text"] for row in ROWS]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    write_parquet(tmp_path / "a.parquet", ROWS)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.txt", "text"), ("a.jsonl", "json"), ("a.csv", "csv"), ("a.parquet", "parquet")],
)
def test_formats_hold_the_same_rows(files, name, format):
    rows = load_rows(data_files=str(files / name), format=format)
    assert rows["text"][:] == [row["text"] for row in ROWS]
    if format != "text":
        assert rows["label"][:] == [row["label"] for row in ROWS]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_slice_of_files_is_a_part_of_them(files, split):
    arguments = {"data_files": [str(files / "a.txt")], "format": "text"}
    first = load_rows(split=f"{split}[:80%]", **arguments)
    last = load_rows(split=f"{split}[80%:]", **arguments)
    assert first["text"][:] + last["text"][:] == [row["text"] for row in ROWS]
    assert len(last) == 2


def test_options_reach_the_builder(files):
    (files / "b.txt").write_text("one\ntwo\n\nthree")
    rows = load_rows(data_files=str(files / "b.txt"), sample_by="paragraph")
    assert rows["text"][:] == ["one\ntwo", "three"]


def test_words_that_pandas_takes_for_nothing_stay_text(files):
    (files / "b.csv").write_text('text,label\nnull,0\nNA,1\n"",0\n')
    assert load_rows(data_files=str(files / "b.csv"), format="csv")["text"][:] == ["null", "NA", ""]


def test_saved_data_sets_are_found_by_path(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load_rows(path=str(tmp_path / "one"), split="anything")) == 10
    assert len(load_rows(path=str(tmp_path / "two"), split="test")) == 1
    with pytest.raises(InvalidValueError, match="has no split 'tset'; did you mean 'test'"):
        load_rows(path=str(tmp_path / "two"), split="tset")


def test_a_folder_of_files_is_what_datasets_makes_of_it(tmp_path):
    write_parquet(tmp_path / "train.parquet", ROWS)
    write_parquet(tmp_path / "test.parquet", ROWS[:3])
    assert len(load_rows(path=str(tmp_path), split="test")) == 3


def test_columns_take_new_names(files):
    rows = load_rows(
        data_files=str(files / "a.parquet"), format="parquet", rename={"text": "sentence"}
    )
    assert rows.column_names == ["sentence", "label"]
    with pytest.raises(InvalidValueError, match="no column 'txt'; did you mean 'text'"):
        load_rows(data_files=str(files / "a.parquet"), format="parquet", rename={"txt": "x"})


def test_parquet_keeps_the_names_of_classes(tmp_path):
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    write_parquet(tmp_path / "a.parquet", ROWS, features)
    rows = load_rows(data_files=str(tmp_path / "a.parquet"), format="parquet")
    assert rows.features["label"].names == ["bad", "good"]
    assert rows["label"][:] == [row["label"] for row in ROWS]


@pytest.mark.parametrize("place", [{}, {"data_files": "a", "path": "b"}])
def test_one_place_is_needed(place):
    with pytest.raises(InvalidValueError, match=r"either data_files or path.*data\.train\.path="):
        load_rows(**place)


def test_what_is_absent_is_said_with_the_way_out(files):
    with pytest.raises(MissingDataError, match=r"none\.txt cannot be loaded: .*data_files="):
        load_rows(data_files=str(files / "none.txt"))
    with pytest.raises(MissingDataError, match=r"owner/none cannot be loaded: .*hub is out of rea"):
        load_rows(path="owner/none")
    with pytest.raises(InvalidValueError, match=r"Unknown split"):
        load_rows(data_files=str(files / "a.txt"), split="train+other")
