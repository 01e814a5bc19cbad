"""Small models for recipes and tests: MLP, CNN, ResNets with the CIFAR stem."""

from typing import TYPE_CHECKING

from mlkit._lazy import lazy_exports

if TYPE_CHECKING:
    from mlkit.models.features import extract_features
    from mlkit.models.lightning import Classifier
    from mlkit.models.resnet import resnet_cifar
    from mlkit.models.small import CNN, MLP

_EXPORTS = {
    "CNN": "small",
    "MLP": "small",
    "Classifier": "lightning",
    "extract_features": "features",
    "resnet_cifar": "resnet",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
