"""Which tokens count: the padding mask on its way from the caller to the routers.

Two ways: `lte_context(attention_mask)` around forward and backward, or nothing at all: hooks that
`mlkit.convert` puts on the model read the argument `attention_mask` of its forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlkit.errors import InvalidValueError
from mlkit.sparsity.losses import mean_tokens_per_rank

__all__ = ["LTEGroup", "MaskHook", "TokenMask", "is_recomputation", "lte_context"]

# A plain list: the device threads of the autograd engine do not inherit context variables.
_contexts: list[TokenMask | None] = []


class TokenMask:
    """The valid tokens of a batch, with their number taken over all ranks once."""

    def __init__(self, attention_mask: Tensor) -> None:
        if attention_mask.ndim != 2:
            raise InvalidValueError(
                "attention_mask must have the shape [batch, sequence], got "
                f"{tuple(attention_mask.shape)}"
            )
        self.given = attention_mask
        self.mask = attention_mask != 0
        self._tokens: Tensor | None = None

    def tokens(self, device: torch.device) -> Tensor:
        """Mean over ranks of the number of valid tokens; a collective at its first call."""
        if self._tokens is None:
            self._tokens = mean_tokens_per_rank(self.mask.sum().to(device))
        return self._tokens

    def of(self, x: Float[Tensor, "*tokens hidden"], training: bool) -> Bool[Tensor, " *tokens"]:
        """Return the mask in the shape of a layer's tokens.

        A layer may see the tokens flattened, and outside training only the last ones of each row
        (generation with a cache).
        """
        shape, mask = x.shape[:-1], self.mask
        if mask.device != x.device:
            mask = mask.to(x.device)
        count = shape.numel()
        if count == mask.numel():
            return mask.reshape(shape)
        rows = mask.shape[0]
        if not training and rows and count % rows == 0 and 0 < count // rows < mask.shape[1]:
            return mask[:, -(count // rows) :].reshape(shape)
        raise InvalidValueError(
            f"attention_mask has the shape {tuple(mask.shape)} and a feed-forward layer got tokens "
            f"of shape {tuple(shape)}; give the mask of this batch: "
            "lte_context(attention_mask), or lte_context(None) for no mask"
        )


@contextmanager
def lte_context(attention_mask: Tensor | None) -> Iterator[None]:
    """Leave padding out of the losses and statistics of LTE inside the block.

    It wins over an `attention_mask` argument of the model; None counts every token. Under
    activation checkpointing the backward pass belongs into the block, too.

    Args:
        attention_mask: [batch, sequence], 0 or False for padding.
    """
    _contexts.append(None if attention_mask is None else TokenMask(attention_mask))
    try:
        yield
    finally:
        _contexts.pop()


class LTEGroup:
    """What the LTE layers of a model share: the weights of the losses, and the mask.

    The weights are tensors, so that a schedule that moves them makes `torch.compile` compile once.
    """

    def __init__(self, eta: float, lam: float) -> None:
        self.eta = torch.tensor(float(eta), device="cpu")
        self.lam = torch.tensor(float(lam), device="cpu")
        self.mask: TokenMask | None = None
        self.caller: str | None = None

    def set_weights(self, eta: float | None = None, lam: float | None = None) -> None:
        """Set the weights of the efficiency and the separability loss."""
        for name, value in (("eta", eta), ("lam", lam)):
            if value is not None:
                if not value >= 0:
                    raise InvalidValueError(f"{name} must be at least 0, got {value}")
                setattr(self, name, torch.tensor(float(value), device="cpu"))

    def token_mask(self) -> TokenMask | None:
        """The mask that is in force."""
        return _contexts[-1] if _contexts else self.mask

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mask": None, "caller": None}


class MaskHook:
    """Forward hooks that remember the argument `attention_mask` of a model.

    They are on the model itself and on the parts of it that take the argument, down to the list
    that holds its blocks: who calls a part directly (a LightningModule its network, an adapter
    library the model inside) is heard, too. The outermost call decides whether there is a mask; a
    part that is given one of its own (a decoder beside an encoder) sets that. After a pass with
    gradients the mask stays for recomputation, until the next pass.
    """

    def __init__(self, group: LTEGroup, name: str, module: nn.Module) -> None:
        self.group, self.name = group, name
        self.position = _position(module)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the mask of this pass, or none."""
        if is_recomputation():
            return
        mask = kwargs.get("attention_mask")
        if mask is None and self.position is not None and self.position < len(args):
            mask = args[self.position]
        group = self.group
        if group.caller is None:
            group.caller = self.name
        is_outermost = group.caller == self.name
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if is_outermost or group.mask is None or group.mask.given is not mask:
                group.mask = TokenMask(mask)
        elif is_outermost:
            group.mask = None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The outermost call is done."""
        if self.group.caller == self.name and not is_recomputation():
            self.group.caller = None

    @classmethod
    def install(
        cls, group: LTEGroup, model: nn.Module, layers: Iterable[str]
    ) -> list[RemovableHandle]:
        """Put hooks on a model and its parts.

        Args:
            group: Gets the mask.
            model: Holds the layers.
            layers: Names of those that want the mask.
        """
        handles = []
        for name in sorted(
            {"", *(part for layer in layers for part in _above_blocks(model, layer))}
        ):
            module = model.get_submodule(name)
            hook = cls(group, name, module)
            if name == "" or hook.position is not None:
                handles.append(module.register_forward_pre_hook(hook.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(hook.leave))
        return handles

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Take every hook of this kind off a module."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), MaskHook):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _position(module: nn.Module) -> int | None:
    names = list(inspect.signature(module.forward).parameters)
    return names.index("attention_mask") if "attention_mask" in names else None


def _above_blocks(model: nn.Module, layer: str) -> list[str]:
    """Names of the modules around a layer, outside of the innermost list of blocks."""
    parts = layer.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList | nn.Sequential):
            return [".".join(parts[:count]) for count in range(1, end)]
    return []


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
