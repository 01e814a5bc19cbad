"""What a *synthetic* click stream is made of, checked before it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from mlkit.errors import InvalidValueError, nearest

__all__ = ["Plant", "SyntheticConfig"]

Plant = Literal["frequency", "independent"]


def _default_sizes() -> tuple[int, ...]:
    return tuple(int(size) for size in np.geomspace(200, 60_000, 26).round())


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What is generated.

    Args:
        num_samples: Examples.
        table_sizes: Rows of each table; by default 26 tables from 200 to 60,000 rows, 293,344 in
            all.
        zipf: Exponents of Zipf's law, given to the tables in turn: the row of rank k is drawn in
            proportion to k^-s.
        latent_dim: The largest true dimension.
        min_dim: The smallest, where a table interacts.
        latent_mean: Mean of the components of a latent vector, whose standard deviation is 1. Above
            0 a row shifts the log-odds by itself, too, and a network finds the vectors sooner.
        plant: "frequency": the true dimension falls from `latent_dim` to `min_dim` with the
            logarithm of the rank, and follows the rank in a drift. "independent": it is uniform
            between the two and stays with the row.
        num_interacting: Tables whose rows have vectors, spread evenly over the list.
        drift_at: Where drifts happen, as shares of the examples in (0, 1), ascending.
        drift_share: Share of each table's rows that exchange their ranks at random in a drift.
        renew_share: Share of each table's rows whose vector or number is drawn anew in a drift.
        num_dense: Dense features, standard normal.
        interaction_share: Share of the variance of the log-odds that is due to pairs.
        linear_share: Share due to the numbers; the dense features have the rest.
        base_rate: Rate of clicks in the first phase.
        oracle_auc: Expected AUC of the true log-odds there: no model can do better.

    Raises:
        InvalidValueError: For a value out of range.
    """

    num_samples: int = 200_000
    table_sizes: Sequence[int] = field(default_factory=_default_sizes)
    zipf: Sequence[float] = (1.05, 1.2)
    latent_dim: int = 64
    min_dim: int = 2
    latent_mean: float = 0.5
    plant: Plant = "frequency"
    num_interacting: int = 3
    drift_at: Sequence[float] = (0.375,)
    drift_share: float = 0.1
    renew_share: float = 0.0
    num_dense: int = 4
    interaction_share: float = 0.7
    linear_share: float = 0.2
    base_rate: float = 0.25
    oracle_auc: float = 0.8

    def __post_init__(self) -> None:
        if self.plant not in get_args(Plant):
            raise InvalidValueError(
                f"no plant {self.plant!r}; {nearest(self.plant, get_args(Plant))}"
            )
        for key in ("num_samples", "min_dim", "num_dense"):
            if getattr(self, key) < 1:
                raise InvalidValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.latent_dim < self.min_dim:
            raise InvalidValueError(
                f"latent_dim={self.latent_dim} is below min_dim={self.min_dim}; raise it"
            )
        if len(self.table_sizes) < 2 or min(self.table_sizes) < 2:
            raise InvalidValueError(
                "table_sizes must name at least two tables of at least two rows, got "
                f"{list(self.table_sizes)}"
            )
        if not self.zipf or min(self.zipf) < 0:
            raise InvalidValueError(
                f"zipf must hold exponents of at least 0, got {list(self.zipf)}"
            )
        if not 2 <= self.num_interacting <= len(self.table_sizes):
            raise InvalidValueError(
                f"num_interacting must be in 2 .. {len(self.table_sizes)}, the number of tables, "
                f"got {self.num_interacting}"
            )
        for key in ("drift_share", "renew_share", "interaction_share", "linear_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise InvalidValueError(f"{key} must be in [0, 1], got {getattr(self, key)}")
        if self.interaction_share + self.linear_share > 1:
            raise InvalidValueError(
                f"interaction_share={self.interaction_share} and linear_share={self.linear_share} "
                "must not exceed 1 together"
            )
        if self.linear_share and self.num_interacting == len(self.table_sizes):
            raise InvalidValueError(
                f"linear_share={self.linear_share} needs a table that does not interact; lower "
                "num_interacting, or set linear_share=0"
            )
        if not 0.01 <= self.base_rate <= 0.99 or not 0.5 < self.oracle_auc <= 0.95:
            raise InvalidValueError(
                "base_rate must be in [0.01, 0.99] and oracle_auc in (0.5, 0.95], got "
                f"{self.base_rate} and {self.oracle_auc}"
            )
        borders = [0, *self.drift_positions, self.num_samples]
        if any(early >= late for early, late in pairwise(borders)):
            raise InvalidValueError(
                "drift_at must be shares of the examples in (0, 1), ascending, got "
                f"{list(self.drift_at)} of {self.num_samples} examples"
            )

    @property
    def drift_positions(self) -> tuple[int, ...]:
        """Before which examples the drifts happen."""
        return tuple(round(share * self.num_samples) for share in self.drift_at)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of the variance of the log-odds: pairs, numbers, dense features."""
        rest = 1 - self.interaction_share - self.linear_share
        return self.interaction_share, self.linear_share, max(rest, 0.0)
