"""A `torch.optim.Optimizer` over stores that update themselves in the backward pass.

The update has happened when `step()` is called: what is left is the end of the step (`store.step`),
and the hyperparameters, which every backward pass reads from here. So a scheduler works as with any
optimizer, and a change of `param_groups[i]["lr"]` counts from the next backward pass on.

What follows from updating in the backward pass:

- Two backward passes before one `step()` are two updates, as of two steps with the sum of nothing;
  a loss divided by the number of passes, as is usual, makes the updates smaller. Utilities, rounds
  and schedules count steps. (Unfused, gradients add up in the pool's gradient as always.)
- Clipping of gradients and `zero_grad` come too late to change anything.
- bfloat16 autocast works as it is. A `GradScaler` (float16) cannot skip an update that has happened
  already: use an unfused optimizer, with `store.grad_scale` set to the scale.
- The states live in the store and its `state_dict`, so that a checkpoint loads at another budget;
  this optimizer's `state_dict` holds the hyperparameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError

__all__ = ["FusedEmbeddingOptimizer", "dynamic_stores"]


def dynamic_stores(model: nn.Module) -> list[DynamicEmbeddingStore]:
    """Return the stores of a model, each once, in the order of its modules."""
    return [m for m in model.modules() if isinstance(m, DynamicEmbeddingStore)]


class FusedEmbeddingOptimizer(torch.optim.Optimizer):
    """Ends the steps of fused stores and holds their hyperparameters, one group for each store.

    Args:
        model: A model, or a store. Stores without a fused optimizer are left to others.
        lr: Learning rate, at least 0; None is each store's own (`FIITEDConfig.lr`).
        eps: Of Adagrad and Adam; None is each store's own.
        betas: Of Adam; None is each store's own.

    Raises:
        InvalidTypeError: If `model` is no module.
        InvalidValueError: If it has no fused store, or for a hyperparameter out of range.

    Example:
        >>> from mlkit.embeddings import DynamicEmbeddingStore, FIITEDConfig, TableSpec
        >>> config = FIITEDConfig(target_density=0.5, optimizer="sgd", lr=0.1)
        >>> store = DynamicEmbeddingStore([TableSpec("item", 100)], 8, config)
        >>> optimizer = FusedEmbeddingOptimizer(store)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        eps: float | None = None,
        betas: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(
                f"FusedEmbeddingOptimizer takes a model or a store, got {type(model).__name__}: "
                "parameters do not say which store they belong to"
            )
        self._stores = [s for s in dynamic_stores(model) if s.config.optimizer is not None]
        if not self._stores:
            raise InvalidValueError(
                f"{type(model).__name__} has no dynamic embedding with a fused optimizer: set "
                "FIITEDConfig(optimizer='rowwise_adagrad'), or give its parameters to a torch "
                "optimizer"
            )
        for name, value in (("lr", lr), ("eps", eps)):
            if value is not None and value < 0:
                raise InvalidValueError(f"{name} must be at least 0, got {value}")
        if betas is not None and (len(betas) != 2 or not all(0 <= b < 1 for b in betas)):
            raise InvalidValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        groups: list[dict[str, Any]] = [
            {
                "params": [store.pool],
                "lr": store.config.lr if lr is None else lr,
                "eps": store.config.eps if eps is None else eps,
                "betas": tuple(store.config.betas if betas is None else betas),
            }
            for store in self._stores
        ]
        self._is_open = True
        super().__init__(groups, {})
        self._is_open = False
        self._drive()

    def _drive(self) -> None:
        for number, store in enumerate(self._stores):
            store.drive(weakref.ref(self), number)

    @property
    def stores(self) -> tuple[DynamicEmbeddingStore, ...]:
        """The stores, in the order of `param_groups`."""
        return tuple(self._stores)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End a step of training in every store, after the backward pass or `closure`.

        Raises:
            RunError: If another `FusedEmbeddingOptimizer` was made for a store since.
        """
        for store in self._stores:
            if store.driver is not self:
                raise RunError(
                    f"another FusedEmbeddingOptimizer was made for the store of "
                    f"{store.tables.specs[0].name} after this one: keep one for each store"
                )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for store in self._stores:
            store.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: there are no gradients to keep."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the groups are the stores.

        Raises:
            InvalidTypeError: Always, once it is built.
        """
        if not self.__dict__.get("_is_open", False):
            raise InvalidTypeError(
                "the groups of a FusedEmbeddingOptimizer are the stores of its model: make another "
                "FusedEmbeddingOptimizer for another model, and give other parameters to a torch "
                "optimizer"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stores": self._stores, "_is_open": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drive()
