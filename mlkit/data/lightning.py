"""The Lightning data module behind a `DataSpec`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mlkit.data.examples import Examples, TensorExamples, collate, labels_of, load_tensors
from mlkit.data.loader import ResumableLoader
from mlkit.data.spec import DataSpec
from mlkit.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingDataError,
    MissingDependencyError,
)

__all__ = ["ClassificationDataModule"]


class ClassificationDataModule(L.LightningDataModule):
    """Training, validation and test examples as dict batches `{"index", "input", "label"}`.

    "index" is the position in the training pool (what is left after the validation split), which
    is what scores and coresets refer to.

    Args:
        spec: What to load.
        seed: Keys the validation split and the label noise.

    Attributes:
        clean_labels: Labels of the training pool before the noise.
        pool_labels: Labels of the training pool that training sees.
    """

    clean_labels: Int[Tensor, " n"]
    pool_labels: Int[Tensor, " n"]

    def __init__(self, spec: DataSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed
        self._parts: dict[str, Dataset[Any]] = {}
        self._tensors: dict[int, Tensor] = {}

    def prepare_data(self) -> None:
        """Let data sets that are told to (`download: true`) fetch themselves, on one process."""
        if self.spec.downloads:
            self._load(self.spec.train)
            self._load(self.spec.test)

    def setup(self, stage: str | None = None) -> None:
        """Load the data sets and split them; a second call does nothing."""
        if self._parts:
            return
        spec = self.spec
        spec.check_files()
        train, test = self._load(spec.train), self._load(spec.test)
        labels = labels_of(train, spec.label_key, spec.input_key)
        self._check_labels(labels, "training")
        self._check_labels(labels_of(test, spec.label_key, spec.input_key), "test")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator)
        held_out = int(spec.val_fraction * len(labels))
        validation, pool = order[:held_out].sort().values, order[held_out:].sort().values
        noisy = _redraw(labels, spec.label_noise, spec.num_classes, generator)
        self.clean_labels, self.pool_labels = labels[pool], noisy[pool]
        self._parts = {
            "pool": self._examples(train, noisy, pool, training=False),
            "train": self._examples(train, noisy, pool, training=True),
            "val": self._examples(train, noisy, validation, training=False),
            "test": self._examples(test, None, None, training=False),
        }

    def _load(self, node: Any) -> Any:
        from hydra.errors import InstantiationException
        from hydra.utils import instantiate

        try:
            dataset = instantiate(node)
        except InstantiationException as error:
            cause = error.__cause__
            if "torchvision::nms" in str(error):
                raise MissingDependencyError(
                    "torchvision does not match torch (a CPU-only torch wheel beside the "
                    "registry's torchvision): install the pair of constraints.txt, "
                    "torch==2.14.0 torchvision==0.29.0"
                ) from error
            if isinstance(cause, RuntimeError) and "not found" in str(cause):
                raise MissingDataError(
                    f"{self.spec.name} is not at data.root={self.spec.root}: {cause} "
                    "Set data.root=/path/to/your/copy"
                ) from error
            raise
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InvalidTypeError(
                f"data.{self.spec.name} must be a map-style data set, got the iterable "
                f"{type(dataset).__name__}"
            )
        return dataset

    def _check_labels(self, labels: Tensor, part: str) -> None:
        if not len(labels):
            raise InvalidValueError(f"the {part} part of {self.spec.name} is empty")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.spec.num_classes:
            raise InvalidValueError(
                f"{part} labels of {self.spec.name} lie in [{low}, {high}] and data.num_classes is "
                f"{self.spec.num_classes}; they must be 0 .. num_classes - 1"
            )

    def _examples(
        self, dataset: Any, labels: Tensor | None, positions: Tensor | None, *, training: bool
    ) -> Dataset[Any]:
        spec = self.spec
        keys = {"input_key": spec.input_key, "label_key": spec.label_key}
        configured = (training and spec.train_transform) or spec.eval_transform
        transform = _compose(configured)
        if spec.in_memory:
            inputs = self._inputs(dataset, transform)
            if labels is None:
                labels = labels_of(dataset, spec.label_key, spec.input_key)
            if positions is None:
                return TensorExamples(inputs, labels)
            return TensorExamples(inputs[positions], labels[positions])
        if labels is not None and positions is not None:
            labels = labels[positions]
        return Examples(dataset, labels=labels, positions=positions, transform=transform, **keys)

    def _inputs(self, dataset: Any, transform: Callable[[Any], Any] | None) -> Tensor:
        """All inputs of a data set as one tensor, made once."""
        if id(dataset) not in self._tensors:
            self._tensors[id(dataset)] = load_tensors(
                dataset, transform, self.spec.input_key, self.spec.label_key
            )
        return self._tensors[id(dataset)]

    def content_hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of the in-memory inputs and the clean labels."""
        self.setup()
        digest = hashlib.sha256(self.clean_labels.numpy().data)
        for inputs in self._tensors.values():
            digest.update(inputs.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def part(self, name: str) -> Dataset[Any]:
        """The examples of "train", "val", "test", or "pool" (train without augmentation)."""
        self.setup()
        return self._parts[name]

    def loader(self, dataset: Dataset[Any], *, shuffle: bool) -> DataLoader[Any]:
        """A dataloader with this module's batch size and workers.

        Every example is in every epoch, except that training drops a last batch of one example,
        which batch normalisation cannot take.
        """
        size = len(dataset)  # type: ignore[arg-type]
        return ResumableLoader(
            dataset,
            batch_size=self.spec.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and size > 1 and size % self.spec.batch_size == 1,
            num_workers=self.spec.num_workers,
            persistent_workers=self.spec.num_workers > 0,
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """All training examples, shuffled."""
        return self.loader(self.part("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out part of the training data."""
        return self.loader(self.part("val"), shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test data."""
        return self.loader(self.part("test"), shuffle=False)


def _compose(configured: Sequence[Any] | None) -> Callable[[Any], Any] | None:
    if not configured:
        return None
    from hydra.utils import instantiate

    steps = [instantiate(node) for node in configured]

    def apply(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return apply


def _redraw(
    labels: Int[Tensor, " n"], fraction: float, num_classes: int, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Redraw a fraction of the labels uniformly from all classes (some keep theirs by chance)."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = torch.randint(num_classes, (len(chosen),), generator=generator)
    return noisy
