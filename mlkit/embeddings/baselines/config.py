"""What `mlkit.convert` makes of embedding tables: the settings of the baselines, without torch.

All of them replace `nn.EmbeddingBag` by tables of fewer bytes that start to train anew; no weight
is taken over. Bytes (and any budget of `MDEConfig`) are for the tables of one call of
`mlkit.convert`: convert what shares them in one call, or a saved model cannot be built again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from mlkit.embeddings.memory import OPTIMIZER_STATE, parse_budget
from mlkit.errors import InvalidValueError, nearest

__all__ = ["CAFEConfig", "HashingConfig", "MDEConfig", "NarrowConfig", "QRConfig"]


@dataclass(frozen=True)
class _BaselineConfig:
    """What all baselines are told.

    Args:
        memory_budget: A fraction (float in (0, 1]) of the dense tables' bytes with the same
            optimizer, or bytes (integer, or "2GiB") for all converted tables together, of which
            each gets a share in proportion to its dense bytes.
        optimizer: Whose state counts: "sgd", "rowwise_adagrad", "adagrad" or "adam".
        min_rows: Tables with fewer rows stay as they are.
    """

    memory_budget: int | str | float = 0.35
    optimizer: str = "rowwise_adagrad"
    min_rows: int = 0

    def __post_init__(self) -> None:
        parse_budget(self.memory_budget, 1)
        if self.optimizer not in OPTIMIZER_STATE:
            raise InvalidValueError(
                f"optimizer {self.optimizer!r} is unknown; "
                f"{nearest(str(self.optimizer), OPTIMIZER_STATE)}"
            )
        _check_integer("min_rows", self.min_rows, 0)


@dataclass(frozen=True)
class HashingConfig(_BaselineConfig):
    """Ids share the rows of a smaller table; see `HashingEmbeddingBag`.

    Args:
        memory_budget: Fraction of the dense bytes (float), or bytes of all tables.
        optimizer: Whose state counts.
        min_rows: Tables with fewer rows stay as they are.
        seed: Keys the hash.

    Raises:
        InvalidValueError: For a value out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("seed", self.seed)


@dataclass(frozen=True)
class QRConfig(_BaselineConfig):
    """A row is composed of a quotient's and a remainder's; see `QREmbeddingBag`.

    Args:
        memory_budget: Fraction of the dense bytes (float), or bytes of all tables.
        optimizer: Whose state counts.
        min_rows: Tables with fewer rows stay as they are.
        operation: "mult" or "add".

    Raises:
        InvalidValueError: For a value out of range.
    """

    operation: Literal["mult", "add"] = "mult"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.operation not in ("mult", "add"):
            raise InvalidValueError(f"operation must be 'mult' or 'add', got {self.operation!r}")


@dataclass(frozen=True)
class NarrowConfig(_BaselineConfig):
    """One smaller dimension for all rows; see `NarrowEmbeddingBag`.

    Args:
        memory_budget: Fraction of the dense bytes (float), or bytes of all tables.
        optimizer: Whose state counts.
        min_rows: Tables with fewer rows stay as they are.
        project: Whether to project to the full dimension; otherwise zeros fill it.

    Raises:
        InvalidValueError: For a value out of range.
    """

    project: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.project, bool):
            raise InvalidValueError(f"project must be True or False, got {self.project!r}")


@dataclass(frozen=True)
class MDEConfig(_BaselineConfig):
    """A dimension for each table, by its size; see `mixed_dimensions`.

    Args:
        memory_budget: Fraction of the dense bytes of all converted tables together (float), or
            their bytes.
        optimizer: Whose state counts.
        min_rows: Tables with fewer rows stay as they are.
        alpha: How strongly dimensions follow sizes; 0.3 in DLRM's code.

    Raises:
        InvalidValueError: For a value out of range.
    """

    alpha: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("alpha", self.alpha)
        if not 0 <= self.alpha < math.inf:
            raise InvalidValueError(f"alpha must be at least 0 and finite, got {self.alpha}")


@dataclass(frozen=True)
class CAFEConfig(_BaselineConfig):
    """Rows of their own for ids that matter now; see `CAFEEmbeddingBag`.

    Every converted table needs `register_optimizer(optimizer)` (or `step()` after each step).

    Args:
        memory_budget: Fraction of the dense bytes (float), or bytes of all tables.
        optimizer: Whose state counts.
        min_rows: Tables with fewer rows stay as they are.
        hash_share: Share of the budget for shared rows, in (0, 1); 0.5 in CAFE's code.
        threshold: Score of a hot id, or None: that of the last place.
        decay: Factor of all scores, in (0, 1].
        decay_every: Steps between decays.
        seed: Keys the hashes.

    Raises:
        InvalidValueError: For a value out of range.
    """

    hash_share: float = 0.5
    threshold: float | None = None
    decay: float = 0.9
    decay_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("hash_share", self.hash_share)
        if not 0 < self.hash_share < 1:
            raise InvalidValueError(f"hash_share must be in (0, 1), got {self.hash_share}")
        if self.threshold is not None:
            _check_number("threshold", self.threshold)
            if not 0 < self.threshold < math.inf:
                raise InvalidValueError(
                    f"threshold must be above 0 and finite, or None, got {self.threshold}"
                )
        _check_number("decay", self.decay)
        if not 0 < self.decay <= 1:
            raise InvalidValueError(f"decay must be in (0, 1], got {self.decay}")
        _check_integer("decay_every", self.decay_every, 1)
        _check_integer("seed", self.seed)


def _check_integer(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidValueError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise InvalidValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValueError(f"{name} must be a number, got {value!r}")
