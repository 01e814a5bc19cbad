"""The library against `oracle`: the same layer computed neuron by neuron, in another library."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mlkit
from mlkit.sparsity import (
    LTEConfig,
    SparseExpertMLP,
    efficiency_loss,
    lte_context,
    lte_flops,
    lte_layers,
    lte_stats,
    separability_loss,
    set_lte_mode,
    set_lte_weights,
)
from mlkit.sparsity.router import router_scores, select_experts, threshold_logit
from mlkit.sparsity.stats import GIGA
from tests.sparsity import oracle

PROPERTY = settings(max_examples=40, deadline=None)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # double precision, sums of at most a few hundred products


class Stock(nn.Module):
    """A feed-forward layer that mlkit has never seen."""

    def __init__(self, hidden, inner, out, act, gated, bias):
        super().__init__()
        self.a = nn.Linear(hidden, inner, bias=bias)
        self.b = nn.Linear(hidden, inner, bias=bias) if gated else None
        self.c = nn.Linear(inner, out, bias=bias)
        self.act = act

    def forward(self, x):
        z = self.a(x)
        return self.c(self.act(z) if self.b is None else self.act(z) * self.b(x))


class Parallel(nn.Module):
    """Layers that all read the same input; their outputs are concatenated."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


ACTS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "tanh": nn.Tanh()}


def stock(hidden, experts, size, act, gated, bias, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Stock(hidden, experts * size, hidden + 1, ACTS[act], gated, bias).double()


def as_oracle(layer, act):
    def array(parameter):
        return None if parameter is None else parameter.detach().numpy().copy()

    gated = layer.b is not None
    first, second = (layer.b, layer.a) if gated else (layer.a, None)
    return oracle.FFN(
        w_in=array(first.weight), b_in=array(first.bias),
        w_gate=array(second.weight) if gated else None,
        b_gate=array(second.bias) if gated else None,
        w_down=array(layer.c.weight), b_down=array(layer.c.bias), act=act,
    )  # fmt: skip


def members(layer):
    """Stock neurons of each expert."""
    return layer.neuron_perm.view(layer.num_experts, layer.expert_size).tolist()


def config(size, gated, **changes):
    names = ("a", "b", "c") if gated else ("a", "c")
    return LTEConfig(expert_size=size, projections=names, **changes)


def draw_routers(model, seed, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    for layer in lte_layers(model).values():
        for parameter in layer.router.parameters():
            nn.init.normal_(parameter, std=scale, generator=generator)


def tokens(hidden, *shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, hidden, dtype=torch.float64, generator=generator)


def logits_of(layer, x):
    bias = None if layer.router.bias is None else layer.router.bias.detach().numpy()
    return oracle.router_logits(x, layer.router.weight.detach().numpy(), bias)


SIZES = {
    "hidden": st.integers(1, 7),
    "experts": st.integers(1, 5),
    "size": st.integers(1, 4),
    "count": st.integers(1, 4),
    "act": st.sampled_from(sorted(ACTS)),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "seed": st.integers(0, 10_000),
}


# -------------------------------------------------------------------- forward


@PROPERTY
@given(
    mode=st.sampled_from(["dense", "soft", "hard"]),
    router=st.sampled_from(["sigmoid", "topp"]),
    grouping=st.sampled_from(["kmeans", "random", "none"]),
    router_bias=st.sampled_from([None, 0.0, 0.5]),
    tau=st.floats(0.05, 0.95),
    floor=st.integers(0, 2),
    **SIZES,
)
def test_three_modes_of_a_converted_layer(
    mode, router, grouping, router_bias, tau, floor, hidden, experts, size, count, act, gated,
    bias, seed,
):  # fmt: skip
    floor = min(floor, experts)
    model = nn.Sequential(stock(hidden, experts, size, act, gated, bias, seed))
    reference = as_oracle(model[0], act)
    settings_ = config(
        size, gated, router=router, grouping=grouping, router_bias=router_bias, threshold=tau,
        min_experts=floor, top_p=tau, mode=mode, seed=seed,
    )  # fmt: skip
    mlkit.convert(model, settings_)
    draw_routers(model, seed)
    x = tokens(hidden, count, seed=seed)
    logits = logits_of(model[0], x.numpy())
    factors = np.ones_like(logits)
    if mode == "hard" and router == "sigmoid":
        factors = oracle.threshold_factors(logits, tau, floor)
    elif mode == "hard":
        factors = oracle.topp_factors(logits, tau, floor)
    elif mode == "soft" and router == "sigmoid":
        factors = oracle.scores(logits)
    elif mode == "soft":  # ours, no equation of the paper: mass relative to the largest
        factors = np.array([oracle.softmax(row) / max(oracle.softmax(row)) for row in logits])
    expected = reference.forward(x.numpy(), members(model[0]), factors)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, **CLOSE)


@PROPERTY
@given(**SIZES)
def test_layer_made_by_its_constructor(hidden, experts, size, count, act, gated, bias, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = SparseExpertMLP(
            hidden, experts * size, LTEConfig(expert_size=size, mode="hard"), activation=act,
            gated=gated, bias=bias, dtype=torch.float64,
        )  # fmt: skip
    draw_routers(layer, seed)
    x = tokens(hidden, count, seed=seed)

    def array(parameter):
        return None if parameter is None else parameter.detach().numpy()

    reference = oracle.FFN(
        w_in=array(layer.up_proj.weight), b_in=array(layer.up_proj.bias),
        w_gate=array(layer.gate_proj.weight) if gated else None,
        b_gate=array(layer.gate_proj.bias) if gated else None,
        w_down=array(layer.down_proj.weight), b_down=array(layer.down_proj.bias), act=act,
    )  # fmt: skip
    factors = oracle.threshold_factors(logits_of(layer, x.numpy()), 0.5)
    expected = reference.forward(x.numpy(), members(layer), factors)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, **CLOSE)


# ------------------------------------------------------------------ selection

EDGES = st.one_of(
    st.floats(-30, 30), st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-300])
)


@PROPERTY
@given(st.lists(st.lists(EDGES, min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 4))
def test_threshold_is_strict_nan_is_off_and_the_floor_never_takes_a_nan(rows, floor):
    logits = np.array(rows)
    found = select_experts(
        torch.tensor(rows, dtype=torch.float64), "sigmoid", threshold_logit(0.5), 0.9, floor
    ).numpy()
    # At tau = 0.5 the score and its logit round alike only away from the threshold's neighbourhood:
    # sigmoid(1e-300) is 0.5 exactly, while its logit is above 0.
    is_near = np.abs(logits) < 1e-12
    logits = np.where(is_near & (logits > 0), 1e-9, logits)
    expected = oracle.threshold_factors(logits, 0.5, floor).astype(bool)
    assert (found == expected).all() or _same_up_to_ties(logits, found, expected)


@PROPERTY
@given(
    st.integers(0, 10_000), st.integers(1, 9), st.floats(0.01, 1.0), st.integers(0, 9),
    st.floats(0.1, 8.0),
)  # fmt: skip
def test_topp_takes_the_smallest_set_and_the_floor(seed, experts, p, floor, spread):
    floor = min(floor, experts)
    logits = spread * tokens(experts, 5, seed=seed)
    found = select_experts(logits, "topp", top_p=p, min_experts=floor).numpy()
    expected = oracle.topp_factors(logits.numpy(), p, floor).astype(bool)
    for row, chosen, wanted in zip(logits.numpy(), found, expected, strict=True):
        mass = oracle.softmax(row)
        partial = np.cumsum(np.sort(mass)[::-1])
        if np.abs(partial - p).min() > 1e-12:  # else rounding decides whether p was reached
            assert (chosen == wanted).all(), (mass, p, floor)


def _same_up_to_ties(logits, found, expected):
    return all(
        sorted(row[a].tolist()) == sorted(row[b].tolist())
        for row, a, b in zip(logits, found, expected, strict=True)
    )


@pytest.mark.parametrize("router", ["sigmoid", "topp"])
def test_nan_is_off_whatever_the_floor(router):
    nan = math.nan
    logits = torch.tensor([[nan, 1.0, -1.0, -2.0], [nan, nan, nan, nan], [nan, nan, nan, -3.0]])
    chosen = select_experts(logits, router, min_experts=2)
    assert not chosen[logits.isnan()].any()
    assert chosen.sum(-1).tolist() == [2, 0, 1]


# --------------------------------------------------------------------- losses


@PROPERTY
@given(
    seed=st.integers(0, 10_000),
    shapes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    tau=st.floats(0.1, 0.9),
    eps=st.sampled_from([1e-4, 1e-3, 1e-1]),
    masked=st.booleans(),
)
def test_losses_and_their_gradients(seed, shapes, rows, length, tau, eps, masked):
    generator = torch.Generator().manual_seed(seed)
    values = [
        torch.rand(rows, length, n, generator=generator, dtype=torch.float64).requires_grad_()
        for n in shapes
    ]
    mask = torch.rand(rows, length, generator=generator) < 0.6 if masked else None
    flat = [g.detach().reshape(-1, g.shape[-1]).numpy() for g in values]
    ones = torch.ones(rows, length, dtype=torch.bool)
    masks = [(ones if mask is None else mask).reshape(-1).numpy()] * len(shapes)
    cases = (
        (
            [efficiency_loss(g, mask) for g in values],
            oracle.efficiency(flat, masks),
            oracle.efficiency_gradient(flat, masks),
        ),
        (
            [separability_loss(g, tau, eps, mask) for g in values],
            oracle.separability(flat, masks, tau, eps),
            oracle.separability_gradient(flat, masks, tau, eps),
        ),
    )
    for found, expected, gradients in cases:
        total = torch.stack(found).mean()
        assert total.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        for got, wanted in zip(torch.autograd.grad(total, values), gradients, strict=True):
            np.testing.assert_allclose(got.reshape(wanted.shape).numpy(), wanted, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    router_bias=st.sampled_from([None, 0.0, 0.5]),
    masked=st.booleans(),
    tau=st.floats(0.2, 0.8),
    eta=st.floats(0, 2),
    lam=st.floats(0, 1),
    eps=st.sampled_from([1e-3, 0.25]),
)
def test_eq6_gradient_in_the_routers_of_layers_with_different_n(
    seed, router_bias, masked, tau, eta, lam, eps
):
    shapes = ((2, 3), (5, 1), (1, 4))  # experts, size
    model = Parallel([stock(4, n, s, "silu", True, True, seed + n) for n, s in shapes])
    for number, (_, size) in enumerate(shapes):
        settings_ = config(
            size, True, router_bias=router_bias, threshold=tau, seed=seed, grouping="random",
            sep_eps=eps,
        )  # fmt: skip
        mlkit.convert(model, settings_, f"layers.{number}")
    layers = list(lte_layers(model).values())
    draw_routers(model, seed)
    set_lte_weights(model, eta=eta, lam=lam)
    eta, lam = float(np.float32(eta)), float(np.float32(lam))  # as they are kept
    x = tokens(4, 2, 3, seed=seed)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) if masked else None
    with lte_context(mask):
        (0 * model.train()(x).sum()).backward()

    flat = x.reshape(-1, 4).numpy()
    valid = (torch.ones(6) if mask is None else mask.reshape(-1)).numpy()
    logits = [logits_of(layer, flat) for layer in layers]
    scores = [oracle.scores(values) for values in logits]
    masks = [valid] * len(layers)
    eff = oracle.efficiency_gradient(scores, masks)
    sep = oracle.separability_gradient(scores, masks, tau, eps)
    for layer, g, left, right in zip(layers, scores, eff, sep, strict=True):
        slope = (eta * left + lam * right) * g * (1 - g)
        weight = np.array([[sum(slope[t, i] * flat[t, h] for t in range(6)) for h in range(4)]
                           for i in range(layer.num_experts)])  # fmt: skip
        close = {"rtol": 1e-9, "atol": 1e-11}
        np.testing.assert_allclose(layer.router.weight.grad.numpy(), weight, **close)
        if router_bias is not None:
            np.testing.assert_allclose(layer.router.bias.grad.numpy(), slope.sum(0), **close)
    stats = lte_stats(model)
    assert stats.tokens == valid.sum()
    factors = [oracle.threshold_factors(values, tau) for values in logits]
    per_expert = [layer.dense_flops / layer.num_experts for layer in layers]
    assert stats.sparsity == pytest.approx(oracle.sparsity(factors, masks, per_expert))
    for number, entry in enumerate(stats.layers.values()):
        one = scores[number : number + 1]
        assert entry.eff == pytest.approx(oracle.efficiency(one, masks[:1]))
        assert entry.sep == pytest.approx(oracle.separability(one, masks[:1], tau, eps))


def test_soft_mode_gradient_of_every_weight_is_that_of_the_oracle():
    """Central differences of the oracle's output against the library's backward pass."""
    model = nn.Sequential(stock(3, 2, 2, "gelu", True, True, 5))
    reference = as_oracle(model[0], "gelu")
    mlkit.convert(model, config(2, True))
    draw_routers(model, 1)
    set_lte_weights(model, eta=0.0, lam=0.0)
    layer, x = model[0], tokens(3, 2, seed=2)
    model.train()(x).sum().backward()

    def output():
        factors = oracle.scores(logits_of(layer, x.numpy()))
        return reference.forward(x.numpy(), members(layer), factors).sum()

    order = layer.neuron_perm.numpy()
    down = layer.c.weight.grad.numpy()
    found = {"w_in": layer.b.weight, "w_gate": layer.a.weight}
    for name, array, got in (
        *((n, getattr(reference, n), p.grad.numpy()) for n, p in found.items()),
        ("w_down", reference.w_down, down),
    ):
        wanted = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            ends = []
            for step in (1e-6, -1e-6):
                array[index] += step
                ends.append(output())
                array[index] -= step
            wanted[index] = (ends[0] - ends[1]) / 2e-6
        stock_order = wanted[:, order] if name == "w_down" else wanted[order]
        np.testing.assert_allclose(got, stock_order, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- FLOPs


def test_table1_of_the_paper_by_both():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # LLaMA-7B
    mlkit.convert(model, LTEConfig())
    sizes = (4096, 11008, 32, 32)
    assert round(oracle.table1_gflops(*sizes, None), 2) == 12.06
    assert lte_flops(model, 0.0).dense / GIGA == oracle.table1_gflops(*sizes, None)
    for sparsity, reported in ((0.84, 5.38), (0.93, 4.65), (0.69, 6.59)):
        found = lte_flops(model, sparsity).sparse / GIGA
        assert found == pytest.approx(oracle.table1_gflops(*sizes, sparsity))
        assert found == pytest.approx(reported, abs=0.01), "the table rounds, and so does s"


# ----------------------------------------------------------------- edge inputs


def test_zero_active_experts_leave_the_bias_of_the_down_projection():
    model = nn.Sequential(stock(3, 4, 2, "relu", False, True, 0))
    bias = model[0].c.bias.detach().clone()
    mlkit.convert(model, config(2, False, mode="hard"))
    layer = model[0]
    nn.init.zeros_(layer.router.weight)
    for value, is_on in ((0.0, False), (1e-6, True)):  # a score of exactly tau is off
        nn.init.constant_(layer.router.bias, value)
        found = model(tokens(3, 2, seed=0))
        assert torch.equal(found, bias.expand(2, 4)) is not is_on


def test_scores_of_the_library_are_those_of_eq1():
    logits = torch.tensor([[-700.0, -3.0, 0.0, 3.0, 700.0]], dtype=torch.float64)
    np.testing.assert_allclose(
        router_scores(logits, "sigmoid").numpy(), oracle.scores(logits.numpy()), rtol=1e-14
    )


def test_modes_by_name_reach_every_layer():
    model = Parallel([stock(3, 2, 2, "silu", True, False, s) for s in range(2)])
    x, expected = tokens(3, 4, seed=1), None
    expected = model(x)
    mlkit.convert(model, config(2, True))
    set_lte_mode(model, "dense")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
