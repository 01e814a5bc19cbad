"""LTE computed slowly in NumPy and double precision: one token, one expert, one neuron at a time.

Written from the paper's equations (arXiv 2402.06126, eqs. 1-6, Table 1) and not from mlkit, which
it exists to contradict. Nothing here is vectorised over experts, nothing is permuted, and the
gradients are derived by hand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def _silu(z: float) -> float:
    return z * sigmoid(z)


def _gelu(z: float) -> float:
    return 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda z: max(z, 0.0),
    "silu": _silu,
    "gelu": _gelu,
    "tanh": math.tanh,
}


def sigmoid(z: float) -> float:
    if math.isnan(z):
        return math.nan
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


@dataclass
class FFN:
    """Weights of one FFN: neuron j owns `w_in[j]`, `w_gate[j]` and `w_down[:, j]`."""

    w_in: Array
    w_down: Array
    act: str
    b_in: Array | None = None
    w_gate: Array | None = None
    b_gate: Array | None = None
    b_down: Array | None = None

    def neuron(self, x: Array, j: int) -> float:
        """The activation of neuron j for one token."""
        up = float(np.dot(self.w_in[j], x)) + (0.0 if self.b_in is None else float(self.b_in[j]))
        act = ACTIVATIONS[self.act]
        if self.w_gate is None:
            return act(up)
        gate = float(np.dot(self.w_gate[j], x))
        gate += 0.0 if self.b_gate is None else float(self.b_gate[j])
        return act(gate) * up

    def expert(self, x: Array, members: Sequence[int]) -> Array:
        """E_i(x): the sum of what the neurons in `members` write to the output."""
        out = np.zeros(self.w_down.shape[0])
        for j in members:
            out += self.neuron(x, j) * self.w_down[:, j]
        return out

    def forward(self, x: Array, experts: Sequence[Sequence[int]], factors: Array) -> Array:
        """sum_i factors[t, i] E_i(x_t) + b_down; `x` [T, H], `factors` [T, N]."""
        rows = []
        for t, token in enumerate(x):
            out = np.zeros(self.w_down.shape[0])
            for i, members in enumerate(experts):
                out += factors[t, i] * self.expert(token, members)
            rows.append(out if self.b_down is None else out + self.b_down)
        return np.array(rows).reshape(len(x), self.w_down.shape[0])


def router_logits(x: Array, weight: Array, bias: Array | None) -> Array:
    logits = np.array([[float(np.dot(w, token)) for w in weight] for token in x])
    return logits if bias is None else logits + bias


def scores(logits: Array) -> Array:
    """Eq. 1: G(x)_i = sigmoid(x . w_i)."""
    return np.array([[sigmoid(z) for z in row] for row in logits]).reshape(logits.shape)


def threshold_factors(logits: Array, tau: float, min_experts: int = 0) -> Array:
    """Eq. 2: 1[G > tau], strictly; NaN is off; a token below the floor gets its best experts."""
    out = np.zeros(logits.shape)
    for t, row in enumerate(logits):
        for i, z in enumerate(row):
            score = sigmoid(z)
            out[t, i] = 0.0 if math.isnan(score) else float(score > tau)
        if out[t].sum() < min_experts:
            usable = [i for i, z in enumerate(row) if not math.isnan(z)]
            for i in sorted(usable, key=lambda i: -row[i])[:min_experts]:
                out[t, i] = 1.0
    return out


def softmax(row: Array) -> Array:
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return np.array(powers) / sum(powers)


def topp_factors(logits: Array, p: float, min_experts: int = 0) -> Array:
    """The smallest set of experts whose softmax mass is at least p."""
    out = np.zeros(logits.shape)
    for t, row in enumerate(logits):
        mass = softmax(row)
        total = 0.0
        for chosen, i in enumerate(sorted(range(len(row)), key=lambda i: -mass[i])):
            if total >= p and chosen >= min_experts:
                break
            out[t, i] = 1.0
            total += mass[i]
    return out


def _mean_over(values: list[Array], masks: list[Array], term: Callable[[float], float]) -> float:
    """1/L sum_l 1/(T_l N_l) sum over valid tokens and experts of term(G)."""
    total = 0.0
    for layer, mask in zip(values, masks, strict=True):
        valid = [t for t in range(len(layer)) if mask[t]]
        if not valid:
            continue
        inner = sum(term(float(g)) for t in valid for g in layer[t])
        total += inner / (len(valid) * layer.shape[1])
    return total / len(values)


def _gradient_of(
    values: list[Array], masks: list[Array], slope: Callable[[float], float]
) -> list[Array]:
    out = []
    for layer, mask in zip(values, masks, strict=True):
        gradient = np.zeros(layer.shape)
        tokens = int(sum(bool(m) for m in mask))
        for t in range(len(layer)):
            if mask[t]:
                for i in range(layer.shape[1]):
                    share = slope(float(layer[t, i])) / (tokens * layer.shape[1] * len(values))
                    gradient[t, i] = share
        out.append(gradient)
    return out


def efficiency(values: list[Array], masks: list[Array]) -> float:
    """Eq. 4: the mean squared score."""
    return _mean_over(values, masks, lambda g: abs(g) ** 2)


def efficiency_gradient(values: list[Array], masks: list[Array]) -> list[Array]:
    return _gradient_of(values, masks, lambda g: 2.0 * g)


def separability(values: list[Array], masks: list[Array], tau: float, eps: float) -> float:
    """Eq. 5 with its pole bounded: mean 1 / ((G - tau)^2 + eps)."""
    return _mean_over(values, masks, lambda g: 1.0 / ((g - tau) ** 2 + eps))


def separability_gradient(
    values: list[Array], masks: list[Array], tau: float, eps: float
) -> list[Array]:
    return _gradient_of(values, masks, lambda g: -2.0 * (g - tau) / ((g - tau) ** 2 + eps) ** 2)


def sparsity(factors: list[Array], masks: list[Array], macs_per_expert: list[float]) -> float:
    """1 - the share of the experts' work that valid tokens ask for, over all layers."""
    asked = whole = 0.0
    for layer, mask, macs in zip(factors, masks, macs_per_expert, strict=True):
        for t in range(len(layer)):
            if mask[t]:
                asked += macs * float(layer[t].sum())
                whole += macs * layer.shape[1]
    return 1.0 - asked / whole


GIB_FLOPS = 2.0**30


def table1_gflops(
    hidden: int, width: int, layers: int, expert_size: int, ffn_sparsity: float | None
) -> float:
    """Table 1's "GFLOPs" per token: linear layers of gated blocks, 2 per MAC, units of 2^30.

    `ffn_sparsity` None is the dense model, which has no router.
    """
    attention = 4 * hidden * hidden * 2 * layers
    ffn = 3 * hidden * width * 2 * layers
    if ffn_sparsity is None:
        return (attention + ffn) / GIB_FLOPS
    router = (width // expert_size) * hidden * 2 * layers
    return (attention + ffn * (1.0 - ffn_sparsity) + router) / GIB_FLOPS
