"""The MLP of the experts that a router selects (LTE, arXiv 2402.06126), for few tokens at a time.

`sparse_mlp` is the op; `sparse_mlp_reference` its definition; `expert_mask` the router's decisions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
