"""Top-k experts of a trained dense model, after MoEfication (Zhang et al. 2022, arXiv 2110.01786).

Neurons are grouped as LTE groups them, and every token runs the k experts that matter most to it,
by knowledge of all values: the upper bound of what a router could choose, which is also how the LTE
paper compares (its section 5). The measure of an expert is ours, because the activations of today's
models are not ReLU: the sum of (h_j |w_out,j|)^2 over its neurons, where MoEfication sums h_j.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlkit.sparsity.posthoc import PostHocSparsity, Site

__all__ = ["TopKExperts"]


class TopKExperts(PostHocSparsity):
    """Run the k most important experts of each layer for each token.

    Args:
        model: Its LTE layers are in dense mode.

    Example:
        >>> import mlkit
        >>> from mlkit.sparsity import LTEConfig, SparseExpertMLP
        >>> layer = nn.Sequential(SparseExpertMLP(8, 32, LTEConfig(expert_size=4, mode="dense")))
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> with TopKExperts(layer) as method:
        ...     loss = method.fit(0.75, lambda: float(layer(x).square().mean()))
        ...     method.k, method.measure(lambda: float(layer(x).sum()))[1]
        ([2], 0.75)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.k = [site.layer.num_experts for site in self.sites]

    def filter_inner(
        self, site: Site, h: Float[Tensor, "*tokens inner"]
    ) -> Bool[Tensor, "*tokens inner"]:
        """Keep the neurons of the k experts with the largest measure."""
        layer = site.layer
        blocks = (h.float() * site.out_norms).unflatten(-1, (layer.num_experts, layer.expert_size))
        chosen = blocks.square().sum(-1).topk(self.k[self.sites.index(site)], dim=-1).indices
        shape = (*h.shape[:-1], layer.num_experts)
        mask = torch.zeros(shape, dtype=torch.bool, device=h.device).scatter(-1, chosen, True)
        return mask.repeat_interleave(layer.expert_size, -1)

    def _inner_flops(self, site: Site) -> int:
        return site.layer.expert_flops  # a neuron that is left out needs no input either

    def settle(self, sparsity: float, loss: Callable[[], float]) -> float:
        """Choose k of each layer for a mean sparsity, and return the loss with them.

        All layers have as many experts as a uniform sparsity allows, rounded down; what is left is
        given, one expert each, to the layers in which it helps the loss most.
        """
        wanted = [(1 - sparsity) * site.layer.num_experts for site in self.sites]
        least = [int(number + 1e-9) for number in wanted]
        extra = round(sum(wanted) - sum(least))
        gains = []
        for number in range(len(least) if extra else 0):
            self.k = [k + (i == number) for i, k in enumerate(least)]
            gains.append((loss(), number))
        chosen = {number for _, number in sorted(gains)[:extra]}
        self.k = [k + (i in chosen) for i, k in enumerate(least)]
        return loss()
