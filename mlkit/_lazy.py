"""Package exports that are imported on first use (PEP 562), so that a room costs nothing at import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from mlkit.errors import nearest


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose names live in its modules.

    Args:
        package: The package's `__name__`.
        exports: Public name to the submodule that defines it; a name that is itself a submodule
            maps to itself.
    """

    def get(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"{package} has no {name!r}; {nearest(name, exports)}")
        module = importlib.import_module(f"{package}.{exports[name]}")
        return getattr(module, name, module)

    return get, lambda: sorted(exports)
