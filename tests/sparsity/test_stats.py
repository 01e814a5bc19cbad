import pytest
import torch
from torch import nn

import mlkit
from mlkit.errors import InvalidValueError
from mlkit.sparsity import LTEConfig, lte_flops, lte_layers, lte_stats
from mlkit.sparsity.stats import GIGA
from tests.sparsity import tiny


def llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    mlkit.convert(model, LTEConfig())
    return model


def test_table1_flops_of_llama_7b():
    flops = lte_flops(llama_7b(), 0.0)
    assert round(flops.other / GIGA, 2) == 4.00
    assert round(flops.ffn / GIGA, 2) == 8.06
    assert round(flops.dense / GIGA, 2) == 12.06
    assert round(flops.router / GIGA, 3) == 0.084
    for reported, percent in ((5.38, 84), (4.65, 93), (6.59, 69)):
        sparsity = 1 - (reported * GIGA - flops.other - flops.router) / flops.ffn
        assert round(100 * sparsity) == percent
        # The table rounds to 0.01 and the sparsity is known to half a percent of 8.06.
        found = lte_flops(llama_7b(), percent / 100).sparse / GIGA
        assert found == pytest.approx(reported, abs=0.01)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_closed_form_of_other_families(name):
    model = tiny.FAMILIES[name]()
    mlkit.convert(model, LTEConfig(expert_size=8))
    flops = lte_flops(model, 0.25)
    assert flops.ffn == 2 * (2 * 2 * 16 * 48)
    assert flops.other == 2 * (2 * 4 * 16 * 16)
    assert flops.router == 2 * (2 * 16 * 6)
    assert flops.skipped == 0.25 * flops.ffn
    assert flops.sparse == flops.dense + flops.router - flops.skipped
    assert flops.model_sparsity == flops.skipped / flops.dense
    with pytest.raises(InvalidValueError, match=r"sparsity must be in \[0, 1\], got 25"):
        lte_flops(model, 25)


def test_statistics_by_layer_and_their_table():
    model = tiny.llama()
    mlkit.convert(model, LTEConfig(expert_size=8, mode="hard"))
    first, second = lte_layers(model).values()
    with torch.no_grad():
        for layer, on in ((first, 1), (second, 5)):
            nn.init.zeros_(layer.router.weight)
            layer.router.bias.fill_(-9)
            layer.router.bias[:on] = 9
    model(tiny.tokens(2, 5))
    stats = lte_stats(model)
    assert [s.sparsity for s in stats.layers.values()] == pytest.approx([5 / 6, 1 / 6])
    assert stats.sparsity == pytest.approx(0.5)
    assert stats.eff == pytest.approx(0.5, abs=1e-3)
    assert stats.sep == pytest.approx(1 / (0.25 + 0.25), abs=0.02)
    assert stats.undecided == 0
    assert "model.layers.1.mlp     0.167" in str(stats)
    assert lte_flops(model, stats).skipped == pytest.approx(0.5 * lte_flops(model, 0).ffn)
