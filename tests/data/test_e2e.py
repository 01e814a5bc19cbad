"""E2E from the challenge's files."""

import hashlib
import shutil

import pytest

from mlkit.data.e2e import e2e
from mlkit.errors import InvalidValueError, MissingDataError
from tests.helpers.data import write_e2e
from tests.helpers.text import public_file


@pytest.mark.parametrize("prefix", ["", "e2e_"])
def test_rows_have_the_names_of_the_hub(tmp_path, prefix):
    write_e2e(tmp_path / "e2e")
    for file in list((tmp_path / "e2e").iterdir()):
        shutil.move(file, file.with_name(prefix + file.name))
    rows = e2e("dev", str(tmp_path / "e2e"))
    assert rows.column_names == ["meaning_representation", "target"]
    assert rows[1] == {
        "meaning_representation": "name[The Place d0], eatType[pub], food[French]",
        "target": 'The Place d0, "pub" 1, has French food.',
    }
    assert len(e2e("test", str(tmp_path / "e2e"))) == 24


def test_absent_file_is_an_error_in_words(tmp_path):
    with pytest.raises(MissingDataError, match=r"neither trainset\.csv nor e2e_trainset\.csv is"):
        e2e("train", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"GEM/e2e_nlg cannot be loaded"):
        e2e("test", None)
    with pytest.raises(InvalidValueError, match="'train', 'dev' or 'test', got 'valid'"):
        e2e("valid", str(tmp_path))


@pytest.mark.parametrize(
    ("part", "file", "rows", "representations", "digest"),
    [
        ("dev", "e2e_devset.csv", 4672, 547, "fc26b78cdb849c80"),
        ("test", "e2e_testset_w_refs.csv", 4693, 630, "edc8db685e39bb98"),
    ],
)
def test_genuine_files(part, file, rows, representations, digest):
    folder = public_file(file, "github.com/tuetschek/e2e-dataset")
    assert hashlib.sha256((folder / file).read_bytes()).hexdigest().startswith(digest)
    got = e2e(part, str(folder))
    assert len(got) == rows
    assert len(set(got["meaning_representation"][:])) == representations
    assert all(text.strip() for text in got["target"][:])
