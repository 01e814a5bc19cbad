"""The registry: what an entry must say, where data are looked for, what a content hash covers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mlkit.data import offline
from mlkit.data.offline import ENTRIES, Entry, Member, content_hash, data_root, lookup, require
from mlkit.errors import InvalidValueError, MissingDataError

PACKAGE = Path(offline.__file__).parents[1]


def fill(folder: Path, entry: Entry) -> Path:
    for product in entry.produces:
        path = folder / product
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def test_every_entry_is_complete_and_its_converter_imports() -> None:
    assert {"fashion_mnist", "mnist10k"} <= set(ENTRIES)
    for name, entry in ENTRIES.items():
        assert entry.name == name
        assert callable(entry.load_converter())
        for text in (entry.package, entry.version, entry.licence, entry.citation, entry.about):
            assert text.strip(), name
        assert entry.homepage.startswith("https://"), name
        assert entry.size_bytes > 0
        for path in (*entry.produces, *(member.path for member in entry.members)):
            assert not Path(path).is_absolute()
            assert ".." not in Path(path).parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Fashion MNIST"}, "lower case letters"),
        ({"name": "../up"}, "lower case letters"),
        ({"name": "all"}, "not 'all'"),
        ({"ecosystem": "cargo"}, "one of pip, sdist, npm, deb, got 'cargo'"),
        ({"members": ()}, "at least one member"),
        ({"produces": ()}, "at least one member and one product"),
        ({"members": (Member("a"),)}, "archive_sha256 or the sha256 of every member"),
        ({"members": (Member("a", "b0564c3eedabfbf8"),)}, "64 lower case hex digits"),
        ({"archive_sha256": "A" * 64}, "64 lower case hex digits"),
        ({"ecosystem": "sdist"}, "pip runs its setup.py"),
    ],
)
def test_a_wrong_entry_fails_when_it_is_written(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        dataclasses.replace(ENTRIES["fashion_mnist"], **changes)  # type: ignore[arg-type]


def test_lookup_of_a_typo_names_the_nearest() -> None:
    with pytest.raises(InvalidValueError, match="'fashion-mnist': did you mean 'fashion_mnist'"):
        lookup("fashion-mnist")


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLKIT_DATA", raising=False)
    assert data_root() == tmp_path / ".cache" / "mlkit"
    monkeypatch.setenv("MLKIT_DATA", "")
    assert data_root() == tmp_path / ".cache" / "mlkit"
    monkeypatch.setenv("MLKIT_DATA", "~/elsewhere")
    assert data_root() == tmp_path / "elsewhere"
    monkeypatch.setenv("MLKIT_DATA", "relative")
    assert data_root().is_absolute()


def test_require_names_both_commands_and_the_override(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path))
    with pytest.raises(MissingDataError) as caught:
        require("mnist10k")
    for part in (
        str(tmp_path / "mnist10k"),
        "python scripts/fetch_data.py mnist10k",
        "python -m mlkit.data.fetch mnist10k",
        "data.root=/path/to/your/copy",
    ):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_require_finds_fetched_folders_and_own_copies_but_not_half_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = ENTRIES["mnist10k"]
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path / "cache"))
    folder = fill(tmp_path / "cache" / "mnist10k", entry)
    assert require("mnist10k") == folder
    assert require("mnist10k", tmp_path / "cache") == folder
    assert require("mnist10k", folder) == folder
    own = fill(tmp_path / "own", entry)
    assert require("mnist10k", str(own)) == own

    (folder / entry.produces[2]).unlink()
    with pytest.raises(MissingDataError, match=f"no {entry.produces[2]}"):
        require("mnist10k")
    with pytest.raises(MissingDataError, match=r"neither in .*typo nor in"):
        require("mnist10k", tmp_path / "typo")


def test_the_default_folder_itself_is_not_taken_for_an_own_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fill(tmp_path, ENTRIES["mnist10k"])
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path))
    with pytest.raises(MissingDataError):
        require("mnist10k")


def test_content_hash_sees_bytes_names_and_nothing_else(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, ("a/x", "b", "a-c")), (second, ("b", "a-c", "a/x"))):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    value = content_hash(first)
    assert len(value) == 16
    assert int(value, 16) >= 0
    assert content_hash(str(second)) == value
    (second / ".DS_Store").write_text("noise")
    (second / "empty").mkdir()
    assert content_hash(second) == value

    (second / "b").rename(second / "c")
    assert content_hash(second) != value
    (second / "c").rename(second / "b")
    assert content_hash(second) == value
    (second / "b").write_text("B")
    assert content_hash(second) != value


def test_content_hash_keeps_file_borders_apart(tmp_path: Path) -> None:
    for folder, parts in (("one", ("ab", "c")), ("two", ("a", "bc"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1").write_text(parts[0])
        (tmp_path / folder / "2").write_text(parts[1])
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")


def test_content_hash_ignores_hidden_parents_of_the_folder(tmp_path: Path) -> None:
    """The default root lies under a hidden folder."""
    for folder in ("plain", ".cache/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    assert content_hash(tmp_path / "plain") == content_hash(tmp_path / ".cache/deep")
    assert content_hash(tmp_path / "plain") != content_hash(tmp_path / "empty")


def test_content_hash_of_nothing_is_missing_data(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no folder at"):
        content_hash(tmp_path / "none")


def test_the_three_modules_import_no_heavy_package() -> None:
    code = f"""
import sys, types
for name, path in (("mlkit", {str(PACKAGE)!r}), ("mlkit.data", {str(PACKAGE / "data")!r})):
    package = types.ModuleType(name)
    package.__path__ = [path]
    sys.modules[name] = package
import mlkit.data.fetch, mlkit.data.idx, mlkit.data.offline
print(sorted({{"torch", "torchvision", "lightning", "datasets", "rich"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
