"""Where a pretrained model or tokenizer is: a folder, a fetched entry, or a name on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlkit.data.offline import ENTRIES, data_root
from mlkit.errors import MissingDataError

__all__ = ["find_pretrained", "loading"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_OWN_COPY = "give a folder of yours: model.net.pretrained=/path (or data.tokenizer=/path)"


def find_pretrained(name: str) -> str:
    """Return what `from_pretrained` takes. Opens no connection.

    Args:
        name: A folder, the name of an offline entry, or a hub name such as "owner/model".

    Raises:
        MissingDataError: If it names an entry that was not fetched, or a folder that is not there;
            the message gives the command.
    """
    path = Path(name).expanduser()
    entry = ENTRIES.get(path.name)
    if entry is not None and len(path.parts) == 1 and not path.is_dir():
        path = data_root() / name
    if path.is_dir():
        return str(path)
    if entry is not None:
        raise MissingDataError(
            f"{entry.name} is not at {path}; fetch it with {entry.command}, or {_OWN_COPY}"
        )
    if not _HUB_NAME.fullmatch(name):
        raise MissingDataError(f"there is no folder {path}; {_OWN_COPY}, or a name on the hub")
    return name


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for a name that it cannot load into an error in words.

    Raises:
        MissingDataError: In place of the `OSError` or `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MissingDataError(
            f"{name} cannot be loaded: {reason} Where the hub is out of reach, {_OWN_COPY}"
        ) from error
