"""The feed-forward layers of Hugging Face's transformers, known by the names of their parts.

Nothing is imported from transformers (read in 5.23): classes of one family are alike in the names
of their children, and that is what is matched, so that a model of the same form from elsewhere (or
from `trust_remote_code`) converts, too. A module that is replaced as a whole must compute what its
layout says, which conversion checks on random input.
"""

from __future__ import annotations

from torch import nn

from mlkit.sparsity.layout import FFNLayout

__all__ = ["known_layout"]

_WHOLE = (
    # Llama, Qwen 2/3, Mistral, Gemma 1-3, SmolLM 3, OLMo, Phi-4-multimodal's text layers
    (("gate_proj", "up_proj", "down_proj"), FFNLayout("up_proj", "down_proj", "gate_proj")),
    # Phi-3, Phi-4, GLM: gate and up in one matrix
    (("gate_up_proj", "down_proj"), FFNLayout("gate_up_proj", "down_proj", fused=True)),
    # GPT-2 (Conv1D: weights are [in, out])
    (("c_fc", "c_proj"), FFNLayout("c_fc", "c_proj")),
    # GPT-NeoX, Pythia, Falcon
    (("dense_h_to_4h", "dense_4h_to_h"), FFNLayout("dense_h_to_4h", "dense_4h_to_h")),
)
_PAIRS = (
    # Inside of a layer of OPT or ALBERT: (in, activation, out)
    ("fc1", "activation_fn", "fc2"),
    ("ffn", "activation", "ffn_output"),
)
_ACT_NAMES = ("act_fn", "act", "activation_fn", "activation")
_EXPERTS = ("experts", "expert", "router", "shared_expert")


def known_layout(module: nn.Module) -> FFNLayout | str | None:
    """Return the layout of a feed-forward layer, why it cannot be converted, or None."""
    if reason := _why_mixture(module):
        return reason
    children = dict(module.named_children())
    for names, layout in _WHOLE:
        if all(name in children for name in names):
            return _complete(module, layout)
    for pair in _PAIRS:
        if all(name in children for name in pair):
            return _pair(module, *pair)
    intermediate, output = children.get("intermediate"), children.get("output")
    if hasattr(intermediate, "dense") and hasattr(output, "dense"):
        return _bert(module, intermediate)
    return None


def _complete(module: nn.Module, layout: FFNLayout) -> FFNLayout | str:
    act = next((n for n in _ACT_NAMES if isinstance(getattr(module, n, None), nn.Module)), None)
    if act is None:
        return (
            f"{type(module).__name__} has no activation module among {', '.join(_ACT_NAMES)}; "
            "name the parts with LTEConfig(projections=..., activation=...)"
        )
    dropout = "dropout" if isinstance(getattr(module, "dropout", None), nn.Module) else None
    return FFNLayout(
        layout.in_proj,
        layout.out_proj,
        layout.gate_proj,
        act=act,
        fused=layout.fused,
        dropout=dropout,
    )


def _pair(module: nn.Module, up: str, act: str, down: str) -> FFNLayout:
    others = [n for n, m in module.named_children() if n not in (up, act, down)]
    if any(True for name in others for _ in module.get_submodule(name).parameters()):
        return FFNLayout(up, down, act=act, host=up)  # in a whole layer: replace the first half
    return FFNLayout(up, down, act=act)


def _bert(module: nn.Module, intermediate: nn.Module | None) -> FFNLayout | str:
    if getattr(module, "chunk_size_feed_forward", 0):
        return (
            f"{type(module).__name__} runs its feed-forward layer in chunks, so that a padding "
            "mask does not fit them; set config.chunk_size_feed_forward = 0"
        )
    act = "intermediate.intermediate_act_fn"
    if not isinstance(getattr(intermediate, "intermediate_act_fn", None), nn.Module):
        return f"{type(intermediate).__name__} has no module intermediate_act_fn"
    return FFNLayout("intermediate.dense", "output.dense", act=act, host="intermediate")


def _why_mixture(module: nn.Module) -> str | None:
    """Recognise a mixture-of-experts layer: a class name with Moe, or experts and their router."""
    children = {name for name, _ in module.named_children()}
    stacked = [
        name for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and "proj" in name
    ]
    is_named = "moe" in type(module).__name__.lower() and type(module).__name__.lower().endswith(
        ("block", "moe", "mlp", "layer", "experts")
    )
    if stacked or "experts" in children or (is_named and children & set(_EXPERTS)):
        return (
            f"{type(module).__name__} is a mixture of experts already: its router chooses whole "
            "experts, and LTE would route inside of them; convert a dense model"
        )
    return None
