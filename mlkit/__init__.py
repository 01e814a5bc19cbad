"""mlkit: published ML-systems ideas as drop-in PyTorch parts.

The rooms are imported on first use: `mlkit.coresets`.
"""

from mlkit._lazy import lazy_exports

__version__ = "0.1.0"

_ROOMS = {"coresets": "coresets", "data": "data", "models": "models"}

__all__ = ["__version__", *sorted(_ROOMS)]
__getattr__, __dir__ = lazy_exports(__name__, _ROOMS)
