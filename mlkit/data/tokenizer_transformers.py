"""A Hugging Face tokenizer as the data module uses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mlkit.data.pretrained import find_pretrained, loading
from mlkit.data.tokenizer import Ids
from mlkit.errors import InvalidValueError, MissingDependencyError

__all__ = ["TransformersTokenizer"]


class TransformersTokenizer:
    """transformers' `AutoTokenizer`, with padding and an end of document for every family.

    A tokenizer without padding pads with its end-of-text token, as is the custom for GPT-2; one
    without end of text (BERT) ends documents with its separator.

    Args:
        name: A folder, an entry of the offline registry, or a hub name.

    Raises:
        InvalidValueError: If it has neither end-of-text token nor separator.
        MissingDataError: If there is no such folder, or the hub cannot be reached.
        MissingDependencyError: If transformers is absent.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingDependencyError(
                f"data.tokenizer={name} needs transformers: pip install 'mlkit-torch[hf]', or set "
                "data.tokenizer=bytes"
            ) from error
        with loading(name):
            self._tokenizer = AutoTokenizer.from_pretrained(find_pretrained(name))
        known = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        end = next((i for i in known if i is not None), None)
        if end is None:
            raise InvalidValueError(
                f"the tokenizer {name} has neither an end-of-text token nor a separator; set its "
                "eos_token, and save it"
            )
        pad = self._tokenizer.pad_token_id
        self.vocab_size = len(self._tokenizer)
        self.eos_token_id = end
        self.pad_token_id = end if pad is None else pad

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without special tokens."""
        return self._encode(texts, add_special_tokens=False)

    def encode_sequences(self, texts: Sequence[str], max_length: int) -> list[Ids]:
        """Ids of each text, cut, with the special tokens that its models expect."""
        return self._encode(texts, truncation=True, max_length=max_length)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def _encode(self, texts: Sequence[str], **options: object) -> list[Ids]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
