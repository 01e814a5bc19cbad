"""mlkit: published ML-systems ideas as drop-in PyTorch parts.

`convert` and `restore` are the verbs for modules. The rooms are imported on first use:
`mlkit.coresets`, `mlkit.data`, `mlkit.models`, `mlkit.sparsity`. A package's public names are
listed in its `__init__.pyi`, which also drives the lazy imports.
"""

import lazy_loader

# At once, not lazily: importing the submodule binds `mlkit.convert` to it, and the next name binds
# the function over it, in that order and for good. It costs no import of torch.
from mlkit.convert import convert as convert
from mlkit.convert import restore as restore

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
