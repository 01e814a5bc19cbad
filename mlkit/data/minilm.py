"""MiniLM, a small BERT encoder, as its package holds it."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["convert_minilm"]


def convert_minilm(source: Path, destination: Path) -> None:
    """Put the files of the model into a folder that transformers loads."""
    (config,) = source.rglob("config.json")
    for file in config.parent.iterdir():
        shutil.move(file, destination / file.name)
