"""Routers: one linear layer per feed-forward layer that says which experts a token needs.

sigmoid: G(x)_i = sigmoid(x . w_i + b_i), on if G_i > tau (Zheng et al. 2024, arXiv 2402.06126,
equations 1 and 2; the bias is ours). topp: the smallest set of experts with a softmax mass of p,
after PrunePath (2026, arXiv 2605.28283); its soft scores P_i / max_j P_j are ours: they begin near
1 and fall as mass gathers on few experts, so that both losses mean what they mean for sigmoid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlkit.errors import InvalidValueError
from mlkit.sparsity.config import MODES

__all__ = ["Router", "router_scores", "select_experts", "threshold_logit"]


class Router(nn.Linear):
    """A linear layer whose logits are computed in float32 at least, outside autocast.

    Training and serving then agree about scores near the threshold. Weights begin as those of
    `nn.Linear`, uniform in +-1/sqrt(hidden_size), from the generator (see also
    `LTEConfig.router_init`).

    All that an LTE layer adds to a stock one is in here: the weights, `neuron_perm` (which stock
    neurons the experts hold, by position) and, as extra state, mode and threshold. An adapter that
    holds the router (PEFT's modules_to_save) is then complete.

    Args:
        hidden_size: H.
        num_experts: N.
        neurons: I.
        bias_init: Initial bias; None for no bias.
        generator: Draws the weights; None leaves them undrawn (structure only).
        device: Where the parameters are.
        dtype: Of the parameters.

    Shape:
        [..., H] to [..., N], float32 (float64 for float64 input).
    """

    neuron_perm: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        neurons: int,
        bias_init: float | None = 0.5,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = hidden_size, num_experts
        weight = torch.zeros(num_experts, hidden_size, dtype=torch.float32, device="cpu")
        if generator is not None:
            bound = 1 / math.sqrt(hidden_size)
            weight.uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight.to(device=device, dtype=dtype))
        if bias_init is None:
            self.register_parameter("bias", None)
        else:
            bias = torch.full((num_experts,), float(bias_init), device="cpu")
            self.bias = nn.Parameter(bias.to(device=device, dtype=dtype))
        self.register_buffer("neuron_perm", torch.arange(neurons, device=device))
        self.mode = "soft"
        self.set_limit(0.0)

    @property
    def active(self) -> Router:
        """This router; asked of a wrapper that passes attributes on: the copy that is in use."""
        return self

    def set_limit(self, limit: float) -> None:
        """Set the logit of tau."""
        # A tensor: a controller that moves it makes torch.compile compile once.
        self.limit = torch.tensor(float(limit), dtype=torch.float64, device="cpu")
        self.limit_number = float(limit)  # for a kernel's argument

    def get_extra_state(self) -> Float[Tensor, " 2"]:
        """Return mode and logit of tau, which a checkpoint must know to be the same model."""
        values = [float(MODES.index(self.mode)), self.limit_number]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Float[Tensor, " 2"]) -> None:
        """Take what `get_extra_state` gave."""
        if not isinstance(state, Tensor) or state.shape != (2,):
            raise InvalidValueError(f"the state of an LTE layer must be two numbers, got {state!r}")
        number, limit = state.tolist()
        if number not in range(len(MODES)) or limit != limit:
            raise InvalidValueError(f"the state of an LTE layer is damaged: {state!r}")
        self.mode = MODES[int(number)]
        self.set_limit(limit)

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens experts"]:
        """Return the logits."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def router_scores(
    logits: Float[Tensor, "*tokens experts"], kind: str
) -> Float[Tensor, "*tokens experts"]:
    """Return G in [0, 1]."""
    if kind == "sigmoid":
        return logits.sigmoid()
    return (logits - logits.amax(-1, keepdim=True)).exp()


def threshold_logit(threshold: float) -> float:
    """Return log(tau / (1 - tau)), -inf for 0 and inf for 1."""
    if threshold <= 0:
        return -math.inf
    return math.inf if threshold >= 1 else math.log(threshold / (1 - threshold))


def select_experts(
    logits: Float[Tensor, "*tokens experts"],
    kind: str,
    limit: Tensor | float = 0.0,
    top_p: float = 0.9,
    min_experts: int = 0,
) -> Bool[Tensor, "*tokens experts"]:
    """Say which experts run; a NaN is off.

    Args:
        logits: Of the router.
        kind: "sigmoid": G > tau, as logit > `limit`. "topp": the fewest experts with a softmax
            mass of at least `top_p`.
        limit: The logit of tau, see `threshold_logit`.
        top_p: In (0, 1].
        min_experts: That many of the highest logits run anyhow, if they are not NaN.
    """
    if kind == "sigmoid":
        chosen = logits > limit
    else:
        mass, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
        before = mass.cumsum(-1) - mass
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)
    if min_experts:
        # topk takes NaN for the largest number there is
        lowest = torch.finfo(logits.dtype).min
        usable = logits.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=lowest)
        top = usable.topk(min(min_experts, logits.shape[-1]), dim=-1).indices
        chosen = chosen.scatter(-1, top, True) & ~logits.isnan()
    return chosen
