"""Which clicks a run should learn from, checked before anything is loaded (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlkit.data.ctr.blocks import files_of
from mlkit.data.ctr.stream import CTRStream, TestShare, check_fractions
from mlkit.data.offline import check_root
from mlkit.errors import InvalidValueError, MlkitError

__all__ = ["CTRSpec"]


@dataclass(kw_only=True)
class CTRSpec:
    """A set of clicks, its split by time and its batches, as configuration.

    Args:
        name: Name in reports.
        stream: Configuration (`_target_`) of a function that returns a `CTRStream`; it is also
            given `seed`, `val_fraction` and `test_fraction`.
        root: Folder of a fetched set, or None.
        path: A user's own file, or several in the order of time, where `stream` takes a `path`.
        batch_size: Examples per batch.
        val_fraction: Share of the examples for validation, in [0, 1), just before the test part.
        test_fraction: Share of the examples for testing, in [0, 1): the last ones; or "last_day".

    Raises:
        InvalidValueError: For a value out of range.
    """

    name: str
    stream: Mapping[str, Any]
    root: str | None = None
    path: str | Sequence[str] | None = None
    batch_size: int = 1024
    val_fraction: float = 0.1
    test_fraction: TestShare = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InvalidValueError(
                f"data.batch_size must be an integer of at least 1, got {self.batch_size!r}"
            )
        check_fractions(self.val_fraction, self.test_fraction)

    def check_files(self) -> None:
        """Raise if the files are absent, naming the command that fetches them.

        Raises:
            MissingDataError: If `root` is set and incomplete, or the user's own files are needed
                and absent.
        """
        check_root(self.name, self.root)
        if "path" in self.stream:
            files_of(self.name, self.path)

    def load(self, seed: int) -> CTRStream:
        """Return the stream; `seed` keys what is generated, and nothing of what is read."""
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        shares = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        try:
            stream: CTRStream = instantiate(self.stream, seed=seed, **shares, _convert_="all")
        except InstantiationException as error:
            if isinstance(error.__cause__, MlkitError):
                raise error.__cause__ from None
            raise
        return stream
