"""Shakespeare's plays in modern spelling, from Project Gutenberg."""

from __future__ import annotations

from pathlib import Path

from mlkit.data.datasets import write_parquet
from mlkit.data.split import hold_out, keyed_order

__all__ = ["convert_shakespeare"]

_TEST_FRACTION = 0.1
_SUFFIX = "_gut.txt"
_POEMS = (
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "sonnets",
)


def convert_shakespeare(source: Path, destination: Path) -> None:
    """Write `train.parquet` and `test.parquet` with the columns `text, play`.

    A row is a play with its stage directions, a speech being the name of its role and a full stop
    on one line, then the words. The split is ours and by play: a keyed hash orders the plays, and
    those that make up a tenth of the characters are the test part. The poems are left out.
    """
    (folder,) = source.glob("*/shksprdata/texts")
    plays = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        name = path.name.removesuffix(_SUFFIX)
        if name not in _POEMS:
            plays[name] = path.read_text(encoding="latin-1").strip()
    names = list(plays)
    sizes = [len(text) for text in plays.values()]
    test = set(hold_out(sizes, _TEST_FRACTION, keyed_order(names, salt="shakespeare")))
    for part in ("train", "test"):
        own = [name for i, name in enumerate(names) if (i in test) == (part == "test")]
        rows = [{"text": plays[name], "play": name} for name in own]
        write_parquet(destination / f"{part}.parquet", rows)
