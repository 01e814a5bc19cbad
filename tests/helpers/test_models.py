"""The model generator keeps its promises, for every seed that is tried."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.models import random_small_model

SEEDS = st.integers(0, 10_000)
OPTIONAL = st.sampled_from([None, True, False])


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.sampled_from([None, "mlp", "cnn"]), OPTIONAL, OPTIONAL)
def test_model_trains_and_is_what_was_asked_for(seed, kind, is_tied, has_batch_norm):
    small = random_small_model(seed, kind=kind, is_tied=is_tied, has_batch_norm=has_batch_norm)
    inputs, labels = small.batch(size=5)
    logits = small.module(inputs)
    assert logits.shape == (5, small.num_classes)
    nn.functional.cross_entropy(logits, labels).backward()
    for parameter in small.module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()

    named = list(small.module.named_modules(remove_duplicate=False))
    assert (len({id(m) for _, m in named}) < len(named)) == small.is_tied
    normalises = any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for _, m in named)
    assert normalises == small.has_batch_norm
    assert any(isinstance(m, nn.Conv2d) for _, m in named) == (len(small.input_shape) == 3)
    if kind is not None:
        assert len(small.input_shape) == (1 if kind == "mlp" else 3)
    if is_tied is not None:
        assert small.is_tied is is_tied
    if has_batch_norm is not None:
        assert small.has_batch_norm is has_batch_norm


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_seed_gives_one_model_and_leaves_the_global_stream(seed):
    state = torch.get_rng_state()
    first, second = random_small_model(seed), random_small_model(seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(first.module) == repr(second.module)
    inputs, _ = first.batch(seed=seed)
    first.module.eval(), second.module.eval()
    assert torch.equal(first.module(inputs), second.module(inputs))
    assert torch.equal(copy.deepcopy(first.module)(inputs), first.module(inputs))


def test_every_trait_turns_up():
    models = [random_small_model(seed) for seed in range(60)]
    traits = {(len(m.input_shape), m.is_tied, m.has_batch_norm) for m in models}
    assert len(traits) == 8
    assert len({repr(m.module) for m in models}) > 50


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_tied_module_has_one_set_of_parameters(kind):
    module = random_small_model(3, kind=kind, is_tied=True).module
    assert len(list(module.state_dict())) > len(list(module.named_parameters()))
