"""Adagrad with one float of state per row, for embedding tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["RowWiseAdagrad"]


class RowWiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad: m += mean(g^2) over the row, w -= lr * g / (sqrt(m) + eps).

    Takes sparse gradients (those of `nn.EmbeddingBag(sparse=True)`; rows without gradient cost
    nothing) and dense ones. The formula is that of fbgemm's EXACT_ROWWISE_ADAGRAD without weight
    decay, duplicates of a row summed first.

    State per parameter: "sum", a float per row, in fp32 for parameters of half precision.

    Args:
        params: Matrices, or groups of them; rows are dimension 0.
        lr: Learning rate, at least 0.
        eps: Added to the root; at least 0. 1e-8, the default of fbgemm.

    Raises:
        InvalidValueError: For a negative rate or eps, or a parameter that is not a matrix.

    Example:
        >>> bag = torch.nn.EmbeddingBag(10, 4, mode="sum", sparse=True)
        >>> optimizer = RowWiseAdagrad(bag.parameters(), lr=0.1)
        >>> bag(torch.tensor([[1, 2, 2]])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[bag.weight]["sum"][:4]
        tensor([0., 1., 4., 0.])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in every optimizer; its parameters must be matrices."""
        group = self.defaults | param_group
        for name in ("lr", "eps"):
            if not group[name] >= 0:
                raise InvalidValueError(f"{name} must be at least 0, got {group[name]}")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() != 2:
                self.param_groups.pop()
                raise InvalidValueError(
                    f"RowWiseAdagrad takes matrices, got a parameter of shape "
                    f"{tuple(parameter.shape)}; give the others to another optimizer"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch's own, it stays fp32 for parameters of half precision."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                total = state_dict["state"][number]["sum"]
                self.state[parameter]["sum"] = total.to(parameter.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: Computes the loss anew, with gradients.

        Raises:
            InvalidTypeError: For a complex parameter or gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["eps"])
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, eps: float) -> None:
        if parameter.is_complex():
            raise InvalidTypeError(f"RowWiseAdagrad takes real parameters, got {parameter.dtype}")
        state = self.state[parameter]
        if not state:
            half = parameter.element_size() < 4
            state["sum"] = torch.zeros(
                parameter.shape[0],
                dtype=torch.float32 if half else parameter.dtype,
                device=parameter.device,
            )
        total = state["sum"]
        if not gradient.is_sparse:
            wide = gradient.to(total.dtype)
            total += wide.square().mean(1)
            parameter -= (lr * wide / (total.sqrt() + eps)[:, None]).to(parameter.dtype)
            return
        gradient = gradient.coalesce()
        rows, wide = gradient.indices()[0], gradient.values().to(total.dtype)
        if rows.numel() == 0:
            return
        moved = total[rows] + wide.square().mean(1)
        total[rows] = moved
        change = (-lr * wide / (moved.sqrt() + eps)[:, None]).to(parameter.dtype)
        parameter.index_add_(0, rows, change)
