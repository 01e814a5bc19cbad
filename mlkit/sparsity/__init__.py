"""Learned structured activation sparsity (LTE): models fine-tuned to use fewer neurons per token.

`mlkit.convert(model, LTEConfig(...))` turns feed-forward layers into `SparseExpertMLP`; any trainer
then trains model and routers, since the losses are in the gradient.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
