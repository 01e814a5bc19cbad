"""Zero neurons for widths that expert_size does not divide: silent, and gone after restore."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mlkit
from mlkit.convert import load_pretrained, save_pretrained
from mlkit.errors import InvalidValueError
from mlkit.sparsity import (
    LTEConfig,
    SparseExpertMLP,
    lte_flops,
    lte_layers,
    lte_stats,
    pack_for_inference,
    reset_lte_stats,
    set_lte_mode,
    set_lte_threshold,
    unpack,
)
from tests.sparsity import tiny

PADDED = LTEConfig(expert_size=20, pad_to_multiple=True)  # 48 neurons become 60


def padded(layer):
    """Positions of the neurons that the stock layer does not have."""
    return (layer.neuron_perm >= layer.shape.intermediate_size).nonzero()[:, 0]


def padding_of(model, name, layer):
    """Every value in the weights that belongs to a padded neuron."""
    site = model.get_submodule(name)
    if not hasattr(site, layer.layout.out_proj.split(".")[0]):
        site = model.get_submodule(name.rpartition(".")[0])  # `name` is the host of a pair
    values = []
    for tensor in layer.shape.tensors:
        parts = site.get_parameter(tensor.key).chunk(tensor.copies, tensor.dim)
        values += [part.index_select(tensor.dim, padded(layer)).flatten() for part in parts]
    return torch.cat(values)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "bert", "albert"])
def test_function_survives_conversion_and_shapes_survive_restore(name, tmp_path):
    stock, x = tiny.FAMILIES[name](), tiny.tokens()
    expected, model = stock(x).logits, copy.deepcopy(stock)
    report = mlkit.convert(model, PADDED)
    for layer in lte_layers(model).values():
        assert (layer.num_experts, layer.padding, len(padded(layer))) == (3, 12, 12)
        assert sorted(layer.neuron_perm.tolist()) == list(range(60))
    set_lte_mode(model, "dense")
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    set_lte_mode(model, "hard")
    set_lte_threshold(model, 0.0)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)

    for row in report.rows:
        layer = next(m for n, m in lte_layers(model).items() if n.startswith(row.name))
        gates = 2 if layer.layout.is_gated else 1
        assert row.before.flops == layer.dense_flops == 2 * 48 * 16 * (gates + 1)
        assert row.after.flops == 2 * 60 * 16 * (gates + 1) + 2 * 3 * 16
        biases = sum(t.dim == 0 and t.key.endswith("bias") for t in layer.shape.tensors)
        biases *= 2 if layer.layout.fused else 1
        more = 12 * 16 * (gates + 1) + 12 * biases + 3 * 16 + 3
        assert row.after.parameters - row.before.parameters == more

    save_pretrained(model, tmp_path)
    again = load_pretrained(tiny.FAMILIES[name](), tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    for changed in (model, again):
        mlkit.restore(changed)
        assert str(changed) == str(stock), "the sizes that modules print are those of their weights"
        for key, value in stock.state_dict().items():
            assert torch.equal(changed.state_dict()[key], value), key
        assert torch.equal(changed(x).logits, expected)


def test_a_stock_checkpoint_is_padded_and_one_of_another_width_is_refused():
    for name in ("llama", "phi3", "gpt2", "opt"):
        model, trained, x = tiny.FAMILIES[name](), tiny.FAMILIES[name](), tiny.tokens()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.3)
        mlkit.convert(model, PADDED)
        model.load_state_dict(trained.state_dict(), strict=False)
        set_lte_mode(model, "dense")
        torch.testing.assert_close(model(x).logits, trained(x).logits, rtol=1e-5, atol=1e-5)
    model = nn.Sequential(tiny.OwnMLP(12, 32))
    names = ("w1", "w3", "w2")
    mlkit.convert(model, LTEConfig(expert_size=20, pad_to_multiple=True, projections=names))
    before = copy.deepcopy(model.state_dict())
    for width in (40, 24):  # as wide as the padded layer, and narrower than the stock one
        other = nn.Sequential(tiny.OwnMLP(12, width))
        with pytest.raises(RuntimeError, match=r"0\.w1\.weight: .*before conversion has 32 in dim"):
            model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model[0].w1.weight, before["0.w1.weight"])


def test_a_wider_stock_checkpoint_is_not_cut_without_padding_either():
    model = nn.Sequential(tiny.OwnMLP(12, 32))
    mlkit.convert(model, LTEConfig(expert_size=8, projections=("w1", "w3", "w2")))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.w1\.bias: \(48,\) in the check"):
        model.load_state_dict(nn.Sequential(tiny.OwnMLP(12, 48)).state_dict(), strict=False)


# ------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_padded_neurons_stay_zero_and_the_trained_model_restores(name, make):
    model, x = tiny.FAMILIES[name](), tiny.tokens()
    mlkit.convert(model, PADDED)
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1)
    for mode in ("dense", "soft", "hard"):
        set_lte_mode(model, mode)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(x).logits.square().mean().backward()
            optimizer.step()
    for path, layer in lte_layers(model).items():
        values = padding_of(model, path, layer)
        assert values.numel() >= 12 * 16 * 2
        assert not values.any()
    set_lte_mode(model, "dense")
    expected = model.eval()(x).logits
    mlkit.restore(model)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 100),
    st.sampled_from(["silu", "gelu", "relu", "relu2", "tanh", "quick_gelu", "gelu_tanh"]),
)  # fmt: skip
def test_any_width_and_expert_size(width, size, gated, bias, seed, activation):
    config = LTEConfig(expert_size=size, pad_to_multiple=True, mode="hard")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = SparseExpertMLP(
            3, width, config, activation=activation, gated=gated, bias=bias, dtype=torch.float64
        )
    assert layer.intermediate_size == -(-width // size) * size
    assert layer.down_proj.in_features == layer.up_proj.out_features == layer.intermediate_size
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    layer.set_threshold(0.0)
    hard = layer(x)
    layer.set_mode("dense")
    torch.testing.assert_close(layer(x), hard, rtol=0, atol=0)
    whole = SparseExpertMLP(
        3, width, LTEConfig(expert_size=width, mode="dense"), activation=activation, gated=gated,
        bias=bias, dtype=torch.float64,
    )  # fmt: skip
    stock = {t.key: t.resize(layer.state_dict()[t.key], width) for t in layer.shape.tensors} | (
        {"down_proj.bias": layer.down_proj.bias} if bias else {}
    )
    whole.load_state_dict(stock, strict=False)
    torch.testing.assert_close(whole(x), layer(x), rtol=1e-12, atol=1e-12)


def test_parameters_stay_the_same_objects():
    model = tiny.llama()
    names = {id(p): n for n, p in model.named_parameters()}
    model(tiny.tokens()).logits.sum().backward()
    mlkit.convert(model, PADDED)
    layer = model.model.layers[0].mlp
    assert names[id(layer.up_proj.weight)] == "model.layers.0.mlp.up_proj.weight"
    assert layer.up_proj.weight.shape == (60, 16)
    assert layer.up_proj.weight.grad is None
    model(tiny.tokens()).logits.sum().backward()
    assert layer.up_proj.weight.grad.shape == (60, 16)
    mlkit.restore(model)
    assert names[id(model.model.layers[0].mlp.up_proj.weight)]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert"])
def test_packed_for_inference_and_back(name):
    stock, x = tiny.FAMILIES[name](), tiny.tokens()
    model = copy.deepcopy(stock)
    mlkit.convert(model, LTEConfig(expert_size=20, pad_to_multiple=True, mode="hard"))
    with torch.no_grad():
        expected = model(x).logits
        pack_for_inference(model, backend="reference")
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    unpack(model)
    mlkit.restore(model)
    for key, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


# ----------------------------------------------------------------- accounting


def test_flops_and_statistics_count_the_padding_as_work():
    model = tiny.llama()
    mlkit.convert(model, LTEConfig(expert_size=20, pad_to_multiple=True, mode="hard"))
    whole, none = lte_flops(model, 0.0), lte_flops(model, 1.0)
    one = 2 * 16 * 3  # FLOPs of a neuron
    assert whole.ffn == none.ffn == 2 * 48 * one
    stock_blocks = 2 * (2 * 16 * 16 * 2 + 2 * 16 * 16 * 2)  # q, o and k, v of two heads of 8
    assert whole.other == none.other == stock_blocks
    assert whole.skipped == -2 * 12 * one
    assert none.skipped == none.ffn
    for layer, on in zip(lte_layers(model).values(), (1, 2), strict=True):
        nn.init.zeros_(layer.router.weight)
        with torch.no_grad():
            layer.router.bias.fill_(-9)[:on] = 9
    reset_lte_stats(model)
    model(tiny.tokens())
    stats = lte_stats(model)
    assert stats.sparsity == pytest.approx(0.5)
    assert lte_flops(model, stats).skipped == pytest.approx((2 * 48 - 3 * 20) * one)


def test_dividing_widths_are_not_touched():
    model = tiny.llama()
    mlkit.convert(model, LTEConfig(expert_size=8, pad_to_multiple=True))
    assert all(layer.padding == 0 for layer in lte_layers(model).values())


# ------------------------------------------------------------------- refusals


class Ungated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(4, 10), nn.Linear(10, 4), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        return torch.relu(x + self.shift)


@pytest.mark.parametrize(
    ("act", "value"), [(nn.Sigmoid(), "0.5"), (nn.Softplus(), "0.693"), (Shifted(), "0.5")]
)
def test_an_activation_that_is_not_zero_at_zero_is_refused(act, value):
    config = LTEConfig(expert_size=4, pad_to_multiple=True, projections=("up", "down"))
    model = nn.Sequential(Ungated(act))
    with pytest.raises(InvalidValueError, match=rf"gives {value} at 0; .*than 4; sizes.* 2, 5"):
        mlkit.convert(model, config)
    assert model[0].up.weight.shape == (10, 4)
    mlkit.convert(model, LTEConfig(expert_size=5, pad_to_multiple=True, projections=("up", "down")))


def test_the_same_for_the_constructor_and_a_gate_makes_any_activation_fit():
    config = LTEConfig(expert_size=4, pad_to_multiple=True)
    with pytest.raises(InvalidValueError, match="the activation gives 0.5 at 0"):
        SparseExpertMLP(3, 10, config, activation="sigmoid", gated=False)
    layer = SparseExpertMLP(3, 10, config, activation="sigmoid", bias=True)
    layer.train()(torch.ones(5, 3)).square().sum().backward()
    assert layer.up_proj.weight.grad[:10].any()
    assert not layer.up_proj.weight.grad[10:].any()
    assert not layer.down_proj.weight.grad[:, 10:].any()


def test_the_message_without_the_option_names_it():
    with pytest.raises(InvalidValueError, match=r"pad_to_multiple=True, which adds 12 zero"):
        mlkit.convert(tiny.llama(), LTEConfig(expert_size=20))
