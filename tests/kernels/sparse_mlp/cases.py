"""Inputs whose router decisions do not hang on a rounding error, and the slow definition."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from mlkit_kernels.sparse_mlp import expert_mask

FIELDS = (
    "x",
    "router_weight",
    "router_bias",
    "gate_up",
    "down_t",
    "gate_up_bias",
    "down_bias",
)


@dataclasses.dataclass
class Case:
    """Arguments of `sparse_mlp`."""

    x: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    gate_up: Tensor
    down_t: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    threshold: float
    activation: str
    mask: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in FIELDS)

    @property
    def options(self) -> dict[str, Any]:
        return {"mask": self.mask, "threshold": self.threshold, "activation": self.activation}

    def masked(self) -> "Case":
        """Return the case with its router's decisions as a mask."""
        chosen = expert_mask(self.x, self.router_weight, self.router_bias, self.threshold)
        return dataclasses.replace(self, router_weight=None, router_bias=None, mask=chosen)

    def map(self, f) -> "Case":
        changed = {
            n: None if t is None else f(t) for n, t in zip(FIELDS, self.tensors, strict=True)
        }
        return dataclasses.replace(self, **changed)


def make(
    tokens=3,
    experts=5,
    size=4,
    hidden=24,
    *,
    gated=True,
    bias=True,
    activation="silu",
    sparsity=0.5,
    dtype=torch.float32,
    seed=0,
) -> Case:
    """Draw a case; about `sparsity` of the (token, expert) pairs are off, exactly so at 0 and 1.

    The threshold lies in the middle of a wide gap between two logits: two correct sums of the same
    logit, whatever their order, fall on the same side.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    rows = 2 * size if gated else size
    case = Case(
        x=draw(tokens, hidden),
        router_weight=draw(experts, hidden, scale=hidden**-0.5),
        router_bias=draw(experts) if bias else None,
        gate_up=draw(experts, rows, hidden, scale=hidden**-0.5),
        down_t=draw(experts, size, hidden, scale=(experts * size) ** -0.5),
        gate_up_bias=draw(experts, rows) if bias else None,
        down_bias=draw(hidden) if bias else None,
        threshold=0.0,
        activation=activation,
    )
    logits = case.x.double() @ case.router_weight.double().t()
    if bias:
        logits += case.router_bias.double()
    ordered = logits.flatten().sort().values.tolist()
    count = len(ordered)
    if sparsity in (0, 1):
        case.threshold = -math.inf if sparsity == 0 else math.inf
        return case
    middle = min(max(round(sparsity * count), 1), max(count - 1, 1))
    window = range(max(1, middle - count // 8), min(count, middle + count // 8 + 1))
    cut = max(window, key=lambda i: ordered[i] - ordered[i - 1], default=None)
    if cut is None:  # a single pair: on
        case.threshold = ordered[0] - 1.0
    else:
        case.threshold = (ordered[cut] + ordered[cut - 1]) / 2
    return case


def _act(name: str, a: float) -> float:
    match name:
        case "silu":
            return a / (1 + math.exp(-a))
        case "gelu":
            return 0.5 * a * (1 + math.erf(a / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        case "quick_gelu":
            return a / (1 + math.exp(-1.702 * a))
        case "relu2":
            return max(a, 0.0) ** 2
        case "tanh":
            return math.tanh(a)
        case "sigmoid":
            return 1 / (1 + math.exp(-a))
        case _:
            return max(a, 0.0)


def naive(case: Case) -> Tensor:
    """Go over tokens, experts and neurons one by one, in fp64; independent of the reference."""
    c = case.map(lambda t: t.double())
    experts, size, hidden = c.down_t.shape
    out = torch.zeros(len(c.x), hidden, dtype=torch.float64)
    for m, x in enumerate(c.x):
        if c.down_bias is not None:
            out[m] += c.down_bias
        for e in range(experts):
            logit = float(x @ c.router_weight[e])
            logit += 0.0 if c.router_bias is None else float(c.router_bias[e])
            if not logit > c.threshold:
                continue
            bias = torch.zeros(c.gate_up.shape[1]) if c.gate_up_bias is None else c.gate_up_bias[e]
            for j in range(size):
                h = _act(c.activation, float(x @ c.gate_up[e, j] + bias[j]))
                if c.gate_up.shape[1] == 2 * size:
                    h *= float(x @ c.gate_up[e, size + j] + bias[size + j])
                out[m] += h * c.down_t[e, j]
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over that of `want`, or of 0.01 a channel if smaller."""
    scale = max(want.double().norm().item(), 0.01 * want.numel() ** 0.5)
    return (got.double() - want.double()).norm().item() / (scale or 1.0)


# fp32 sums of fp32 products: at most (terms) x 2^-24 relative to the sum of absolute terms, which
# the cases scale to about 1; with up to 256 terms of random sign in each of three sums that stays
# far below 1e-5. The floor of the scale is for single values that are tiny by cancellation, as
# 1 + tanh(-2.4) in GELU's tail.
FP32_TOLERANCE = 1e-5
# bf16 inputs are the same numbers on both sides and every sum is fp32 (error as above), so all
# that differs is the rounding of the result to bf16: half a unit in the last place, 2^-9.
BF16_TOLERANCE = 2.0**-9 + FP32_TOLERANCE
# fp16 likewise, with 11 bits.
FP16_TOLERANCE = 2.0**-12 + FP32_TOLERANCE

# (tokens, experts, size, hidden): powers of two, odd, single, and larger than one vector
SHAPES = [
    (1, 4, 32, 64),
    (1, 1, 1, 1),
    (2, 3, 1, 17),
    (3, 7, 3, 37),
    (5, 1, 32, 33),
    (7, 9, 3, 100),
    (8, 6, 32, 48),
]
KINDS = [
    (True, "silu"),
    (True, "gelu"),
    (True, "gelu_tanh"),
    (False, "gelu"),
    (False, "gelu_tanh"),
    (False, "relu"),
    (False, "quick_gelu"),
    (False, "relu2"),
    (True, "tanh"),
    (True, "sigmoid"),
]
