"""Hugging Face networks for text: small ones from a configuration, or pretrained ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mlkit.data.pretrained import find_pretrained, loading
from mlkit.errors import InvalidValueError, MissingDependencyError

__all__ = ["causal_lm", "sequence_classifier"]


def causal_lm(
    *,
    pretrained: str | None = None,
    config: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    dtype: str = "float32",
) -> nn.Module:
    """Return a causal language model, pretrained or with random weights.

    Args:
        pretrained: A folder, the name of an offline entry, or a hub name.
        config: In its place, arguments of a transformers configuration with its "model_type"
            ("llama", "gpt2", ...); torch's random state draws the weights.
        vocab_size: Number of token ids of the data. A pretrained model must have as many.
        pad_token_id: Padding of the data.
        eos_token_id: End of a document in the data.
        dtype: Name of a torch dtype for the weights.

    Raises:
        InvalidValueError: For both or neither of `pretrained` and `config`, a `config` without
            vocabulary, or a model that lacks tokens of the data.
        MissingDataError: If the pretrained model is not there.
        MissingDependencyError: If transformers is absent.
    """
    transformers = _import_transformers("causal_lm")
    if (pretrained is None) == (config is None):
        raise InvalidValueError(
            f"give either pretrained or config, got pretrained={pretrained!r}, config={config!r}"
        )
    weights = _dtype(dtype)
    if pretrained is not None:
        with loading(pretrained):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                find_pretrained(pretrained), dtype=weights
            )
        return _fit_to_data(model, pretrained, vocab_size, pad_token_id)
    if vocab_size is None:
        raise InvalidValueError(
            "a model from config needs vocab_size, the number of token ids of text data; is the "
            "data a text set?"
        )
    arguments = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, **(config or {})}
    arguments |= {"vocab_size": vocab_size, "pad_token_id": pad_token_id}
    kind = arguments.pop("model_type", None)
    if kind is None:
        raise InvalidValueError(
            f"config needs a model_type of transformers, such as llama; got {dict(config or {})}"
        )
    try:
        full = transformers.AutoConfig.for_model(kind, **arguments)
    except ValueError as error:
        raise InvalidValueError(f"config.model_type={kind} is none of transformers' ") from error
    return transformers.AutoModelForCausalLM.from_config(full, dtype=weights)


def sequence_classifier(
    pretrained: str,
    num_classes: int | None,
    *,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    dtype: str = "float32",
) -> nn.Module:
    """Return a pretrained network with a new classification head.

    Args:
        pretrained: A folder, the name of an offline entry, or a hub name.
        num_classes: Number of logits.
        vocab_size: Number of token ids of the data; the model must have as many.
        pad_token_id: Padding of the data; decoders find the last token by it.
        eos_token_id: Accepted, as `causal_lm` does; a classifier has no use for it.
        dtype: Name of a torch dtype for the weights.

    Raises:
        InvalidValueError: If there is no number of classes, or the model lacks tokens of the data.
        MissingDataError: If the pretrained model is not there.
        MissingDependencyError: If transformers is absent.
    """
    transformers = _import_transformers("sequence_classifier")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise InvalidValueError(
            f"a classifier needs num_classes of at least 2, got {num_classes!r}; is the data for "
            "data.task=classification?"
        )
    with loading(pretrained):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            find_pretrained(pretrained), num_labels=num_classes, dtype=_dtype(dtype)
        )
    return _fit_to_data(model, pretrained, vocab_size, pad_token_id)


def _fit_to_data(
    model: Any, name: str, vocab_size: int | None, pad_token_id: int | None
) -> nn.Module:
    held = model.get_input_embeddings().num_embeddings
    if vocab_size is not None and vocab_size > held:
        raise InvalidValueError(
            f"the data have {vocab_size} token ids and {name} knows {held}: take its own "
            f"tokenizer, data.tokenizer={name}"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return model.train()  # from_pretrained leaves evaluation mode, and Lightning keeps it


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidValueError(
            f"dtype must name a floating-point type of torch such as float32 or bfloat16, got "
            f"{name!r}"
        )
    return dtype


def _import_transformers(caller: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"mlkit.models.{caller} needs transformers: pip install 'mlkit-torch[hf]'"
        ) from error
    return transformers
