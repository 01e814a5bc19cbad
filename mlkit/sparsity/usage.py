"""Which experts packed layers run: counted on request, for statistics and for schedulers.

The kernel keeps what it selects to itself, so a layer that counts runs its router in PyTorch and
hands the kernel the choice.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity.packed import PackedExpertMLP

__all__ = ["count_experts", "expected_active_fraction"]


class ExpertUsage:
    """Number of tokens that selected each expert of one layer."""

    def __init__(self, experts: int) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device="cpu")
        self.selected = torch.zeros(experts, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def add(
        self, mask: Bool[Tensor, "*tokens experts"], valid: Bool[Tensor, " *tokens"] | None
    ) -> None:
        """Count one forward pass."""
        if mask.is_meta:
            return
        dtype = torch.float64 if mask.device.type != "mps" else torch.float32
        if self.selected.device != mask.device or self.selected.dtype != dtype:
            self.tokens = self.tokens.to(mask.device, dtype)
            self.selected = self.selected.to(mask.device, dtype)
        rows = mask.flatten(0, -2)
        if valid is not None:
            rows = rows & valid.reshape(-1, 1)
            self.tokens = self.tokens + valid.sum()
        else:
            self.tokens = self.tokens + len(rows)
        self.selected = self.selected + rows.sum(0)


def count_experts(model: nn.Module, enabled: bool = True) -> None:
    """Let the packed layers of a model count what they run, from now on.

    `lte_stats` and `expected_active_fraction` then have something to say. A layer that counts
    computes its router in PyTorch, in float32; otherwise nothing is counted and nothing is paid.

    Args:
        model: Holds packed layers.
        enabled: False stops counting and forgets the use of single experts; the sums that
            `lte_stats` reads stay until `reset_lte_stats`.

    Raises:
        RunError: If no layer is packed.
    """
    for layer in _packed(model).values():
        layer.usage = ExpertUsage(layer.layer.num_experts) if enabled else None


def expected_active_fraction(model: nn.Module, batch: int) -> float:
    r"""Return which fraction of the feed-forward weights a decode step of `batch` tokens reads.

    With p_i the measured share of tokens that select expert i, it is the mean over experts of
    $1 - (1 - p_i)^{batch}$, weighted over layers by their FLOPs: the expected union of independent
    tokens. Tokens of one text resemble each other, so the union in a real batch tends to be
    smaller.

    Args:
        model: Its layers are packed and have counted tokens, see `count_experts`.
        batch: Tokens in the step, at least 1.

    Raises:
        RunError: If no layer is packed, or one has counted nothing.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InvalidValueError(f"batch must be an integer of at least 1, got {batch!r}")
    read = total = 0.0
    for name, packed in _packed(model).items():
        usage = packed.usage
        if usage is None or usage.tokens == 0:
            raise RunError(
                f"layer {name!r} has counted no token: count_experts(model), then run the model on "
                "texts like those that it will serve"
            )
        share = usage.selected / usage.tokens
        read += packed.layer.dense_flops * float((1 - (1 - share) ** batch).mean())
        total += packed.layer.dense_flops
    return read / total


def _packed(model: nn.Module) -> dict[str, PackedExpertMLP]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, PackedExpertMLP)}
    if not found:
        raise RunError(
            f"no layer of {type(model).__name__} is packed: mlkit.sparsity.pack_for_inference first"
        )
    return found
