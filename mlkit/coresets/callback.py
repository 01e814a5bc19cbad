"""Lightning callback that records importance scores during an ordinary `Trainer.fit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mlkit.coresets.dataset import IndexedItem
from mlkit.coresets.dynamics import FINAL_SCORES, DynamicsRecorder
from mlkit.coresets.scores import ScoreTable
from mlkit.errors import InvalidValueError, RunError, nearest

__all__ = ["TrainingDynamics"]

_INDEX_KEYS = ("index", "idx")
_TARGET_KEYS = ("label", "labels", "target", "targets", "y")


class TrainingDynamics(L.Callback):
    """Drive a `DynamicsRecorder` from `Trainer.fit`; survives resume, works under DDP.

    Indices come from the batch: a key "index" or "idx", or an `IndexedDataset`. Logits come from
    the dict that `training_step` returns (key "logits"), or from `pl_module.coreset_logits`.
    Targets come from that dict (key "targets"), from the batch (keys "label", "labels", "target",
    "targets", "y", or the second of two), or from `pl_module.coreset_targets`.

    Args:
        scores: Which scores to record.
        num_samples: Size of the data set; that of the training dataloader's data set if None.
        eval_dataloader: Batches with indices under the evaluation transform; needed for "entropy"
            and "loss", which describe the trained model.
        head: Name of the linear layer whose input "grand" uses; the last `nn.Linear` if None.
        save_to: Write the table there when the fit ends.
        settings: Further arguments of `DynamicsRecorder`.

    A resumed fit records what an uninterrupted one would where the data loader resumes too (as
    that of `mlkit.data` does). With one that starts its epoch again, an example counts once, and
    one that the rest of the epoch does not reach misses that visit.

    Example:
        >>> TrainingDynamics(scores=["aum", "forgetting"], num_samples=1347).recorder.num_samples
        1347
    """

    def __init__(
        self,
        scores: Sequence[str] = ("aum", "forgetting", "el2n"),
        num_samples: int | None = None,
        *,
        eval_dataloader: Iterable[Any] | None = None,
        head: str | None = None,
        save_to: str | Path | None = None,
        **settings: Any,
    ) -> None:
        self._scores = tuple(scores)
        self._settings = settings
        self.eval_dataloader = eval_dataloader
        self.head = head
        self.save_to = save_to
        self.recorder: DynamicsRecorder | None = None
        self._features: Tensor | None = None
        self._hook: Any = None
        DynamicsRecorder(num_samples or 1, scores, **settings)
        if num_samples is not None:
            self.recorder = DynamicsRecorder(num_samples, scores, **settings)

    @property
    def state_key(self) -> str:
        """Key of this callback in a checkpoint."""
        return self._generate_state_key(scores=self._scores, **self._settings)

    # ------------------------------------------------------------------ hooks

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what the scores need, before any step."""
        wanted = [s for s in FINAL_SCORES if s in self._scores]
        if wanted and self.eval_dataloader is None:
            raise InvalidValueError(
                f"{wanted} describe the trained model under the evaluation transform: "
                "pass eval_dataloader=... to TrainingDynamics, or leave them out"
            )
        if "grand" in self._scores:
            layer = self._find_head(pl_module)
            self._hook = layer.register_forward_pre_hook(self._keep_features)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Size the record by the training data, and go on from a checkpoint if there is one."""
        if self.recorder is None:
            self.recorder = DynamicsRecorder(_dataset_size(trainer), self._scores, **self._settings)
        self.recorder.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Close an epoch whose end a checkpoint on its last batch has skipped."""
        assert self.recorder is not None
        while self.recorder.epoch < trainer.current_epoch:
            self.recorder.end_epoch()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record the batch."""
        assert self.recorder is not None
        indices, rest = _split_index(batch, pl_module)
        logits = _logits(outputs, pl_module)
        self.recorder.update(indices, logits, _targets(outputs, rest, pl_module), self._features)
        self._features = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the ranks and open the next epoch."""
        assert self.recorder is not None
        self.recorder.end_epoch()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Merge the ranks, so that the one checkpoint holds what all of them saw."""
        if self.recorder is not None and self.recorder._state:
            self.recorder.sync()
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the pass for entropy and loss, and save the table if asked to."""
        assert self.recorder is not None
        if self._hook is not None:
            self._hook.remove()
        if self.eval_dataloader is not None and not set(FINAL_SCORES).isdisjoint(self._scores):
            was_training = pl_module.training
            pl_module.eval()
            for number, batch in enumerate(self.eval_dataloader):
                if number % trainer.world_size != trainer.global_rank:
                    continue
                batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
                indices, rest = _split_index(batch, pl_module)
                precision = trainer.precision_plugin
                with precision.forward_context():
                    logits = pl_module(precision.convert_input(_inputs(rest)))
                self.recorder.record_final(indices, logits, _targets(None, rest, pl_module))
            pl_module.train(was_training)
            self.recorder.sync()
        if self.save_to is not None and trainer.is_global_zero:
            self.compute().save(self.save_to)

    def compute(self) -> ScoreTable:
        """Return the scores recorded so far."""
        if self.recorder is None:
            raise RunError("nothing was recorded yet: run trainer.fit first")
        return self.recorder.compute()

    def state_dict(self) -> dict[str, Any]:
        """The record, for the checkpoint."""
        if self.recorder is None or not self.recorder._state:
            return {}
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the record of a checkpoint."""
        if not state_dict:
            return
        if self.recorder is None:
            self.recorder = DynamicsRecorder(
                state_dict["num_samples"], self._scores, **self._settings
            )
        self.recorder.load_state_dict(state_dict)

    # --------------------------------------------------------------- features

    def _find_head(self, pl_module: nn.Module) -> nn.Linear:
        layers = {n: m for n, m in pl_module.named_modules() if isinstance(m, nn.Linear)}
        if self.head is None and layers:
            return list(layers.values())[-1]
        if self.head not in layers:
            raise InvalidValueError(
                f"no linear layer {self.head!r} in the model; {nearest(str(self.head), layers)}"
            )
        return layers[self.head]

    def _keep_features(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            self._features = args[0].detach()


def _dataset_size(trainer: L.Trainer) -> int:
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidValueError(
            f"the training data ({type(dataset).__name__}) has no length: pass num_samples=... to "
            "TrainingDynamics"
        ) from None


def _split_index(batch: Any, pl_module: L.LightningModule) -> tuple[Tensor, Any]:
    """Return the indices of a batch and the batch without its `IndexedDataset` wrapping."""
    if isinstance(batch, IndexedItem):
        return batch.index, batch.item
    if isinstance(batch, Mapping):
        for key in _INDEX_KEYS:
            if key in batch:
                return batch[key], batch
    unwrapped = getattr(pl_module, "coreset_indices", None)
    if unwrapped is not None:
        return unwrapped, batch
    raise InvalidValueError(
        "which examples are in this batch? Do one of: (1) give the batch dict a key 'index'; "
        "(2) wrap the training data in mlkit.coresets.IndexedDataset (and the module in "
        "IndexedStepMixin); (3) leave this callback out and call DynamicsRecorder.update(indices, "
        "logits, targets) yourself"
    )


def _logits(outputs: Any, pl_module: L.LightningModule) -> Tensor:
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    logits = getattr(pl_module, "coreset_logits", None)
    if logits is not None:
        return logits
    raise InvalidValueError(
        "where are the logits? Do one of: (1) return {'loss': loss, 'logits': logits} from "
        "training_step; (2) set self.coreset_logits there; (3) leave this callback out and call "
        "DynamicsRecorder.update(indices, logits, targets) yourself"
    )


def _targets(outputs: Any, batch: Any, pl_module: L.LightningModule) -> Tensor:
    if isinstance(outputs, Mapping) and "targets" in outputs:
        return outputs["targets"]
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return batch[key]
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[1]
    targets = getattr(pl_module, "coreset_targets", None)
    if targets is not None:
        return targets
    raise InvalidValueError(
        "where are the targets? Return them from training_step under 'targets', name them "
        f"{' or '.join(map(repr, _TARGET_KEYS))} in the batch dict, or set self.coreset_targets"
    )


def _inputs(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        rest = {k: v for k, v in batch.items() if k not in (*_INDEX_KEYS, *_TARGET_KEYS)}
        return next(iter(rest.values())) if len(rest) == 1 else rest
    return batch[0]
