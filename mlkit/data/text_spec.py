"""What text a run should learn from, checked before anything is loaded (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlkit.data.offline import check_root
from mlkit.data.pretrained import find_pretrained
from mlkit.data.text_rows import read_rows
from mlkit.errors import InvalidValueError, nearest

if TYPE_CHECKING:
    from mlkit.data.text_lightning import TextDataModule

__all__ = ["TextSpec"]

Task = Literal["language_model", "classification"]


@dataclass(kw_only=True)
class TextSpec:
    """A text data set, its splits, its tokens and its loading, as configuration.

    Args:
        name: Name in reports.
        task: "language_model" (documents are joined and cut into blocks) or "classification".
        train: Configuration (`_target_`) of the training rows: a list of dicts, or a
            `datasets.Dataset`.
        test: The same for testing.
        root: Folder of the files, or None for text that ships with a dependency or the hub.
        text_key: Key of the text in a row.
        prompt_key: Key of a prompt that stands before the text, on a line of its own.
        train_on_prompt: Predict the tokens of the prompt, too; else their labels are -100.
        label_key: Key of the label in a row.
        num_classes: Number of labels, which are 0 .. num_classes - 1; for classification alone.
        tokenizer: "bytes", or a folder or hub name that transformers' `AutoTokenizer` loads.
        sequence_length: Tokens of a block, at least 2; longer sentences are cut to it.
        batch_size: Blocks or sentences per batch, on each process.
        val_fraction: Share of the training part held out for validation, in [0, 1): of its
            characters, by whole documents, for a language model; of its rows for classification.
            Rows with the same prompt stay together.
        num_workers: Worker processes of each dataloader.

    Raises:
        InvalidValueError: For a value out of range.
    """

    name: str
    task: Task
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    root: str | None = None
    text_key: str = "text"
    prompt_key: str | None = None
    train_on_prompt: bool = False
    label_key: str = "label"
    num_classes: int | None = None
    tokenizer: str = "bytes"
    sequence_length: int = 64
    batch_size: int = 8
    val_fraction: float = 0.1
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise InvalidValueError(
                f"no data.task {self.task!r}; {nearest(self.task, get_args(Task))}"
            )
        fraction = self.val_fraction
        if not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise InvalidValueError(
                f"data.val_fraction must be a number in [0, 1), got {fraction!r}"
            )
        for key, least in (("sequence_length", 2), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise InvalidValueError(
                    f"data.{key} must be an integer of at least {least}, got {value!r}"
                )
        if not isinstance(self.tokenizer, str) or not self.tokenizer:
            raise InvalidValueError(
                f"data.tokenizer must be 'bytes', a folder or a hub name, got {self.tokenizer!r}"
            )
        if self.task == "classification":
            if not isinstance(self.num_classes, int) or self.num_classes < 2:
                raise InvalidValueError(
                    "data.task=classification needs data.num_classes of at least 2, got "
                    f"{self.num_classes!r}"
                )
            if self.prompt_key is not None:
                raise InvalidValueError(
                    "data.prompt_key is for data.task=language_model; join the texts in the rows"
                )
        elif self.num_classes is not None:
            raise InvalidValueError(
                f"data.num_classes={self.num_classes} is for data.task=classification; set it to "
                "null, or the task"
            )
        if self.train_on_prompt and self.prompt_key is None:
            raise InvalidValueError("data.train_on_prompt=true needs data.prompt_key")

    def check_files(self) -> None:
        """Raise if the data's or the tokenizer's files are absent, naming the command to fetch.

        Raises:
            MissingDataError: If `root` or the tokenizer's folder is set and does not exist.
        """
        check_root(self.name, self.root, " (docs/data.md says where it comes from)")
        if self.tokenizer != "bytes":
            find_pretrained(self.tokenizer)

    def source(self) -> str:
        """Where the text comes from, with a hash of the rows.

        The rows are hashed, not the files: parquet files of equal content differ by the version of
        their writer.
        """
        target = self.train.get("_target_", "rows")
        hashes = (f"{part} sha256 {read_rows(self, part).content_hash()}" for part in _PARTS)
        return f"{target}, {', '.join(hashes)}"

    def build(self, seed: int) -> TextDataModule:
        """Return the data module; `seed` keys the validation split."""
        from mlkit.data.text_lightning import TextDataModule

        return TextDataModule(self, seed)


_PARTS = ("train", "test")
