"""Record importance scores inside the Hugging Face `Trainer`.

    class MyTrainer(DynamicsTrainerMixin, Trainer): ...

    trainer = MyTrainer(model, args, train_dataset=dataset, data_collator=IndexCollator(collator))
    trainer.recorder = DynamicsRecorder(len(dataset))

The data set needs an integer column "index" (`dataset.add_column("index", range(len(dataset)))`)
and the arguments `remove_unused_columns=False`. Token-level labels are scored by the mean over the
labelled tokens; the labels of causal language models are shifted as their loss does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mlkit.coresets.dynamics import DynamicsRecorder
from mlkit.errors import InvalidValueError, MissingDependencyError, RunError

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingDependencyError(
        "recording inside the Hugging Face Trainer needs transformers: "
        "pip install 'mlkit-torch[hf]'"
    ) from error

__all__ = ["DynamicsTrainerMixin", "IndexCollator"]

_FILE = "training_dynamics.pt"


class IndexCollator:
    """Let a collator work on the examples without their index, and add the indices to the batch.

    Args:
        collator: Collates a list of dicts to a dict batch.
        key: Column that holds the index.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], key: str = "index") -> None:
        self.collator, self.key = collator, key

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate.

        Raises:
            InvalidValueError: If the examples have no such column.
        """
        if self.key not in examples[0]:
            raise InvalidValueError(
                f"the examples have the columns {sorted(examples[0])} and no {self.key!r}: add "
                f"dataset.add_column({self.key!r}, range(len(dataset))) and set "
                "remove_unused_columns=False in TrainingArguments"
            )
        indices = torch.tensor([example[self.key] for example in examples])
        batch = self.collator([{k: v for k, v in e.items() if k != self.key} for e in examples])
        batch[self.key] = indices
        return batch


class DynamicsTrainerMixin:
    """Feed `self.recorder` from `compute_loss`; put it before `Trainer` in the bases.

    The record is saved with every checkpoint and taken up by
    `train(resume_from_checkpoint=...)`.
    """

    recorder: DynamicsRecorder | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **more: Any) -> Any:
        """Train and record."""
        if self.recorder is None:
            raise RunError("set trainer.recorder = DynamicsRecorder(len(train_dataset)) first")
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        if folder:
            file = Path(folder) / _FILE
            self.recorder.load_state_dict(torch.load(file, weights_only=True))
        callback = _RecordEpochs(self.recorder)
        self.add_callback(callback)  # type: ignore[attr-defined]
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)  # type: ignore[misc]
        finally:
            self.remove_callback(callback)  # type: ignore[attr-defined]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **more: Any
    ) -> Any:
        """Compute the loss as the Trainer does, and record the batch while training."""
        indices = inputs.pop("index", None)
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)  # type: ignore[misc]
        if model.training and self.recorder is not None:
            if indices is None or labels is None:
                raise InvalidValueError(
                    "a training batch needs 'index' and 'labels': wrap the collator in "
                    "IndexCollator and set remove_unused_columns=False"
                )
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
            if _is_causal(model):
                logits, labels = logits[:, :-1], labels[:, 1:]
            self.recorder.update(indices, logits, labels)
        return (loss, outputs) if return_outputs else loss


def _is_causal(model: Any) -> bool:
    inner = model
    for wrapper in ("module", "_orig_mod", "module"):  # DDP, torch.compile, either way round
        inner = getattr(inner, wrapper, inner)
    return type(inner).__name__.endswith(("ForCausalLM", "LMHeadModel"))


class _RecordEpochs(TrainerCallback):
    """Close epochs and save the record beside each checkpoint."""

    def __init__(self, recorder: DynamicsRecorder) -> None:
        self.recorder = recorder

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.recorder.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.recorder.sync()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.recorder.state_dict(), folder / _FILE)
