"""When reading the selected experts is faster than a dense GEMM on this machine: measured.

The C++ kernel knows how many tokens selected each expert before it reads one, so all that it needs
to choose is the time of an expert for t tokens, and of the GEMM. Both depend on shape, type,
threads and machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mlkit.errors import InvalidValueError, RunError
from mlkit_kernels._build import cpu_kernel_failure
from mlkit_kernels.sparse_mlp.arguments import NUM_PRICES, TILE

__all__ = ["break_even_fraction", "measure_prices"]

_TOKENS = (1, 2, 4, 8, 16, 32)
_MANY = 64
_VIEW_BYTES = 32 << 20


def measure_prices(
    weights: Sequence[tuple[Tensor, Tensor]],
    *,
    activation: str = "silu",
    dtype: torch.dtype | None = None,
    seconds: float = 0.5,
) -> Float[Tensor, " prices"]:
    """Time the C++ kernel against a dense GEMM on some layers' own weights.

    Args:
        weights: Pairs (gate_up, down_t) of one shape and type, on the CPU. They are used in turn,
            so that they come from where they would come from in a model: memory or a cache.
        activation: As in `sparse_mlp`.
        dtype: Of the tokens; that of the weights if None.
        seconds: When to stop repeating; every case is timed 2 to 15 times.

    Returns:
        Seconds, in the order that the kernel reads: [0] of a call that selects nothing; [t] of an
        expert that t of 32 tokens selected; [32 + t] of the GEMM for t tokens; [65] of the GEMM
        for one token more.

    Raises:
        InvalidValueError: If there is nothing to measure.
        RunError: If the C++ kernel is not there.
    """
    from mlkit_kernels.sparse_mlp.op import _CODES, _cpp_loads

    if not weights:
        raise InvalidValueError("weights must hold at least one pair (gate_up, down_t)")
    if not _cpp_loads():
        raise RunError(f"there is nothing to measure: {cpu_kernel_failure('sparse_mlp')}")
    views = _views(weights)
    gate_up = views[0][0]
    experts, _, hidden = gate_up.shape
    total = weights[0][0].shape[0]
    always = torch.ones(NUM_PRICES, dtype=torch.float64)
    always[TILE:] = 0.0
    generator = torch.Generator().manual_seed(0)
    best: dict[tuple[str, int], float] = {}
    turn = 0

    def run(kind: str, tokens: int) -> None:
        nonlocal turn
        x, mask = inputs[tokens]
        pair = views[turn % len(views)]
        turn += 1
        started = time.perf_counter()
        torch.ops.mlkit.sparse_mlp_cpu.default(
            x, None, None, *pair, None, None, empty if kind == "nothing" else mask, 0.0,
            _CODES[activation], always if kind == "dense" else None,
        )  # fmt: skip
        taken = time.perf_counter() - started
        key = kind, tokens
        best[key] = min(best.get(key, taken), taken)

    with torch.inference_mode():
        inputs = {}
        for tokens in (*_TOKENS, _MANY):
            x = torch.randn(tokens, hidden, generator=generator).to(dtype or gate_up.dtype)
            inputs[tokens] = x, torch.ones(tokens, experts, dtype=torch.bool)
        empty = torch.zeros(1, experts, dtype=torch.bool)
        deadline = time.perf_counter() + seconds
        rounds = 0
        while rounds < 2 or (rounds < 15 and time.perf_counter() < deadline):
            run("nothing", 1)
            for tokens in _TOKENS:
                run("sparse", tokens)
                run("dense", tokens)
            run("dense", _MANY)
            rounds += 1
    nothing = best["nothing", 1]
    sparse = {t: max(best["sparse", t] - nothing, 0.0) / experts for t in _TOKENS}
    dense = {t: best["dense", t] * total / experts for t in (*_TOKENS, _MANY)}
    more = max(dense[_MANY] - dense[TILE], 0.0) / (_MANY - TILE)
    prices = [nothing, *_filled(sparse), *_filled(dense), more]
    return torch.tensor(prices, dtype=torch.float64, device="cpu")


def break_even_fraction(prices: Float[Tensor, " prices"], tokens: int, experts: int) -> float:
    """Return the share of experts above which a dense GEMM is faster, were all tokens alike.

    Args:
        prices: See `measure_prices`.
        tokens: 1 to 32.
        experts: N.
    """
    room = float(prices[TILE + tokens] - prices[0])
    cost = experts * float(prices[tokens])
    return 1.0 if cost <= room else max(0.0, room / cost)


def _views(weights: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return some experts of each layer, few enough to be timed often."""
    gate_up, down_t = weights[0]
    each = (gate_up[0].numel() + down_t[0].numel()) * gate_up.element_size()
    experts = len(gate_up)
    count = max(1, min(experts, _VIEW_BYTES // each))
    starts = range(0, experts - count + 1, count)
    return [(g[s : s + count], d[s : s + count]) for s in starts for g, d in weights][:16]


def _filled(points: dict[int, float]) -> list[float]:
    """Return the values at 1..TILE on straight lines between the points."""
    known = sorted(points)
    filled = []
    for t in range(1, TILE + 1):
        low = max(k for k in known if k <= t)
        high = min(k for k in known if k >= t)
        share = 0.0 if high == low else (t - low) / (high - low)
        filled.append(points[low] + share * (points[high] - points[low]))
    return filled
