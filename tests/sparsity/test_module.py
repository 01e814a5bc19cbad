"""The layer by itself: modes, selection, masks, statistics, the way of the gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import mlkit
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity import (
    LTEConfig,
    SparseExpertMLP,
    efficiency_loss,
    freeze_routers,
    link_lte_layers,
    lte_context,
    lte_layers,
    lte_stats,
    reset_lte_stats,
    separability_loss,
    set_lte_mode,
    set_lte_weights,
)
from mlkit.sparsity.router import router_scores, select_experts, threshold_logit
from tests.sparsity import tiny


def layer(gated=True, bias=True, dtype=torch.float64, **changes):
    config = LTEConfig(
        **({"expert_size": 8, "router_init": "random", "router_bias": 0.0} | changes)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SparseExpertMLP(10, 40, config, gated=gated, bias=bias, dtype=dtype)
        nn.init.normal_(made.router.weight, std=0.5)
    return made


def x(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, 10, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def reference(m, value, mask):
    """Equations 2 and 3, expert by expert."""
    total = torch.zeros_like(value)
    for i in range(m.num_experts):
        rows = slice(8 * i, 8 * (i + 1))
        up = F.linear(value, m.up_proj.weight[rows], m.up_proj.bias[rows])
        if hasattr(m, "gate_proj"):
            h = F.silu(F.linear(value, m.gate_proj.weight[rows], m.gate_proj.bias[rows])) * up
        else:
            h = F.silu(up)
        total = total + mask[..., i : i + 1] * F.linear(h, m.down_proj.weight[:, rows])
    return total + m.down_proj.bias


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mode", ["soft", "hard", "dense"])
def test_eq2_and_eq3_expert_by_expert(gated, mode):
    m, value = layer(gated), x(3, 5)
    m.set_mode(mode)
    g = torch.sigmoid(value @ m.router.weight.T + m.router.bias)
    mask = {"soft": g, "hard": (g > 0.5).double(), "dense": torch.ones_like(g)}[mode]
    torch.testing.assert_close(m(value), reference(m, value, mask), rtol=1e-12, atol=1e-12)


def test_limits_of_threshold_and_score():
    m, value = layer(), x(4)
    m.set_mode("dense")
    dense = m(value)
    m.set_mode("hard")
    m.set_threshold(0.0)
    assert torch.equal(m(value), dense)
    m.set_threshold(1.0)
    assert torch.equal(m(value), m.down_proj.bias.expand(4, 10))
    m.set_mode("soft")
    with torch.no_grad():
        m.router.weight.zero_()
        m.router.bias.fill_(torch.inf)
    assert torch.equal(m(value), dense)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_raising_the_threshold_never_adds_an_expert(seed, one, other):
    logits = 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    low, high = sorted((one, other))
    assert (
        select_experts(logits, "sigmoid", threshold_logit(low))
        >= select_experts(logits, "sigmoid", threshold_logit(high))
    ).all()
    mass = max(low, 1e-3), max(high, 1e-3)
    few, many = (select_experts(logits, "topp", top_p=p) for p in mass)
    assert (many >= few).all()


def test_exactly_the_threshold_and_nan_are_off():
    assert select_experts(torch.tensor([0.0, 1e-6, torch.nan]), "sigmoid").tolist() == [
        False, True, False,
    ]  # fmt: skip
    assert not select_experts(torch.tensor([0.0, torch.nan]), "topp").any()


def test_topp_is_the_smallest_set_with_the_mass():
    mass = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert select_experts(mass.log(), "topp", top_p=0.7).tolist() == [
        [False, True, False, True],
        [True, True, True, False],
    ]
    assert select_experts(mass.log(), "topp", top_p=0.01).sum(-1).tolist() == [1, 1]
    scores = router_scores(mass.log(), "topp")
    torch.testing.assert_close(scores[0], torch.tensor([0.2, 1.0, 0.3, 0.5]))


def test_min_experts_is_a_floor():
    logits = torch.tensor([[-3.0, -1.0, -2.0], [1.0, 1.0, -1.0]])
    chosen = select_experts(logits, "sigmoid", min_experts=1)
    assert chosen.tolist() == [[False, True, False], [True, True, False]]
    assert layer(min_experts=2).select(torch.full((5,), -9.0)).sum() == 2


def test_router_is_float32_under_autocast_and_in_a_bfloat16_model():
    m = layer(dtype=torch.float32)
    value = x(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(m.router(value.bfloat16()), m.router(value.bfloat16().float()))
    assert m.bfloat16().router(value.bfloat16()).dtype == torch.float32


def test_decisions_agree_between_float32_and_bfloat16_inputs():
    m = layer(dtype=torch.float32)
    value = x(2000, dtype=torch.float32).bfloat16()
    full = m.select(m.router(value.float()))
    assert (m.select(m.router(value)) == full).float().mean() > 0.999


def test_non_contiguous_odd_and_empty_inputs():
    m = layer()
    value = x(4, 6).transpose(0, 1)
    torch.testing.assert_close(m(value), m(value.contiguous()), rtol=1e-12, atol=1e-12)
    assert m(x(0)).shape == (0, 10)
    assert m(x()).shape == (10,)


def test_bad_arguments():
    with pytest.raises(InvalidValueError, match=r"expert_size=32, intermediate size 40"):
        SparseExpertMLP(10, 40)
    with pytest.raises(InvalidValueError, match="did you mean 'silu'"):
        SparseExpertMLP(10, 40, LTEConfig(expert_size=8), activation="sillu")
    with pytest.raises(InvalidValueError, match="mode must be one of .*got 'sparse'"):
        layer().set_mode("sparse")
    with pytest.raises(InvalidValueError, match=r"threshold must be in \[0, 1\], got 2"):
        layer().set_threshold(2)
    for name in ("eta", "lam"):
        with pytest.raises(InvalidValueError, match=f"{name} must be at least 0, got -1"):
            set_lte_weights(layer(), **{name: -1})
    with pytest.raises(RunError, match=r"no LTE layer: mlkit\.convert"):
        set_lte_mode(nn.Linear(2, 2), "hard")
    with pytest.raises(RunError, match="has seen no token"):
        lte_stats(layer())


def test_a_layer_made_by_its_constructor_is_not_restored():
    model = nn.Sequential(tiny.OwnMLP(10, 40), layer())
    mlkit.convert(model, LTEConfig(expert_size=8, projections=("w1", "w3", "w2")))
    assert mlkit.restore(model) == ["0"]
    assert isinstance(model[1], SparseExpertMLP)


def test_layers_that_are_there_already_are_no_candidates_and_see_no_token():
    model = nn.ModuleList([tiny.llama(), layer()])
    assert mlkit.convert(model, LTEConfig(expert_size=8), "*.0.mlp").replaced == [
        "0.model.layers.0.mlp"
    ]
    assert mlkit.convert(model, LTEConfig(expert_size=8), "*.1.mlp").skipped == {}
    assert all(not m.counts.sums.any() for m in lte_layers(model).values())


def test_nan_scores_raise_in_debug_and_are_counted_otherwise():
    value = x(3)
    value[1] = torch.nan
    with pytest.raises(RunError, match="a router gave NaN"):
        layer(debug=True)(value)
    m = layer(mode="hard")
    m(value)
    stats = lte_stats(m)
    assert stats.nan == m.num_experts
    assert 0 < stats.sparsity < 1


# ------------------------------------------------------------------- gradient


def explicit(model, value, eta, lam, mask=None):
    """Equation 6 with the losses in sight."""
    total = 0.0
    layers = list(lte_layers(model).values())
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(id(m), args[0]))
        for m in layers
    ]
    output = model(value)
    for hook in hooks:
        hook.remove()
    for m in layers:
        scores = torch.sigmoid(m.router(inputs[id(m)]))
        total = total + eta * efficiency_loss(scores, mask) / len(layers)
        total = total + lam * separability_loss(scores, 0.5, 0.25, mask) / len(layers)
    return output, total


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def two_layers(**changes):
    model = nn.Sequential(layer(**changes), nn.LayerNorm(10, dtype=torch.float64), layer(**changes))
    link_lte_layers(model)
    set_lte_weights(model, eta=0.5, lam=0.25)
    return model.train()


def test_eq6_injected_gradient_is_that_of_the_explicit_sum():
    model, value = two_layers(), x(3, 5)
    model(value).square().mean().backward()
    plain, found = copy.deepcopy(model), gradients(model)
    set_lte_weights(plain, eta=0.0, lam=0.0)
    output, aux = explicit(plain, value, 0.5, 0.25)
    (output.square().mean() + aux).backward()
    torch.testing.assert_close(found, gradients(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient_and_counts_once(use_reentrant):
    plain, kept = two_layers(), two_layers()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    value = x(3, 5).requires_grad_()
    with lte_context(mask):
        plain(value).square().mean().backward()
        h = value
        for module in kept:
            h = checkpoint(module, h, use_reentrant=use_reentrant)
        h.square().mean().backward()
    torch.testing.assert_close(gradients(kept), gradients(plain), rtol=1e-12, atol=0)
    assert lte_stats(kept) == lte_stats(plain)
    assert lte_stats(kept).tokens == 11


def test_padding_changes_no_gradient_of_the_routers():
    model, value = two_layers(), x(2, 5)
    set_lte_weights(model, eta=2.0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    spoiled = torch.where(mask[..., None].bool(), value, 7.0)

    def run(data, mask):
        model.zero_grad()
        reset_lte_stats(model)
        with lte_context(mask):
            (0 * model(data).sum()).backward()
        return copy.deepcopy(gradients(model)), lte_stats(model)

    padded, stats = run(spoiled, mask)
    alone, alone_stats = run(value[mask.bool()], None)
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-15)
    assert (stats.tokens, stats.sparsity) == (7, pytest.approx(alone_stats.sparsity))


def test_no_auxiliary_gradient_outside_of_stage_one():
    model, value = two_layers(), x(3)
    for mode, training in (("hard", True), ("dense", True), ("soft", False)):
        set_lte_mode(model, mode)
        model.train(training).zero_grad()
        (0 * model(value).sum()).backward()
        assert not any(g.abs().sum() for n, g in gradients(model).items() if "router" in n)


def test_stage_two_leaves_the_routers_bit_identical():
    model = two_layers()
    set_lte_mode(model, "hard")
    freeze_routers(model)
    before = copy.deepcopy([m.router.state_dict() for m in lte_layers(model).values()])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for _ in range(3):
        model(x(4)).square().mean().backward()
        optimizer.step()
    after = [m.router.state_dict() for m in lte_layers(model).values()]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after, before, strict=True) for k in a)
    routers = {p for m in lte_layers(model).values() for p in m.router.parameters()}
    assert not routers & set(optimizer.state)
    freeze_routers(model, False)
    assert all(p.requires_grad for p in routers)


def test_weights_of_the_losses_can_move_without_a_new_graph():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = two_layers()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for eta in (0.5, 0.6, 0.7):
        set_lte_weights(model, eta=eta, lam=eta / 2)
        compiled(x(3, 5)).sum().backward()
    assert len(compilations) == 1
    assert lte_stats(model).tokens == 45


def test_weights_by_flops_share():
    model = nn.Sequential(layer(layer_weighting="flops"), layer(False, layer_weighting="flops"))
    link_lte_layers(model)
    assert [m.loss_weight for m in model] == [0.6, 0.4]


@pytest.mark.parametrize("router", ["sigmoid", "topp"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_soft_routing_without_the_losses(gated, router):
    m = layer(gated, router=router).train()
    set_lte_weights(m, eta=0.0, lam=0.0)
    weights = dict(m.named_parameters())

    def function(value, *parameters):
        return torch.func.functional_call(m, dict(zip(weights, parameters, strict=True)), value)

    inputs = [p.detach().clone().requires_grad_() for p in weights.values()]
    assert torch.autograd.gradcheck(function, (x(2).requires_grad_(), *inputs))


def test_hard_routing_gives_the_router_no_gradient():
    m = layer(mode="hard").train()
    m(x(3)).square().sum().backward()
    assert m.router.weight.grad is None
    assert m.up_proj.weight.grad.any()


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_the_models_own_attention_mask_reaches_the_layers(name):
    model, ids = tiny.FAMILIES[name](), tiny.tokens(2, 6)
    mlkit.convert(model, LTEConfig(expert_size=8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids, attention_mask=mask)
    assert lte_stats(model, reset=True).tokens == 9
    model(ids, mask)
    assert lte_stats(model, reset=True).tokens == 9
    model(ids)
    assert lte_stats(model, reset=True).tokens == 12
    with lte_context(None):
        model(ids, attention_mask=mask)
    assert lte_stats(model, reset=True).tokens == 12
    copied = copy.deepcopy(model)
    copied(ids, attention_mask=mask)
    assert lte_stats(copied).tokens == 9
    mlkit.restore(model)
    assert not model._forward_pre_hooks


class Holder(nn.Module):
    """Calls its network as a LightningModule does: its own forward is passed by."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def test_a_part_that_is_called_directly_is_heard():
    model, ids = Holder(tiny.llama()), tiny.tokens(2, 6)
    mlkit.convert(model, LTEConfig(expert_size=8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for call in (model.training_step, model.net.model, model.net.forward):
        for argument, expected in ((mask, 9), (None, 12), (mask[:, :], 9)):
            call(ids, attention_mask=argument)
            assert lte_stats(model, reset=True).tokens == expected, call
    with pytest.raises(IndexError):
        model.net(ids + tiny.VOCABULARY, attention_mask=mask)
    model.net(ids, attention_mask=mask)
    model.net(ids)
    assert lte_stats(model, reset=True).tokens == 9 + 12, "also after a pass that failed"
    hooked = [n for n, m in model.named_modules() if m._forward_hooks]
    assert hooked == ["", "net", "net.model"]
    mlkit.restore(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class TwoTowers(nn.Module):
    """As an encoder beside a decoder: each part may get a mask of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = tiny.own(), tiny.own()

    def forward(self, x, y, attention_mask=None, right_mask=None):
        self.left(x, attention_mask=attention_mask)
        return self.right(y, attention_mask=right_mask)


def test_the_mask_of_a_part_wins_in_it():
    model = TwoTowers()
    mlkit.convert(model, LTEConfig(expert_size=8, projections=("w1", "w3", "w2")))
    left, right = torch.ones(4, 6), torch.ones(4, 3)
    left[0, 1:] = right[1:] = 0
    model(tiny.vectors(), tiny.vectors(4, 3), left, right)
    counts = [stats.tokens for stats in lte_stats(model).layers.values()]
    assert counts == [19, 19, 3, 3]


def test_masks_in_a_compiled_model_cause_no_new_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny.own()
    mlkit.convert(model, LTEConfig(expert_size=8, projections=("w1", "w3", "w2")))
    compiled = torch.compile(model.train(), backend=backend, fullgraph=True)
    mask = torch.ones(4, 6)
    mask[0, 2:] = 0
    counts = []
    for _ in range(3):
        compiled(tiny.vectors(), attention_mask=mask.clone()).sum().backward()
        counts.append(len(graphs))
    assert counts == [2, 2, 2], "one for the hook, one for the model"
    assert lte_stats(model).tokens == 3 * 20


def test_generation_with_a_cache_takes_the_last_tokens_of_the_mask():
    model, ids = tiny.llama(), tiny.tokens(2, 6)
    mlkit.convert(model, LTEConfig(expert_size=8, mode="hard"))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 9)
    assert lte_stats(model).tokens == 9 + 2 * 2


def test_masks_that_do_not_fit():
    m = layer()
    with lte_context(torch.ones(2, 4)), pytest.raises(InvalidValueError, match=r"\(2, 4\).*\(3,"):
        m(x(3, 5))
    with pytest.raises(InvalidValueError, match=r"shape \[batch, sequence\], got \(2, 1, 4, 4\)"):
        lte_context(torch.ones(2, 1, 4, 4)).__enter__()


def test_mode_and_threshold_are_in_the_state_dict():
    m, other = layer(mode="hard"), layer()
    m.set_threshold(0.0)
    other.load_state_dict(m.state_dict())
    assert (other.mode, other.threshold) == ("hard", 0.0)
    key = "router._extra_state"
    for damaged in (torch.tensor([7.0, 0.0]), torch.tensor([1.0, torch.nan]), torch.ones(3)):
        with pytest.raises(InvalidValueError, match="the state of an LTE layer"):
            other.load_state_dict(m.state_dict() | {key: damaged})
