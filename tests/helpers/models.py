"""Random small models for property tests: what a converter or recorder meets, in small.

Sizes are odd on purpose (kernels that assume powers of two fail here), and a model may have batch
normalisation, layers without bias, and one module that is used twice (tied weights).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["SmallModel", "random_small_model"]

_SIZES = (1, 3, 5, 7, 9, 11, 13, 17, 31)
_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)


@dataclass(frozen=True)
class SmallModel:
    """A model and what one needs to call it.

    Args:
        module: Maps (batch, *input_shape) to (batch, num_classes).
        input_shape: Shape of one input.
        num_classes: Number of logits.
        is_tied: Whether one of its modules is used twice.
        has_batch_norm: Whether it normalises by batch statistics.
    """

    module: nn.Module
    input_shape: tuple[int, ...]
    num_classes: int
    is_tied: bool
    has_batch_norm: bool

    def batch(self, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random inputs and labels; batch normalisation needs `size` > 1."""
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(size, *self.input_shape, generator=generator),
            torch.randint(self.num_classes, (size,), generator=generator),
        )


def random_small_model(
    seed: int,
    *,
    kind: Literal["mlp", "cnn"] | None = None,
    is_tied: bool | None = None,
    has_batch_norm: bool | None = None,
) -> SmallModel:
    """Return the model of a seed; what is not asked for is drawn. torch's own stream stays put.

    Args:
        seed: Keys the architecture and the weights.
        kind: "mlp" (linear layers on vectors) or "cnn" (convolutions on images, linear head).
        is_tied: Whether a hidden module occurs twice, as the same object.
        has_batch_norm: Whether hidden layers are followed by batch normalisation.
    """
    rng = random.Random(seed)
    drawn = {
        "kind": rng.choice(["mlp", "cnn"]),
        "is_tied": rng.random() < 0.5,
        "has_batch_norm": rng.random() < 0.5,
    }
    kind = kind or drawn["kind"]
    is_tied = drawn["is_tied"] if is_tied is None else is_tied
    has_batch_norm = drawn["has_batch_norm"] if has_batch_norm is None else has_batch_norm
    build = _mlp if kind == "mlp" else _cnn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(rng, is_tied, has_batch_norm)


def _mlp(rng: random.Random, is_tied: bool, has_batch_norm: bool) -> SmallModel:
    features, num_classes = rng.choice(_SIZES), rng.choice((2, 3, 5, 7))
    layers: list[nn.Module] = []
    width = features
    for _ in range(rng.randint(1, 3)):
        wide = rng.choice(_SIZES)
        layers += _hidden(rng, nn.Linear(width, wide, bias=_bias(rng)), wide, has_batch_norm, 1)
        width = wide
    if is_tied:
        block = nn.Linear(width, width)
        layers += [block, rng.choice(_ACTIVATIONS)(), block]
    module = nn.Sequential(*layers, nn.Linear(width, num_classes))
    return SmallModel(module, (features,), num_classes, is_tied, has_batch_norm)


def _cnn(rng: random.Random, is_tied: bool, has_batch_norm: bool) -> SmallModel:
    shape = (rng.choice((1, 2, 3)), rng.choice((5, 6, 7, 9)), rng.choice((5, 6, 8, 11)))
    num_classes, depth = rng.choice((2, 3, 5, 7)), shape[0]
    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 2)):
        deep = rng.choice((1, 3, 5, 7))
        convolution = nn.Conv2d(
            depth, deep, rng.choice((1, 3)), stride=rng.choice((1, 2)), padding=1, bias=_bias(rng)
        )
        layers += _hidden(rng, convolution, deep, has_batch_norm, 2)
        depth = deep
    if is_tied:
        block = nn.Conv2d(depth, depth, 3, padding=1)
        layers += [block, rng.choice(_ACTIVATIONS)(), block]
    layers += [nn.AdaptiveAvgPool2d(rng.choice((1, 2))), nn.Flatten()]
    with torch.no_grad():
        width = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
    module = nn.Sequential(*layers, nn.Linear(width, num_classes)).train()
    return SmallModel(module, shape, num_classes, is_tied, has_batch_norm)


def _hidden(
    rng: random.Random, layer: nn.Module, width: int, has_batch_norm: bool, dimensions: int
) -> list[nn.Module]:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dimensions]
    return [layer, *([norm(width)] if has_batch_norm else []), rng.choice(_ACTIVATIONS)()]


def _bias(rng: random.Random) -> bool:
    return rng.random() < 0.7
