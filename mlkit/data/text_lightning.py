"""The Lightning data module behind a `TextSpec`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mlkit.data.examples import collate
from mlkit.data.loader import ResumableLoader
from mlkit.data.split import hold_out
from mlkit.data.text_examples import TokenBlocks, TokenSequences
from mlkit.data.text_rows import TextRows, read_rows
from mlkit.data.text_spec import TextSpec
from mlkit.data.tokenizer import Tokenizer, load_tokenizer
from mlkit.errors import InvalidValueError, nearest

__all__ = ["TextDataModule"]


class TextDataModule(L.LightningDataModule):
    """Tokens of training, validation and test text, in Hugging Face's convention.

    - language model: documents are tokenized, joined with an end-of-document token after each, and
      cut into blocks (see `TokenBlocks` for the tail). Batches are `{"input_ids", "labels"}`, int64
      (batch, sequence_length); the labels are the inputs, which the model shifts, and -100 where no
      prediction counts: in prompts.
    - classification: batches are `{"input_ids", "attention_mask", "labels"}`, padded to their
      longest sentence; sentences are cut to `sequence_length` tokens.

    Args:
        spec: What to load.
        seed: Keys the validation split.
    """

    def __init__(self, spec: TextSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed
        self._parts: dict[str, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        """Let rows that come from the hub be downloaded, on one process."""
        if self.spec.root is None:
            read_rows(self.spec, "train")
            read_rows(self.spec, "test")

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenize; a second call does nothing."""
        if self._parts:
            return
        self.spec.check_files()
        rows = read_rows(self.spec, "train")
        held_out = set(self._held_out(rows))
        validation = rows.select(sorted(held_out))
        training = rows.select([i for i in range(len(rows)) if i not in held_out])
        parts = {"train": training, "val": validation, "test": read_rows(self.spec, "test")}
        self._parts = {name: self._examples(part, name) for name, part in parts.items()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Turns text into tokens and back."""
        return load_tokenizer(self.spec.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def pad_token_id(self) -> int:
        """Fills up short sentences."""
        return self.tokenizer.pad_token_id

    @property
    def model_arguments(self) -> dict[str, int]:
        """What a network has to know of the tokens: `instantiate(model, net=model_arguments)`."""
        return {
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
        }

    def _held_out(self, rows: TextRows) -> list[int]:
        """Positions of the validation rows: whole groups of rows, in an order keyed by the seed."""
        spec = self.spec
        if spec.val_fraction == 0:
            return []
        groups: dict[Any, list[int]] = {}
        for number in range(len(rows)):
            key = number if rows.prompts is None else rows.prompts[number]
            groups.setdefault(key, []).append(number)
        members = list(groups.values())
        is_classification = spec.task == "classification"
        weights = [1 if is_classification else len(text) for text in rows.texts]
        sizes = [sum(weights[i] for i in group) for group in members]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(members), generator=generator).tolist()
        chosen = hold_out(sizes, spec.val_fraction, order)
        if not chosen:
            raise InvalidValueError(
                f"none of the {len(members)} training documents of {spec.name} is small enough to "
                f"hold out data.val_fraction={spec.val_fraction:g} of them; raise it, set it to 0, "
                "or give the text in more documents"
            )
        return [i for number in chosen for i in members[number]]

    def _examples(self, rows: TextRows, part: str) -> Dataset[Any]:
        spec = self.spec
        if spec.task == "classification":
            encoded = self.tokenizer.encode_sequences(rows.texts, spec.sequence_length)
            labels = torch.tensor(rows.labels, dtype=torch.int64)
            sequences = [torch.from_numpy(ids) for ids in encoded]
            return TokenSequences(sequences, labels, self.pad_token_id)
        if not len(rows):
            return _Nothing()
        tokens, is_ignored = self._stream(rows)
        try:
            return TokenBlocks(tokens, is_ignored, spec.sequence_length)
        except InvalidValueError as error:
            raise InvalidValueError(f"the {part} part of {spec.name}: {error}") from None

    def _stream(self, rows: TextRows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All documents in a row with an end after each, and which tokens are prompts."""
        end = np.array([self.tokenizer.eos_token_id], dtype=np.int32)
        texts = self.tokenizer.encode_documents(rows.texts)
        if rows.prompts is None:
            pieces = [ids for text in texts for ids in (text, end)]
            return torch.from_numpy(np.concatenate(pieces)), None
        prompts = self.tokenizer.encode_documents([f"{prompt}\n" for prompt in rows.prompts])
        pieces = [ids for pair in zip(prompts, texts, strict=True) for ids in (*pair, end)]
        joined = torch.from_numpy(np.concatenate(pieces))
        if self.spec.train_on_prompt:
            return joined, None
        lengths = torch.tensor([len(piece) for piece in pieces])
        is_prompt = (torch.arange(len(pieces)) % 3 == 0).repeat_interleave(lengths)
        return joined, is_prompt

    def part(self, name: str) -> Dataset[Any]:
        """The tokens of "train", "val" or "test".

        Raises:
            InvalidValueError: For another name.
        """
        self.setup()
        if name not in self._parts:
            raise InvalidValueError(f"no part {name!r} of the data; {nearest(name, self._parts)}")
        return self._parts[name]

    def loader(self, dataset: Dataset[Any], *, shuffle: bool) -> DataLoader[Any]:
        """A dataloader with this module's batch size and workers; it leaves nothing out."""
        return ResumableLoader(
            dataset,
            batch_size=self.spec.batch_size,
            shuffle=shuffle,
            num_workers=self.spec.num_workers,
            persistent_workers=self.spec.num_workers > 0,
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """The training part, shuffled."""
        return self.loader(self.part("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out part of the training data."""
        return self.loader(self.part("val"), shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test data."""
        return self.loader(self.part("test"), shuffle=False)


class _Nothing(Dataset[Any]):
    """The validation part where nothing is held out."""

    def __len__(self) -> int:
        return 0
