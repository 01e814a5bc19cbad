"""Packed layers count on request, and say what a batch would read."""

import copy

import pytest
import torch
from torch import nn

import mlkit
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity import (
    LTEConfig,
    count_experts,
    expected_active_fraction,
    lte_stats,
    pack_for_inference,
    reset_lte_stats,
)
from tests.sparsity import tiny


def packed():
    model = tiny.llama()
    mlkit.convert(
        model, LTEConfig(expert_size=8, router_init="random", router_bias=0.0, mode="hard")
    )
    training = copy.deepcopy(model)
    pack_for_inference(model)
    return model, training


def test_counts_are_those_of_the_layers_for_training():
    model, training = packed()
    x = tiny.tokens(3, 7)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    with torch.no_grad():
        silent = model(x, attention_mask=mask).logits
        with pytest.raises(RunError, match=r"has seen no token.*count_experts\(model\)"):
            lte_stats(model)
        count_experts(model)
        counted = model(x, attention_mask=mask).logits
        training(x, attention_mask=mask)
    torch.testing.assert_close(counted, silent, rtol=1e-4, atol=1e-6)
    assert lte_stats(model) == lte_stats(training)
    assert lte_stats(model).tokens == 17
    count_experts(model, False)
    with torch.no_grad():
        model(x)
    assert lte_stats(model).tokens == 17
    reset_lte_stats(model)
    with pytest.raises(RunError, match="has seen no token"):
        lte_stats(model)


def test_expected_union_of_independent_tokens():
    model, _ = packed()
    count_experts(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(torch.randint(1, tiny.VOCABULARY, (64, 20), generator=generator))
    one = expected_active_fraction(model, 1)
    assert one == pytest.approx(1 - lte_stats(model).sparsity)
    values = [expected_active_fraction(model, batch) for batch in (1, 2, 4, 8, 1000)]
    assert values == sorted(values)
    assert values[-1] <= 1

    layer = next(m for m in model.modules() if hasattr(m, "usage"))
    masks = (torch.rand(4000, 8, 6, generator=generator) < torch.linspace(0.05, 0.9, 6)).bool()
    only = nn.ModuleList([layer])
    count_experts(only)
    layer.usage.add(masks, None)
    drawn = masks.any(1).float().mean()  # unions of 8 independent tokens, drawn
    # 24,000 draws of 0 or 1: a standard error of at most 0.0033
    assert expected_active_fraction(only, 8) == pytest.approx(float(drawn), abs=0.012)


def test_bad_calls():
    model, training = packed()
    with pytest.raises(RunError, match=r"no layer of .* is packed: .*pack_for_inference"):
        count_experts(training)
    with pytest.raises(RunError, match=r"has counted no token: count_experts"):
        expected_active_fraction(model, 4)
    for batch in (0, 1.5, True):
        with pytest.raises(InvalidValueError, match="batch must be an integer of at least 1"):
            expected_active_fraction(model, batch)
