"""Tiny tokenizers and networks, in the format that transformers saves, and public files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from tests.helpers.runs import ROOT

__all__ = ["WORDS", "network_overrides", "public_file", "write_network", "write_tokenizer"]

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


def write_network(folder: Path, kind: Literal["llama", "bert"] = "llama") -> None:
    """Save a network of one layer, with a tokenizer of its own."""
    import transformers

    special = {"cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>"}
    special = special if kind == "bert" else {"eos_token": "<end>"}
    sizes = {
        "vocab_size": len(WORDS) + len(special),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
    }
    write_tokenizer(folder, **special)
    if kind == "bert":
        transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def network_overrides(model: str, folder: Path) -> list[str]:
    """Write a small network for a model configuration that wants a pretrained one; how to use it.

    Configurations that make their own weights need none.
    """
    kinds: dict[str, Literal["llama", "bert"]] = {
        "smollm2_135m": "llama",
        "hf_causal_lm": "llama",
        "minilm": "bert",
        "hf_classifier": "bert",
    }
    if model not in kinds:
        return []
    write_network(folder, kinds[model])
    return [f"model.net.pretrained='{folder}'"]


def public_file(name: str, source: str) -> Path:
    """The folder of a file that no package carries; skips where it is not on this machine."""
    folders = [Path(os.environ.get("MLKIT_DATA") or "/nowhere"), ROOT.parent / "shared" / "data"]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    pytest.skip(f"{name} is not in $MLKIT_DATA; it is a file of {source}")
