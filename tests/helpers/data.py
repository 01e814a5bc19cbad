"""Small data sets in the true formats of sets that are not on every machine.

Images are random, with a brightness that depends on the class, so that there is something to learn.
Text is words and numbers, enough for a few blocks of the configured length.
`fixture_overrides` gives what a run needs to take one of them instead of the real set.
"""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from mlkit.data.datasets import write_parquet
from mlkit.data.idx import IDX_FILES, write_idx
from tests.helpers.clicks import write_avazu, write_criteo, write_movielens100k, write_obd

__all__ = ["FIXTURES", "CIFAR10Fixture", "CIFAR100Fixture", "fixture_overrides"]


def _with_own_hashes(cls: type[datasets.CIFAR10]) -> type[datasets.CIFAR10]:
    """A subclass that expects the hashes of the files that are there; all else is stock code."""

    class Fixture(cls):  # type: ignore[valid-type, misc]
        def __init__(self, root: str, **arguments: Any) -> None:
            folder = Path(root) / self.base_folder

            def entry(name: str) -> tuple[str, str]:
                return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

            self.train_list = [entry(name) for name, _ in cls.train_list]
            self.test_list = [entry(name) for name, _ in cls.test_list]
            self.meta = {**cls.meta, "md5": entry(cls.meta["filename"])[1]}
            super().__init__(root, **arguments)

    Fixture.__name__ = Fixture.__qualname__ = f"{cls.__name__}Fixture"
    return Fixture


CIFAR10Fixture = _with_own_hashes(datasets.CIFAR10)
CIFAR100Fixture = _with_own_hashes(datasets.CIFAR100)


def _images(shape: tuple[int, ...], labels: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (len(labels), *shape))
    return (noise + 1.9 * labels.reshape(-1, *[1] * len(shape)) % 190).astype(np.uint8)


def write_cifar10(root: Path, num_train: int = 80, num_test: int = 20) -> None:
    """Write the batches of `cifar-10-batches-py`, `num_train` images over the five of them."""
    folder = root / CIFAR10Fixture.base_folder
    folder.mkdir(parents=True)
    parts = {name: num_train // 5 for name, _ in datasets.CIFAR10.train_list}
    parts |= {name: num_test for name, _ in datasets.CIFAR10.test_list}
    for seed, (name, size) in enumerate(parts.items()):
        labels = np.arange(size) % 10
        content = {
            "batch_label": name,
            "data": _images((3072,), labels * 10, seed),
            "labels": labels.tolist(),
            "filenames": [f"{i}.png" for i in range(size)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / datasets.CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names))


def write_cifar100(root: Path, num_train: int = 80, num_test: int = 20) -> None:
    """Write the files of `cifar-100-python`."""
    folder = root / CIFAR100Fixture.base_folder
    folder.mkdir(parents=True)
    for seed, (name, size) in enumerate({"train": num_train, "test": num_test}.items()):
        labels = np.arange(size) % 100
        content = {
            "data": _images((3072,), labels, seed),
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels // 5).tolist(),
            "filenames": [f"{i}.png" for i in range(size)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": [f"class{i}" for i in range(100)]}
    (folder / datasets.CIFAR100.meta["filename"]).write_bytes(pickle.dumps(names))


def write_mnist(root: Path, class_name: str, num_train: int = 80, num_test: int = 20) -> None:
    """Write the four unpacked idx files of a data set of the MNIST family."""
    folder = root / class_name / "raw"
    folder.mkdir(parents=True)
    for seed, (names, size) in enumerate(((IDX_FILES[:2], num_train), (IDX_FILES[2:], num_test))):
        labels = (np.arange(size) % 10).astype(np.uint8)
        write_idx(folder / names[0], _images((28, 28), labels.astype(int) * 10, seed))
        write_idx(folder / names[1], labels)


def write_parquet_text(root: Path, num_train: int = 30, num_test: int = 6) -> None:
    """Write `train.parquet` and `test.parquet` of documents."""
    root.mkdir(parents=True, exist_ok=True)
    for part, num in (("train", num_train), ("test", num_test)):
        rows = [{"text": f"{part} {i}.\n" + "words and words. " * (5 + i % 7)} for i in range(num)]
        write_parquet(root / f"{part}.parquet", rows)


def write_parquet_sentences(root: Path, num_train: int = 40, num_test: int = 10) -> None:
    """Write `train.parquet` and `test.parquet` of sentences with two labels."""
    root.mkdir(parents=True, exist_ok=True)
    for part, num in (("train", num_train), ("test", num_test)):
        kinds = ("bad", "good")
        rows = [{"sentence": f"a {kinds[i % 2]} film {i}", "label": i % 2} for i in range(num)]
        write_parquet(root / f"{part}.parquet", rows)


def write_e2e(root: Path, num: int = 24) -> None:
    """Write `devset.csv` and `testset_w_refs.csv`, two sentences for each representation."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("devset.csv", "testset_w_refs.csv"):
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for i in range(num):
                place = f"The Place {name[0]}{i // 2}"
                fact = "eatType[pub], food[French]"
                writer.writerow([f"name[{place}], {fact}", f'{place}, "pub" {i}, has French food.'])


def write_wikitext(root: Path, num_train: int = 12, num_test: int = 3) -> None:
    """Write `wiki.train.raw` and `wiki.test.raw`."""
    root.mkdir(parents=True, exist_ok=True)
    for part, num in (("train", num_train), ("test", num_test)):
        article = " \n = {} {} = \n \n Some text , of it . \n \n = = Part = = \n \n More of it . \n"
        text = "".join(article.format(part.title(), i) for i in range(num))
        (root / f"wiki.{part}.raw").write_text(text, encoding="utf-8")


def write_plays(root: Path, num_roles: int = 4) -> None:
    """Write `train.parquet` and `test.parquet` of plays, in which each role says 1,200 characters.

    Role `i` says the letter `i` of the alphabet over and over, so that the next is plain.
    """
    root.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        speeches = []
        for i in range(num_roles):
            line = "abcdefghij"[i] * 59
            speeches.append(f"Role {i}.\n[Aside.] {line}\n{line}\n\n[Exit.]\n\n")
        text = "THE PLAY\n\nACT I.\nScene I. A room.\n\n" + "".join(speeches * 10)
        write_parquet(root / f"{part}.parquet", [{"text": text, "play": f"{part}_play"}])


def write_femnist(root: Path, num_writers: int = 6, per_writer: int = 10) -> None:
    """Write LEAF's `train/*.json` and `test/*.json`, three writers a file."""
    for seed, (split, count) in enumerate({"train": per_writer, "test": 2}.items()):
        (root / split).mkdir(parents=True, exist_ok=True)
        for first in range(0, num_writers, 3):
            users = [f"f{i:04}_{i:02}" for i in range(first, min(first + 3, num_writers))]
            data = {}
            for user in users:
                labels = np.arange(count) + len(user) + first
                pixels = _images((784,), labels % 62, seed + first) / 255
                data[user] = {"x": pixels.round(4).tolist(), "y": (labels % 62).tolist()}
            sizes = [count] * len(users)
            content = {"users": users, "num_samples": sizes, "user_data": data}
            name = f"all_data_{first // 3}_niid_0_keep_0_{split}_9.json"
            (root / split / name).write_text(json.dumps(content))


FIXTURES: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "cifar10": (write_cifar10, "tests.helpers.data.CIFAR10Fixture"),
    "cifar100": (write_cifar100, "tests.helpers.data.CIFAR100Fixture"),
    "fashion_mnist": (lambda root: write_mnist(root, "FashionMNIST"), None),
    "mnist10k": (lambda root: write_mnist(root, "MNIST"), None),
    "brown": (write_parquet_text, None),
    "shakespeare": (write_parquet_text, None),
    "vader_movie": (write_parquet_sentences, None),
    "e2e": (write_e2e, None),
    "wikitext": (write_wikitext, None),
    "femnist": (write_femnist, None),
    "shakespeare_roles": (write_plays, None),
}
"""By the name of the data configuration: who writes the fixture, and the class that reads it where
the stock class insists on hashes."""

CLICKS: dict[str, Callable[[Path], None]] = {
    "movielens100k": write_movielens100k,
    "obd": write_obd,
}
"""Likewise, for clicks."""

LOGS: dict[str, Callable[[Path], Path]] = {"criteo": write_criteo, "avazu": write_avazu}
"""Likewise, for clicks in a file of the user's."""

SHORTER = {"ctr_synthetic": ["data.stream.num_samples=20000"]}
"""What makes less of data that are generated."""


def fixture_overrides(name: str, root: Path) -> list[str]:
    """Write the fixture of a data configuration below `root`; return the overrides that use it.

    Sets that ship with a dependency need none.
    """
    if name in SHORTER:
        return SHORTER[name]
    if name in CLICKS:
        CLICKS[name](root)
        return [f"data.root='{root}'"]
    if name in LOGS:
        return [f"data.path='{LOGS[name](root)}'", "data.stream.table_sizes=50"]
    if name not in FIXTURES:
        return []
    write, target = FIXTURES[name]
    write(root)
    overrides = [f"data.root='{root}'", "data.num_workers=0"]
    if target is not None:
        overrides += [f"data.train._target_={target}", f"data.test._target_={target}"]
    return overrides
