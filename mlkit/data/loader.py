"""A DataLoader whose position and randomness go into Lightning's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["ResumableLoader"]


class ResumableLoader(DataLoader[Any]):
    """Go on in the middle of an epoch exactly where a checkpoint left it.

    Lightning stores the `state_dict` of a loader in its checkpoints. The state is torch's random
    state when the epoch's order was drawn, how many batches were given since, and the random state
    now; so a resumed fit sees the same batches and the same noise as one that was not interrupted.
    """

    _given = 0
    _epoch_start: Tensor | None = None
    _pending: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        pending, self._pending = self._pending, None
        if pending is not None and pending["given"] >= len(self):
            _set_random_state(pending)  # the epoch was over: the next one starts from there
            pending = None
        if pending is not None:
            torch.set_rng_state(pending["epoch_start"])
        self._epoch_start, self._given = torch.get_rng_state(), 0
        batches = super().__iter__()
        if pending is not None:
            for _ in range(pending["given"]):
                next(batches)
            self._given = pending["given"]
            _set_random_state(pending)
        return self._count(batches)

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, with torch's random state."""
        state: dict[str, Any] = {
            "given": self._given,
            "epoch_start": self._epoch_start,
            "now": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next iteration."""
        self._pending = state if state["epoch_start"] is not None else None


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["now"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
