"""Activation checkpointing of whole models: the blocks run again inside of the backward pass."""

import pytest
import torch

import mlkit
from mlkit.sparsity import LTEConfig, lte_context, lte_stats, set_lte_weights
from tests.sparsity import tiny


def run(name, checkpointing, how):
    model, ids = tiny.FAMILIES[name](), tiny.tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[2, 1:] = 0
    mlkit.convert(model, LTEConfig(expert_size=8))
    set_lte_weights(model, eta=0.5, lam=0.25)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    for _ in range(2):
        model.zero_grad()
        if how == "argument":
            model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
        else:
            with lte_context(mask):
                model(input_ids=ids).logits.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, lte_stats(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # renamed in 5.23
@pytest.mark.parametrize("how", ["argument", "context"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_gradients_losses_and_statistics_are_those_without(name, use_reentrant, how):
    expected, stats = run(name, None, how)
    found, again = run(name, use_reentrant, how)
    assert any("router" in key for key in expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert again == stats
    assert again.tokens == 2 * 11
