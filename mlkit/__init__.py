"""mlkit: published ML-systems ideas as drop-in PyTorch parts.

The rooms are imported on first use: `mlkit.coresets`, `mlkit.data`, `mlkit.models`. A package's
public names are listed in its `__init__.pyi`, which also drives the lazy imports.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
