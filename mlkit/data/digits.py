"""scikit-learn's 1,797 handwritten digits as a data set: real data on every machine."""

from __future__ import annotations

from typing import Literal

import torch
from torch.utils.data import TensorDataset

from mlkit.errors import InvalidValueError

__all__ = ["digits"]


def digits(split: Literal["train", "test"]) -> TensorDataset:
    """Return (image, label) pairs: 1,347 for training, 450 for testing, classes in proportion.

    Images are (1, 8, 8) float32 in [0, 1]. The split is ours and fixed. Source: UCI Optical
    Recognition of Handwritten Digits (CC-BY-4.0), as shipped with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise InvalidValueError(f"split must be 'train' or 'test', got {split!r}")
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        range(len(labels)), test_size=450, random_state=0, stratify=labels
    )
    rows = torch.tensor(sorted(train if split == "train" else test))
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return TensorDataset(pixels[rows], torch.tensor(labels)[rows])
