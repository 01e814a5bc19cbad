"""Movie-review sentences with the mean sentiment that people gave them (Hutto, Gilbert 2014)."""

from __future__ import annotations

import tarfile
from pathlib import Path

from mlkit.data.datasets import write_parquet
from mlkit.data.split import keyed_fraction
from mlkit.errors import RunError

__all__ = ["convert_vader_movie"]

_TEST_FRACTION = 0.2
_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def convert_vader_movie(source: Path, destination: Path) -> None:
    """Write `train.parquet` and `test.parquet` with the columns `sentence, label, idx, rating`.

    The label is positive (1) where the mean rating in [-4, 4] is above 0, else negative (0); `idx`
    is the number of the sentence in the source, from 0. The split is ours: a keyed hash of the
    sentence sends about one in five to the test part, equal sentences to the same part. It is no
    SST-2, though the sentences come from the same site of reviews.
    """
    import datasets

    (packed,) = source.rglob(_ARCHIVE)
    with tarfile.open(packed) as tar:
        stored = tar.extractfile(_MEMBER)
        assert stored is not None  # pinned: it is a regular file
        lines = stored.read().decode("utf-8").split("\r\n")
    parts: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for line in filter(None, lines):
        fields = line.split("\t")
        if len(fields) != 3:
            raise RunError(f"{_MEMBER}: expected number, rating and sentence, got {line[:80]!r}")
        sentence, rating = fields[2], float(fields[1])
        is_test = keyed_fraction(sentence, salt="vader_movie") < _TEST_FRACTION
        parts["test" if is_test else "train"].append(
            {
                "sentence": sentence,
                "label": int(rating > 0),
                "idx": int(fields[0]) - 1,
                "rating": rating,
            }
        )
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "idx": datasets.Value("int64"),
            "rating": datasets.Value("float64"),
        }
    )
    for part, rows in parts.items():
        write_parquet(destination / f"{part}.parquet", rows, features)
