"""Tokens in memory: blocks for language models, padded sentences for classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mlkit.errors import InvalidValueError

__all__ = ["IGNORED", "TokenBlocks", "TokenSequences"]

Example = dict[str, Tensor]

IGNORED = -100
"""Label of a token that no loss counts, in torch and Hugging Face."""


class TokenBlocks(Dataset[Example]):
    """A stream of tokens cut into blocks; a batch is one indexing operation.

    Every token is in a block. Where the stream does not divide evenly, the last block still has the
    full length: it ends with the stream, and the tokens that it shares with the block before it are
    context there (label -100), so that each token is a label exactly once. As the model shifts the
    labels, the first token of every block is context, too.

    Args:
        tokens: (N,), of any integer type.
        is_ignored: (N,), which tokens are context alone; none if None.
        length: Tokens of a block, at least 2.

    Raises:
        InvalidValueError: If the stream is shorter than one block.
    """

    def __init__(
        self, tokens: Int[Tensor, " n"], is_ignored: Bool[Tensor, " n"] | None, length: int
    ) -> None:
        if len(tokens) < length:
            raise InvalidValueError(
                f"{len(tokens)} tokens do not fill one block of {length}; lower "
                "data.sequence_length, or give more text"
            )
        if is_ignored is None:
            is_ignored = torch.zeros(len(tokens), dtype=torch.bool)
        rest = len(tokens) % length
        self._tokens = _cut(tokens.to(torch.int32), length)
        self._ignored = _cut(is_ignored, length)
        if rest:
            self._ignored[-1, : length - rest] = True

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Example:
        return self._at(torch.tensor(index))

    def __getitems__(self, indices: Sequence[int]) -> Example:
        """Return the batch itself; `examples.collate` lets it pass."""
        return self._at(torch.as_tensor(indices))

    def _at(self, rows: Tensor) -> Example:
        tokens = self._tokens[rows].long()
        return {"input_ids": tokens, "labels": tokens.masked_fill(self._ignored[rows], IGNORED)}


def _cut(stream: Tensor, length: int) -> Tensor:
    """Blocks (B, length) of a stream (N,), the last one ending with it."""
    whole = len(stream) // length * length
    blocks = stream[:whole].view(-1, length)
    if whole == len(stream):
        return blocks.clone()
    return torch.cat([blocks, stream[None, -length:]])


class TokenSequences(Dataset[Example]):
    """Labelled sentences; a batch is padded on the right to its longest sentence.

    Args:
        sequences: (length,) each, at least one token.
        labels: (N,).
        pad_token_id: Fills up.

    Raises:
        InvalidValueError: If a sentence has no token.
    """

    def __init__(
        self,
        sequences: Sequence[Int[Tensor, " _"]],
        labels: Int[Tensor, " n"],
        pad_token_id: int,
    ) -> None:
        self._lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
        if len(self._lengths) and not self._lengths.min():
            raise InvalidValueError(
                f"text {int(self._lengths.argmin())} has no token; leave it out"
            )
        self._labels = labels
        self._tokens = torch.zeros(0, 0, dtype=torch.int32)
        if len(sequences):
            padded = pad_sequence(list(sequences), batch_first=True, padding_value=pad_token_id)
            self._tokens = padded.to(torch.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Example:
        """Return the batch itself; `examples.collate` lets it pass."""
        rows = torch.as_tensor(indices)
        lengths = self._lengths[rows]
        width = int(lengths.max())
        return {
            "input_ids": self._tokens[rows, :width].long(),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": self._labels[rows],
        }
