"""Embedding tables that take less memory: FIITED's dynamic dimensions, and its rivals.

`mlkit.convert(model, FIITEDConfig(memory_budget=0.35))` turns the `nn.EmbeddingBag`s of a model
into tables that train within a fixed number of bytes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
