"""What is watched while a fit of recipe `fiited` goes on."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from mlkit.data.ctr import CTRStream, SyntheticCTR
from mlkit.embeddings import DynamicEmbeddingStore, dynamic_stores

__all__ = ["Watch"]

_HEAD = 0.8  # share of all reads that "hot" rows draw


class Watch(L.Callback):
    """Times steps; forecasts by window; how much of what is read has storage.

    Args:
        stream: What is learned from.
        window: Steps of a window: its AUC is that of forecasts made before each update.

    Attributes:
        windows: AUC of each full window.
        coverage: (step, share) after each round: the share of the chunks of hot rows that are
            resident, weighted by how often the rows are read now; of a generated stream.
        churn: Evicted chunks of each round, as a share of the target.
    """

    def __init__(self, stream: CTRStream, window: int) -> None:
        self._stream, self._window = stream, window
        self._times: list[float] = []
        self._logits: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._seen = self._rounds = 0
        self._weights: tuple[int, torch.Tensor] | None = None
        self.windows: list[float] = []
        self.coverage: list[tuple[int, float]] = []
        self.churn: list[float] = []

    @property
    def step_ms(self) -> float:
        """Median time of a step, milliseconds: forward, backward, updates and rounds."""
        return 1000 * statistics.median(self._times)

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return len(self._times)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, and look."""
        self._times.append(time.perf_counter() - self._start)
        self._seen += len(batch["label"])
        self._logits.append(outputs["logits"].cpu())
        self._labels.append(batch["label"].cpu())
        if len(self._logits) == self._window:
            labels = torch.cat(self._labels).long()
            if 0 < int(labels.sum()) < len(labels):
                self.windows.append(float(binary_auroc(torch.cat(self._logits), labels)))
            self._logits, self._labels = [], []
        stores = dynamic_stores(module.net)
        if stores and len(stores[0].rounds) > self._rounds:
            self._rounds = len(stores[0].rounds)
            self.churn.append(stores[0].rounds[-1].churn)
            if isinstance(self._stream, SyntheticCTR) and len(stores) == 1:
                self.coverage.append((batch_idx + 1, self._covered(self._stream, stores[0])))

    def _covered(self, stream: SyntheticCTR, store: DynamicEmbeddingStore) -> float:
        phase = int(np.searchsorted(stream.drift_at, self._seen, side="right"))
        if self._weights is None or self._weights[0] != phase:
            self._weights = phase, _hot_weights(stream, phase)
        resident = store.resident(slice(0, store.tables.num_rows))
        return float(self._weights[1] @ resident.float().mean(1))


def _hot_weights(stream: SyntheticCTR, phase: int) -> torch.Tensor:
    """How often each row is read in a phase, zero for all but the hot ones; sums to 1."""
    parts = []
    for frequency in stream.frequency(phase):
        order = np.argsort(-frequency)
        hot = order[: int(np.searchsorted(frequency[order].cumsum(), _HEAD * frequency.sum())) + 1]
        weights = np.zeros(len(frequency), dtype=np.float32)
        weights[hot] = frequency[hot]
        parts.append(weights)
    found = torch.from_numpy(np.concatenate(parts))
    return found / found.sum()
