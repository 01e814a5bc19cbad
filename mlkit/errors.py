"""The errors mlkit raises on purpose: one family, so that a caller can catch exactly these.

Every message says what was wrong, the value, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "InvalidTypeError",
    "InvalidValueError",
    "MissingDataError",
    "MissingDependencyError",
    "MlkitError",
    "RunError",
    "UnknownNameError",
    "nearest",
]


class MlkitError(Exception):
    """Parent of every error that mlkit raises on purpose."""


class InvalidValueError(MlkitError, ValueError):
    """A value outside what is allowed: an argument, a configuration key, an array's contents."""


class UnknownNameError(InvalidValueError, KeyError):
    """A name that a mapping does not hold; also a `KeyError`, so that `in` and `get` work."""

    __str__ = Exception.__str__


class InvalidTypeError(MlkitError, TypeError):
    """An object of a kind that the call cannot take."""


class RunError(MlkitError, RuntimeError):
    """Something that can only be seen while running: a clash of states, a directory, a worker."""


class MissingDataError(RunError):
    """A data set's files are not where the configuration says."""


class MissingDependencyError(RunError):
    """An optional package is needed and absent; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint for a misspelt name: the nearest known ones, or all of them if none is near.

    Args:
        name: What the user typed.
        known: What exists.
        count: How many near names to give at most.

    Example:
        >>> nearest("prun_rate", ["prune_rate", "seed"])
        "did you mean 'prune_rate'?"
        >>> nearest("zzz", ["score", "select"])
        'known: score, select'
    """
    names = sorted({str(k) for k in known})
    close = difflib.get_close_matches(name, names, n=count)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + (", ".join(names) if names else "(nothing)")
