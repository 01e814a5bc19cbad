"""Text to token ids and back: bytes where nothing is installed, or a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mlkit.errors import InvalidValueError

__all__ = ["ByteTokenizer", "Tokenizer", "load_tokenizer"]

Ids = NDArray[np.int32]


@runtime_checkable
class Tokenizer(Protocol):
    """What a data module needs of a tokenizer.

    Attributes:
        vocab_size: Ids are 0 .. vocab_size - 1.
        pad_token_id: Fills up short sequences.
        eos_token_id: Ends a document.
    """

    vocab_size: int
    pad_token_id: int
    eos_token_id: int

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text alone, of any length."""

    def encode_sequences(self, texts: Sequence[str], max_length: int) -> list[Ids]:
        """Ids of each text as one input of a classifier, cut to `max_length`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""


class ByteTokenizer:
    """UTF-8 bytes as tokens: 256 of them, then the end of a document, then padding.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> ids = tokenizer.encode("né")
        >>> ids, tokenizer.decode([*ids, tokenizer.eos_token_id])
        ([110, 195, 169], 'né')
    """

    vocab_size = 258
    eos_token_id = 256
    pad_token_id = 257

    def encode(self, text: str) -> list[int]:
        """Ids of one text.

        Raises:
            InvalidValueError: If the text holds a lone surrogate, which UTF-8 cannot.
        """
        return self._bytes(text).tolist()

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text."""
        return [self._bytes(text) for text in texts]

    def encode_sequences(self, texts: Sequence[str], max_length: int) -> list[Ids]:
        """Ids of each text, cut to `max_length` - 1, and the end of the document."""
        end = np.array([self.eos_token_id], dtype=np.int32)
        return [np.concatenate([self._bytes(text)[: max_length - 1], end]) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    @staticmethod
    def _bytes(text: str) -> Ids:
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidValueError(
                f"a text holds the lone surrogate {text[error.start]!r} at position {error.start}, "
                "which is no valid Unicode; repair the text"
            ) from error
        return np.frombuffer(content, dtype=np.uint8).astype(np.int32)


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a configuration.

    Args:
        name: "bytes", or a folder, an entry of the offline registry, or a hub name that
            transformers' `AutoTokenizer` loads.

    Raises:
        MissingDataError: If there is no such folder.
        MissingDependencyError: If transformers is needed and absent.
    """
    if name == "bytes":
        return ByteTokenizer()
    from mlkit.data.tokenizer_transformers import TransformersTokenizer

    return TransformersTokenizer(name)
