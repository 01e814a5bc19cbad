"""How many: exact counts from fractions, and a budget shared out over groups.

Source: CCS (Zheng et al., ICLR 2023, arXiv 2210.15809) for the budgets of strata; exact arithmetic
is our decision (in floats, 60,000 examples at a pruning rate of 0.9 would keep 5,999).
"""

from __future__ import annotations

import math
import numbers
import warnings
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from mlkit.errors import InvalidValueError

__all__ = ["check_fraction", "class_quotas", "num_cut", "num_selected", "water_fill"]


def check_fraction(name: str, value: float, *, below_one: bool = False) -> None:
    """Raise unless `value` is a number in [0, 1], or in [0, 1) with `below_one`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (below_one and value == 1):
        allowed = "[0, 1)" if below_one else "[0, 1]"
        raise InvalidValueError(f"{name} must be a number in {allowed}, got {value!r}")


def num_selected(num_samples: int, prune_rate: float) -> int:
    """Size of the coreset: floor((1 - prune_rate) * num_samples), in exact arithmetic.

    Example:
        >>> num_selected(60_000, 0.9)
        6000
    """
    return math.floor((1 - Fraction(str(prune_rate))) * num_samples)


def num_cut(num_samples: int, cutoff: float) -> int:
    """How many of the hardest examples a cutoff removes: floor(cutoff * num_samples)."""
    return math.floor(Fraction(str(cutoff)) * num_samples)


def water_fill(population: Int[np.ndarray, " k"], total: int) -> Int[np.ndarray, " k"]:
    """Share `total` equally over groups; what a small group cannot take goes to larger ones.

    budget[b] = min(population[b], level) with the level that spends `total`; the integer remainder
    goes to the largest groups, equal ones in ascending index (CCS, Algorithm 1).

    Raises:
        InvalidValueError: If the groups hold fewer than `total` together.

    Example:
        >>> water_fill(np.array([1, 10, 4]), 10)
        array([1, 5, 4])
    """
    available = int(population.sum())
    if not 0 <= total <= available:
        raise InvalidValueError(
            f"cannot take {total} examples out of {available}; lower the number asked for"
        )
    budgets = np.zeros(len(population), dtype=np.int64)
    remaining = total
    for handled, b in enumerate(np.argsort(population, kind="stable")):
        budgets[b] = min(int(population[b]), remaining // (len(population) - handled))
        remaining -= int(budgets[b])
    return budgets


def class_quotas(
    counts: Int[np.ndarray, " c"], available: Int[np.ndarray, " c"], total: int
) -> Int[np.ndarray, " c"]:
    """Quota of each class in proportion to `counts`, spending exactly `total`.

    Largest remainders round up, equal ones in ascending class. A class that has fewer members left
    than its quota gives the rest to the others, with a warning.

    Args:
        counts: Class sizes in the full data set.
        available: Members of each class that may still be taken.
        total: Sum of the quotas.

    Raises:
        InvalidValueError: If the classes have fewer than `total` members left together.
    """
    if total > int(available.sum()):
        raise InvalidValueError(
            f"cannot take {total} examples: only {int(available.sum())} of {int(counts.sum())} "
            "are left; lower the cutoff or the size of the coreset"
        )
    size = int(counts.sum())
    quotas = np.array([total * int(c) // size for c in counts], dtype=np.int64)
    remainders = np.array([total * int(c) % size for c in counts], dtype=object)
    for c in sorted(range(len(counts)), key=lambda c: (-remainders[c], c))[
        : total - int(quotas.sum())
    ]:
        quotas[c] += 1
    short = np.flatnonzero(quotas > available)
    if len(short):
        surplus = int((quotas - available)[short].sum())
        warnings.warn(
            f"classes {short.tolist()[:10]} have fewer members left than their quota; "
            f"{surplus} places go to the other classes",
            stacklevel=3,
        )
        quotas = np.minimum(quotas, available)
        quotas += water_fill(available - quotas, surplus)
    return quotas
