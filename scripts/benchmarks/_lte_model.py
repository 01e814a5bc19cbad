"""Decode of a whole model on the CPU, dense and packed: tokens a second with a KV cache."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mlkit
from mlkit.sparsity import (
    LTEConfig,
    PackedExpertMLP,
    count_experts,
    lte_stats,
    pack_for_inference,
    reset_lte_stats,
)
from scripts.benchmarks._harness import Bench, Provider, Row, alternate, spread_of
from scripts.benchmarks._lte_layer import set_sparsity

__all__ = ["rows"]

SPARSITIES = (0.5, 0.75, 0.9, 0.95)


def rows(bench: Bench) -> Iterator[Row]:
    """A model of TinyLlama's shape (1.1 B) with random weights, fp32 and bf16.

    Random weights take the same time as trained ones; the thresholds are set so that the wanted
    share of experts is skipped. Both models share what is not a feed-forward layer.
    """
    try:
        import transformers
    except ImportError:
        bench.note("transformers is not installed: no whole model was measured")
        return
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _rows(bench, dtype)


def _rows(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    dense = _model(bench, dtype)
    sparse = _packed(dense)
    generator = torch.Generator().manual_seed(0)
    vocabulary = dense.config.vocab_size
    tokens = torch.randint(vocabulary, (1, 64), generator=generator)
    new = bench.size(8, 4)
    layers = dense.config.num_hidden_layers
    case = f"decode of a Llama of {_billions(dense)}, {layers} layers, batch 1"
    name = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        for sparsity in SPARSITIES:
            _calibrate(sparse, tokens, sparsity)
            measured = _measured(sparse, tokens, new)
            seconds = alternate(
                {"mlkit": _decoding(sparse, tokens, new), "dense": _decoding(dense, tokens, new)},
                bench.size(5, 2),
            )
            rates = {k: [new / s for s in v] for k, v in seconds.items()}
            value, peer = (statistics.median(v) for v in rates.values())
            yield Row.of(
                f"{case}, {name}, {measured:.0%} of FFN neurons skipped",
                "decode",
                value,
                "tokens/s",
                peer="dense",
                peer_value=peer,
                limit=peer * _bytes_ratio(dense, sparse, measured),
                higher_is_better=True,
                spread=spread_of(rates["mlkit"]),
                peer_spread=spread_of(rates["dense"]),
            )


def _model(bench: Bench, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=bench.size(2048, 64),
        intermediate_size=bench.size(5632, 256),
        num_hidden_layers=bench.size(22, 2),
        num_attention_heads=bench.size(32, 4),
        num_key_value_heads=bench.size(4, 2),
        vocab_size=bench.size(32000, 100),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _packed(dense: nn.Module) -> nn.Module:
    """A packed copy that shares all weights but those of the feed-forward layers."""
    memo = {id(p): p for n, p in dense.named_parameters() if ".mlp." not in n}
    sparse = copy.deepcopy(dense, memo)
    mlkit.convert(sparse, LTEConfig(grouping="none", mode="hard"))
    pack_for_inference(sparse)
    return sparse


def _calibrate(model: nn.Module, tokens: Tensor, sparsity: float) -> None:
    """Set each layer's threshold on the input that it gets behind the layers before it."""
    packed = [m for m in model.modules() if isinstance(m, PackedExpertMLP)]
    hooks = [
        m.register_forward_pre_hook(lambda m, args: set_sparsity([m], args[0], sparsity))
        for m in packed
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()


def _measured(model: nn.Module, tokens: Tensor, new: int) -> float:
    """Return the sparsity of the decode steps that are timed."""
    decode = _decoding(model, tokens, new)
    reset_lte_stats(model)
    count_experts(model)
    decode()
    count_experts(model, False)
    return lte_stats(model, reset=True).sparsity


def _decoding(model: Any, tokens: Tensor, new: int) -> Provider:
    """Return a call that takes the last `new` tokens one by one, and returns its seconds.

    The tokens are given, not chosen by the model: one with random weights would repeat itself.
    """
    started = model(tokens[:, :-new], use_cache=True)

    def decode() -> float:
        cache = copy.deepcopy(started.past_key_values)
        begin = time.perf_counter()
        for token in tokens[:, -new:].split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        return time.perf_counter() - begin

    return decode


def _bytes_ratio(dense: Any, sparse: nn.Module, sparsity: float) -> float:
    """Return how many times more bytes of weights a token needs in the dense model."""
    size = {True: 0, False: 0}
    for name, parameter in dense.named_parameters():
        if "embed_tokens" not in name:  # one row of it
            size[".mlp." in name] += parameter.numel() * parameter.element_size()
    routers = sum(
        p.numel() * p.element_size() for n, p in sparse.named_parameters() if ".router." in n
    )
    total = size[True] + size[False]
    return total / (size[False] + routers + size[True] * (1 - sparsity))


def _billions(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e9:.1f} B" if count >= 5e7 else f"{count / 1e3:.0f} k"
