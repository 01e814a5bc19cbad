"""Small models for recipes and tests: MLP, CNN, ResNets with the CIFAR stem."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
