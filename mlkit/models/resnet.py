"""torchvision's ResNets with the stem that CIFAR papers use."""

from __future__ import annotations

from torch import nn

from mlkit.errors import InvalidValueError, MissingDependencyError

__all__ = ["resnet_cifar"]


def resnet_cifar(num_classes: int, in_channels: int = 3, name: str = "resnet18") -> nn.Module:
    """Return a torchvision ResNet for 32x32 images: 3x3 stem of stride 1, no first pooling.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the input.
        name: A `torchvision.models` ResNet: "resnet18", "resnet34", "resnet50", ...

    Raises:
        InvalidValueError: For a name that is no ResNet of torchvision.
        MissingDependencyError: If torchvision does not load beside this torch.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            "torchvision does not load beside this torch; install the pair of constraints.txt, "
            "torch==2.14.0 torchvision==0.29.0"
        ) from error
    if not name.startswith("resnet") or not callable(getattr(models, name, None)):
        raise InvalidValueError(
            f"name must be a torchvision ResNet such as 'resnet18', got {name!r}"
        )
    model = getattr(models, name)(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
