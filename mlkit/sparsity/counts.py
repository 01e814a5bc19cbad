"""Running sums of one LTE layer, added to in every forward pass and read when someone asks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlkit.sparsity.losses import efficiency_terms, separability_terms

__all__ = ["LayerCounts"]

_KEYS = ("tokens", "active", "eff", "sep", "nan", "near")
NEAR = 0.1
"""How far from tau a score counts as undecided; the distance is ours."""


class LayerCounts:
    """Sums over valid tokens: experts that ran, both losses, NaN scores, scores near tau.

    They stay on the layer's device and are no part of its state dict.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(len(_KEYS), dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def add(
        self,
        scores: Float[Tensor, "*tokens experts"],
        selected: Bool[Tensor, "*tokens experts"],
        valid: Bool[Tensor, " *tokens"] | None,
        threshold: float,
        eps: float,
        losses: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Count one forward pass; `losses` are both of each token, if they are known already."""
        if scores.is_meta:
            return
        if losses is None:
            losses = efficiency_terms(scores), separability_terms(scores, threshold, eps)
        eff, sep = losses
        dtype = torch.float64 if scores.device.type != "mps" else torch.float32
        if self.sums.device != scores.device or self.sums.dtype != dtype:
            self.sums = self.sums.to(scores.device, dtype)
        rows = torch.stack(
            [
                torch.ones_like(eff),
                selected.sum(-1, dtype=eff.dtype),
                eff.nan_to_num(),
                sep.nan_to_num(),
                scores.isnan().sum(-1, dtype=eff.dtype),
                ((scores - threshold).abs() < NEAR).sum(-1, dtype=eff.dtype) / scores.shape[-1],
            ]
        )
        if valid is not None:
            rows = torch.where(valid, rows, 0.0)
        self.sums = self.sums + rows.reshape(len(_KEYS), -1).sum(1).to(dtype)

    def reset(self) -> None:
        """Begin anew."""
        self.sums = torch.zeros_like(self.sums)

    def values(self, sums: Tensor | None = None) -> dict[str, float]:
        """Return the sums by name."""
        return dict(zip(_KEYS, (self.sums if sums is None else sums).tolist(), strict=True))
