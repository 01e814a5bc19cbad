"""SmolLM2 from its quantised GGUF file to a folder that transformers loads and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["convert_smollm2"]


def convert_smollm2(source: Path, destination: Path) -> None:
    """Write a dense bfloat16 model and its tokenizer in Hugging Face's layout.

    The weights are those of the GGUF file, which rounds them to about 4 bits (Q4_1): compare a
    changed model with this one, never with published scores of SmolLM2.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = source.rglob("*.gguf")
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    try:
        from transformers import GgufConfig

        # without it the weights stay in their quantised form, and cannot be saved or trained
        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # older versions always make them dense
        pass
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(file.parent, dtype=torch.float32, **options)
    model.to(torch.bfloat16).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    readable = (destination / "config.json").stat().st_mode  # the weights were written for us alone
    for weights in destination.glob("*.safetensors"):
        weights.chmod(readable)
