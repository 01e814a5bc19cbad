"""Methods without training, against slow NumPy versions and their own definitions."""

import numpy as np
import pytest
import torch
from torch import nn

import mlkit
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity import (
    LTEConfig,
    MagnitudeThreshold,
    SparseExpertMLP,
    TopKExperts,
    lte_context,
    set_lte_mode,
)
from tests.sparsity import tiny

DENSE = LTEConfig(expert_size=4, mode="dense", grouping="none")


def layer(gated=True, hidden=10, inner=24, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(SparseExpertMLP(hidden, inner, DENSE, gated=gated, bias=True)).double()


def x(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silu(a):
    return a / (1 + np.exp(-a))


def parts(module):
    arrays = {n: p.detach().numpy() for n, p in module[0].named_parameters()}
    return lambda name, v: v @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]


def test_top_k_is_that_of_a_loop_over_tokens_and_experts():
    module, value = layer(), x(7, 10)
    linear, w = parts(module), module[0].down_proj.weight.detach().numpy()
    with TopKExperts(module) as method:
        method.k = [2]
        found, sparsity = method.measure(lambda: module(value))
    rows = []
    for token in value.numpy():
        h = silu(linear("gate_proj", token)) * linear("up_proj", token)
        measure = [
            sum((h[j] * np.linalg.norm(w[:, j])) ** 2 for j in range(4 * e, 4 * e + 4))
            for e in range(6)
        ]
        kept = np.zeros(24)
        for e in sorted(range(6), key=lambda e: -measure[e])[:2]:
            kept[4 * e : 4 * e + 4] = 1
        rows.append(linear("down_proj", h * kept))
    np.testing.assert_allclose(found.numpy(), np.stack(rows), rtol=1e-5)  # norms are float32
    assert sparsity == pytest.approx(4 / 6)


@pytest.mark.parametrize("gated", [True, False])
def test_thresholds_zero_what_is_small_and_count_the_weights_that_meet_it(gated):
    module, value = layer(gated), x(50, 10)
    linear = parts(module)
    with MagnitudeThreshold(module) as method:
        method._thresholds = {(0, 0): 0.4, (0, 1): 0.02}
        found, sparsity = method.measure(lambda: module(value))
    inputs = np.where(np.abs(value.numpy()) > 0.4, value.numpy(), 0)
    h = silu(linear("gate_proj", inputs)) * linear("up_proj", inputs) if gated else silu(
        linear("up_proj", inputs)
    )  # fmt: skip
    kept = np.where(np.abs(h) > 0.02, h, 0)
    np.testing.assert_allclose(found.numpy(), linear("down_proj", kept), rtol=1e-9)
    reads = 2 if gated else 1
    share = (reads * (inputs == 0).mean() + (kept == 0).mean()) / (reads + 1)
    assert sparsity == pytest.approx(share)


@pytest.mark.parametrize("method", [MagnitudeThreshold, TopKExperts])
@pytest.mark.parametrize("build", [tiny.own, tiny.llama, tiny.gpt2, tiny.phi3, tiny.opt, tiny.bert])
@pytest.mark.parametrize("target", [0.4, 0.75])
def test_every_family_reaches_the_target_and_is_as_before_afterwards(method, build, target):
    model = build()
    projections = ("w1", "w3", "w2") if build is tiny.own else None
    config = LTEConfig(expert_size=4, mode="dense", projections=projections)
    mlkit.convert(model, config)
    is_own = build is tiny.own
    batch, call = (
        (tiny.vectors(), nn.Module.__call__) if is_own else (tiny.tokens(8, 12), tiny.logits)
    )
    with torch.no_grad():
        before = call(model, batch)

        def loss():
            return float((call(model, batch) - before).square().mean())

        with method(model) as sparse:
            fitted = sparse.fit(target, loss)
            again, sparsity = sparse.measure(loss)
        assert again == pytest.approx(fitted)
        assert again > 0
        assert sparsity == pytest.approx(target, abs=0.04)
        assert len(sparse.layer_sparsity()) == len(sparse.sites)
        assert torch.equal(call(model, batch), before)


def test_the_division_with_the_lowest_loss_is_kept():
    module, value = layer(), x(400, 10)
    with torch.no_grad():
        dense = module(value)

    def loss():
        return float((module(value) - dense).square().mean())

    def fitted(*shares):
        with MagnitudeThreshold(module, shares) as method:
            return method.fit(0.5, loss)

    assert fitted(0.7, 0.9) == min(fitted(0.7), fitted(0.9))


def test_padding_counts_for_nothing():
    module, value = layer(), x(2, 5, 10)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    value[mask == 0] = 0.0  # all below any threshold
    with MagnitudeThreshold(module) as method, lte_context(mask):
        method._thresholds = {(0, 0): 1e-12, (0, 1): 0.0}
        assert method.measure(lambda: module(value).sum())[1] == pytest.approx(0)


def test_misuse():
    module = layer()
    set_lte_mode(module, "hard")
    with pytest.raises(InvalidValueError, match=r"'0' is in hard mode.*set_lte_mode"):
        TopKExperts(module)
    set_lte_mode(module, "dense")
    with pytest.raises(RunError, match="has no LTE layer"):
        MagnitudeThreshold(nn.Linear(2, 2))
    for method in (TopKExperts(module), MagnitudeThreshold(module)):
        with method, pytest.raises(InvalidValueError, match=r"sparsity must be in \(0, 1\), got 1"):
            method.fit(1.0, lambda: 0.0)
        with pytest.raises(RunError, match="no token was seen"):
            method.sparsity()
    with (
        MagnitudeThreshold(module, [0.1]) as method,
        pytest.raises(InvalidValueError, match=r"no share of \(0.1,\) reaches a sparsity of 0.9"),
    ):
        method.fit(0.9, lambda: 0.0)
