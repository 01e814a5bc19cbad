"""Magnitude thresholding of activations, after TEAL (Liu et al. 2024, arXiv 2408.14690).

An input of a linear layer that is near 0 is taken as 0, so that the weights it meets need not be
read; no training. Thresholds are quantiles of |x| on calibration data, for each layer and place.
How the sparsity is divided between a layer's input and its inner values is searched here (TEAL
searches it block by block, greedily): the division with the lowest loss on the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlkit.errors import InvalidValueError
from mlkit.sparsity.posthoc import PostHocSparsity, Site

__all__ = ["MagnitudeThreshold"]

MAX_VALUES = 1 << 18
"""Values kept of each place for its quantile."""
ROUNDS = 3
"""Calibrations with thresholds in force: what one layer leaves out changes the next one's input."""


class MagnitudeThreshold(PostHocSparsity):
    """Leave out inputs and inner values of feed-forward layers whose magnitude is small.

    Args:
        model: Its LTE layers are in dense mode.
        shares: Sparsities of a layer's input that are tried, as a fraction of the wanted one.

    Example:
        >>> import mlkit
        >>> from mlkit.sparsity import LTEConfig, SparseExpertMLP
        >>> layer = nn.Sequential(SparseExpertMLP(8, 32, LTEConfig(expert_size=4, mode="dense")))
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> with MagnitudeThreshold(layer) as method:
        ...     loss = method.fit(0.5, lambda: float(layer(x).square().mean()))
        ...     round(method.measure(lambda: float(layer(x).sum()))[1], 1)
        0.5
    """

    def __init__(
        self, model: nn.Module, shares: Sequence[float] = (0.6, 0.7, 0.8, 0.9, 1.0)
    ) -> None:
        self.shares = tuple(shares)
        self._thresholds: dict[tuple[int, int], float] = {}
        self._samples: dict[tuple[int, int], list[Tensor]] | None = None
        super().__init__(model)

    def filter_input(
        self, site: Site, x: Float[Tensor, "*tokens hidden"]
    ) -> Bool[Tensor, "*tokens hidden"] | None:
        """Keep what is above the threshold of the layer's input."""
        return self._filter(site, 0, x)

    def filter_inner(
        self, site: Site, h: Float[Tensor, "*tokens inner"]
    ) -> Bool[Tensor, "*tokens inner"] | None:
        """Keep what is above the threshold of the inner values."""
        return self._filter(site, 1, h)

    def _filter(self, site: Site, place: int, values: Tensor) -> Tensor | None:
        key = (self.sites.index(site), place)
        if self._samples is not None:
            valid = self._valid(values)
            flat = (values if valid is None else values[valid]).detach().abs().flatten()
            self._samples.setdefault(key, []).append(flat[:: 1 + len(flat) // (MAX_VALUES // 16)])
        threshold = self._thresholds.get(key)
        return None if threshold is None else values.abs() > threshold

    def settle(self, sparsity: float, loss: Callable[[], float]) -> float:
        """Set the thresholds for a sparsity, and return the loss with them.

        Raises:
            InvalidValueError: If no share can reach it.
        """
        first = self.sites[0]
        weight = first.input_flops / first.layer.expert_flops
        found: list[tuple[float, dict[tuple[int, int], float]]] = []
        for share in self.shares:
            inner = (sparsity - weight * share * sparsity) / (1 - weight)
            if not 0 <= inner < 1:
                continue
            self._thresholds = {}
            for _ in range(ROUNDS):
                self._calibrate(loss, (share * sparsity, inner))
            found.append((loss(), self._thresholds))
        if not found:
            raise InvalidValueError(f"no share of {self.shares} reaches a sparsity of {sparsity}")
        best, self._thresholds = min(found, key=lambda pair: pair[0])
        return best

    def _calibrate(self, loss: Callable[[], float], fractions: tuple[float, float]) -> None:
        """Set all thresholds to quantiles of what one run sees under the present ones."""
        self._samples = {}
        try:
            loss()
            self._thresholds = {
                key: _quantile(torch.cat(values), fractions[key[1]])
                for key, values in self._samples.items()
            }
        finally:
            self._samples = None


def _quantile(values: Tensor, fraction: float) -> float:
    """The value that this fraction of all does not exceed; below all of them for 0."""
    rank = round(fraction * len(values))
    return float(values.kthvalue(rank).values) if rank else -1.0
