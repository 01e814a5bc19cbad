"""One fit of a recipe: callbacks from the configuration, resumed from its own checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from mlkit.report import RunContext

__all__ = ["fit", "quiet_fits"]


def quiet_fits() -> None:
    """Keep Lightning from saying for each of many short fits what is true of all."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # small data sets are in memory, where workers only cost time
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # lightning 2.6.6 itself uses a class that torch 2.14 has deprecated
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", append=False)


def fit(
    run: RunContext,
    key: str,
    module: L.LightningModule,
    loader: DataLoader[Any],
    trainer: DictConfig,
    callbacks: DictConfig,
    extra: Sequence[L.Callback] = (),
    **settings: Any,
) -> None:
    """Train a module; goes on from the fit's checkpoint if there is one.

    Args:
        run: Its directory holds the checkpoints.
        key: Name of the fit, unique in the run.
        module: What is trained.
        loader: Its batches.
        trainer: Configuration of the Trainer.
        callbacks: Configurations of callbacks; one with a `dirpath` writes to the fit's folder.
        extra: Callbacks of this fit.
        settings: Further arguments of the Trainer, such as `max_steps`.
    """
    folder = run.directory / "checkpoints" / key
    configured = [
        instantiate(node, **({"dirpath": str(folder)} if "dirpath" in node else {}))
        for node in callbacks.values()
    ]
    has_checkpoints = any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in configured)
    made = instantiate(
        trainer,
        callbacks=[*configured, *extra],
        enable_checkpointing=has_checkpoints,
        **settings,
    )
    last = folder / "last.ckpt"
    made.fit(
        module,
        loader,
        ckpt_path=str(last) if last.is_file() else None,
        weights_only=True if last.is_file() else None,
    )
