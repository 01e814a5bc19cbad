"""A callback that interrupts a fit at a step, so that a test can see how it goes on."""

from __future__ import annotations

import os

import lightning as L

__all__ = ["InterruptAt", "InterruptedFitError"]


class InterruptedFitError(RuntimeError):
    """What `InterruptAt` raises."""


class InterruptAt(L.Callback):
    """Raise `InterruptedFitError` after the step that MLKIT_TEST_INTERRUPT names.

    In the environment and not in the configuration, because a run that resumes must have the
    configuration of the first.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Interrupt before the next step, when the checkpoint of the step before it is written."""
        if trainer.global_step == int(os.environ.get("MLKIT_TEST_INTERRUPT", "-1")):
            raise InterruptedFitError(f"after step {trainer.global_step}")
