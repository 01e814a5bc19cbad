"""What a run should learn from, checked before anything is loaded (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlkit.data.offline import check_root, content_hash
from mlkit.errors import InvalidValueError

if TYPE_CHECKING:
    from mlkit.data.lightning import ClassificationDataModule

__all__ = ["DataSpec"]


@dataclass(kw_only=True)
class DataSpec:
    """A supervised data set, its splits and its loading, as configuration.

    Args:
        name: Name in reports.
        train: Configuration (`_target_`) of any map-style data set for training.
        test: The same for testing.
        input_shape: Shape of one input after the transforms.
        num_classes: Number of labels, which are 0 .. num_classes - 1.
        root: Folder of the files, or None for data that ship with a dependency.
        batch_size: Examples per batch, on each process.
        val_fraction: Share of the training part held out for validation, in [0, 1).
        label_noise: Share of the remaining training labels (and of the validation labels) redrawn
            uniformly from all classes, in [0, 1]. Test labels stay as they are.
        in_memory: Keep inputs as one tensor, transformed once; rules out `train_transform`.
        num_workers: Worker processes of each dataloader.
        train_transform: Configurations of callables, applied in turn to a training input.
        eval_transform: The same for evaluation (and for training where there is no
            `train_transform`).
        input_key: Key of the input where rows are dicts (Hugging Face `datasets`).
        label_key: Key of the label there.

    Raises:
        InvalidValueError: For a value out of range.
    """

    name: str
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    input_shape: Sequence[int]
    num_classes: int
    root: str | None = None
    batch_size: int = 64
    val_fraction: float = 0.1
    label_noise: float = 0.0
    in_memory: bool = False
    num_workers: int = 0
    train_transform: Sequence[Any] | None = None
    eval_transform: Sequence[Any] | None = None
    input_key: str = "image"
    label_key: str = "label"

    def __post_init__(self) -> None:
        for key, allowed in (("val_fraction", "[0, 1)"), ("label_noise", "[0, 1]")):
            value = getattr(self, key)
            if (
                not isinstance(value, int | float)
                or not 0 <= value <= 1
                or (value == 1 and key == "val_fraction")
            ):
                raise InvalidValueError(f"data.{key} must be a number in {allowed}, got {value!r}")
        for key, least in (("num_classes", 2), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise InvalidValueError(
                    f"data.{key} must be an integer of at least {least}, got {value!r}"
                )
        if self.in_memory and self.train_transform:
            raise InvalidValueError(
                "data.in_memory=true transforms the inputs once, which would freeze "
                "data.train_transform; set one of them off"
            )

    def check_files(self) -> None:
        """Raise if the data's files are absent, naming the command that fetches them.

        Raises:
            MissingDataError: If `root` is set and does not exist.
        """
        if not self.downloads:
            check_root(
                self.name,
                self.root,
                " (its licence does not let us ship it), or data.train.download=true "
                "data.test.download=true where you may fetch it",
            )

    @property
    def downloads(self) -> bool:
        """True if the data sets are told to download themselves."""
        return bool(self.train.get("download") or self.test.get("download"))

    def source(self) -> str:
        """Where the data come from, with a hash of the files, or of the arrays without files."""
        target = str(self.train.get("_target_", "a data set"))
        if self.root is not None:
            return f"{target}, files sha256 {content_hash(Path(self.root))}"
        if not self.in_memory:
            return target
        return f"{target}, arrays sha256 {self.build(seed=0).content_hash()}"

    def build(self, seed: int) -> ClassificationDataModule:
        """Return the data module; `seed` keys the validation split and the label noise."""
        from mlkit.data.lightning import ClassificationDataModule

        return ClassificationDataModule(self, seed)
