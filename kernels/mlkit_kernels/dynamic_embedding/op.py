"""The kernels by name: checks of the arguments and the choice of the backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlkit_kernels.dynamic_embedding.reference import (
    RowGradients,
    Touched,
    apply_gradients,
    backward_reference,
    forward_reference,
    reduce_gradients,
)
from mlkit_kernels.dynamic_embedding.selection import (
    Candidates,
    candidates_reference,
    histogram_reference,
)

__all__ = ["apply", "backward", "candidates", "forward", "histogram", "reduce"]


def forward(*args: Any, **kwargs: Any) -> Tensor:
    return forward_reference(*args, **kwargs)


def backward(*args: Any, **kwargs: Any) -> Touched:
    return backward_reference(*args, **kwargs)


def reduce(*args: Any, **kwargs: Any) -> RowGradients:
    return reduce_gradients(*args, **kwargs)


def apply(*args: Any, **kwargs: Any) -> Touched:
    return apply_gradients(*args, **kwargs)


def histogram(*args: Any, **kwargs: Any) -> Tensor:
    return histogram_reference(*args, **kwargs)


def candidates(*args: Any, **kwargs: Any) -> Candidates:
    return candidates_reference(*args, **kwargs)
