"""Data: specifications, data modules, readers of public formats, the offline registry."""

from typing import TYPE_CHECKING

from mlkit._lazy import lazy_exports

if TYPE_CHECKING:
    from mlkit.data.examples import Examples, TensorExamples
    from mlkit.data.lightning import ClassificationDataModule
    from mlkit.data.offline import data_root, require
    from mlkit.data.spec import DataSpec

_EXPORTS = {
    "ClassificationDataModule": "lightning",
    "DataSpec": "spec",
    "Examples": "examples",
    "TensorExamples": "examples",
    "data_root": "offline",
    "require": "offline",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
