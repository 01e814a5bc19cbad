"""Tiny random models with feed-forward layers, of every family; torch's own stream stays put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 40


class OwnMLP(nn.Module):
    """A gated layer as people write it by hand, with biases and a function as activation."""

    def __init__(self, hidden: int = 12, inner: int = 32) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner)
        self.w2 = nn.Linear(inner, hidden)
        self.w3 = nn.Linear(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OwnModel(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.layers = nn.ModuleList([OwnMLP() for _ in range(layers)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (12,)))
        return self.head(x)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.1)  # zeros would hide a wrong order
    return model.eval()


def own() -> nn.Module:
    return seeded(OwnModel)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_sizes(), mlp_bias=True, num_key_value_heads=2)
    return seeded(lambda: LlamaForCausalLM(config))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_sizes(), num_key_value_heads=2, head_dim=8)
    return seeded(lambda: Qwen3ForCausalLM(config))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return seeded(lambda: MistralForCausalLM(MistralConfig(**_sizes(), num_key_value_heads=2)))


def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**_sizes(), num_key_value_heads=2, head_dim=8)
    return seeded(lambda: GemmaForCausalLM(config))


def smollm3() -> nn.Module:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(**_sizes(), num_key_value_heads=2, pad_token_id=0)
    return seeded(lambda: SmolLM3ForCausalLM(config))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**_sizes(), num_key_value_heads=2, pad_token_id=0)
    return seeded(lambda: Phi3ForCausalLM(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_inner=48, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return seeded(lambda: GPT2LMHeadModel(config))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes())))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=2, word_embed_proj_dim=16, dropout=0.0, max_position_embeddings=64,
    )  # fmt: skip
    return seeded(lambda: OPTForCausalLM(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**_sizes())
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return seeded(lambda: BertForMaskedLM(config))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return seeded(lambda: RobertaForMaskedLM(RobertaConfig(**_sizes())))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    return seeded(lambda: AlbertForMaskedLM(AlbertConfig(**_sizes(), embedding_size=8)))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = _sizes()
    del sizes["vocab_size"]
    config = ViTConfig(**sizes, image_size=8, patch_size=4)
    return seeded(lambda: ViTForImageClassification(config))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_sizes(), num_key_value_heads=2, num_local_experts=4)
    return seeded(lambda: MixtralForCausalLM(config))


def qwen3_moe(**changes: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_sizes(), num_key_value_heads=2, num_experts=4, moe_intermediate_size=8, **changes
    )
    return seeded(lambda: Qwen3MoeForCausalLM(config))


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


FAMILIES = {
    f.__name__: f
    for f in (llama, qwen3, mistral, gemma, smollm3, phi3, gpt2, gpt_neox, opt, bert, roberta,
              albert, vit)
}  # fmt: skip


def tokens(rows: int = 4, length: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)


def vectors(rows: int = 4, length: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, 5, generator=torch.Generator().manual_seed(seed))


def images(rows: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def token_inputs() -> tuple[Tensor]:
    return (tokens(),)


def vector_inputs() -> tuple[Tensor]:
    return (vectors(),)


def logits(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return model(x, **kwargs).logits
