"""Tiny tokenizers, in the format that transformers saves."""

from __future__ import annotations

from pathlib import Path

__all__ = ["WORDS", "write_tokenizer"]

WORDS = ("<unk>", "the", "cat", "sat", "on", "a", "mat", "dog", "good", "bad")


def write_tokenizer(folder: Path, **special: str) -> None:
    """Save a word tokenizer; with `cls_token` and `sep_token` it frames sentences as BERT does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*WORDS, *special.values()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in special:
        first, last = special["cls_token"], special["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            special_tokens=[(first, words[first]), (last, words[last])],
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.save_pretrained(folder)
