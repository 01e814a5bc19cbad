"""Every family converts without a change of its function, and comes back bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlkit
from mlkit.convert import load_pretrained, save_pretrained
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError
from mlkit.sparsity import (
    FFNLayout,
    LTEConfig,
    lte_layers,
    lte_stats,
    register_ffn_adapter,
    set_lte_mode,
    set_lte_threshold,
)
from tests.sparsity import tiny

SMALL = LTEConfig(expert_size=8)


def inputs(name):
    return tiny.images() if name == "vit" else tiny.tokens()


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_dense_output_keys_and_weights_survive(name, tmp_path):
    stock = tiny.FAMILIES[name]()
    model, x = copy.deepcopy(stock), inputs(name)
    report = mlkit.convert(model, SMALL)
    assert len(report.replaced) == (1 if name == "albert" else 2)
    assert report.before.flops == sum(layer.dense_flops for layer in lte_layers(model).values())
    moved = [not torch.equal(m.neuron_perm.sort().indices, m.neuron_perm.sort().values)
             for m in lte_layers(model).values()]  # fmt: skip
    assert all(moved), "a permutation that moves nothing proves nothing"

    keys = set(stock.state_dict())
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert {k.rsplit(".", 2)[-2] for k in added} == {"router"}
    assert {k.rsplit(".", 1)[-1] for k in added} == {
        "weight", "bias", "neuron_perm", "_extra_state",
    }  # fmt: skip

    set_lte_mode(model, "dense")
    expected = stock(x).logits
    # the same 48 products in another order
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    set_lte_mode(model, "hard")
    set_lte_threshold(model, 0.0)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    set_lte_threshold(model, 1.0)
    assert not torch.allclose(model(x).logits, expected, atol=1e-4)
    assert lte_stats(model, reset=True).sparsity == pytest.approx(0.5)

    set_lte_threshold(model, 0.9)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tiny.FAMILIES[name](), tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    assert {layer.mode for layer in lte_layers(again).values()} == {"hard"}

    mlkit.restore(model)
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x).logits, expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert"])
def test_stock_checkpoint_in_a_converted_model(name):
    model, trained, x = tiny.FAMILIES[name](), tiny.FAMILIES[name](), inputs(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.3)
    mlkit.convert(model, SMALL)
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[-2] for key in missing} == {"router"}
    set_lte_mode(model, "dense")
    torch.testing.assert_close(model(x).logits, trained(x).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"Missing key.*router\.weight"):
        model.load_state_dict(trained.state_dict())


def test_half_a_checkpoint_and_one_without_order_are_refused():
    model = tiny.opt()
    mlkit.convert(model, SMALL)
    state = model.state_dict()
    without = {k: v for k, v in state.items() if "neuron_perm" not in k}
    with pytest.raises(RuntimeError, match="the order of its neurons is unknown"):
        model.load_state_dict(without, strict=False)
    key = next(k for k in state if k.endswith("neuron_perm"))
    with pytest.raises(RuntimeError, match="is not a permutation of 48"):
        model.load_state_dict(state | {key: torch.zeros(48, dtype=torch.int64)})
    with torch.device("meta"):
        empty = tiny.opt()
    mlkit.convert(empty, SMALL)
    with pytest.raises(RuntimeError, match=r"converted on the meta device.*stock"):
        empty.load_state_dict(tiny.opt().state_dict(), strict=False, assign=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_converted_checkpoint_in_an_unconverted_model(name, tmp_path):
    """torch names the router's keys; without them it is the dense model, in another order."""
    model, x = tiny.FAMILIES[name](), inputs(name)
    mlkit.convert(model, SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    set_lte_mode(model, "dense")
    stock = tiny.FAMILIES[name]()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*router\.neuron_perm"):
        stock.load_state_dict(model.state_dict())
    stock.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(stock(x).logits, model(x).logits, rtol=1e-6, atol=1e-6)
    save_pretrained(model, tmp_path)
    with pytest.raises(InvalidValueError, match=r"holds a model with a converted .* Linear does n"):
        load_pretrained(nn.Linear(2, 2), tmp_path)

    padded = tiny.FAMILIES[name]()
    mlkit.convert(padded, LTEConfig(expert_size=20, pad_to_multiple=True))
    with pytest.raises(RuntimeError, match=r"size mismatch .*60"):
        stock.load_state_dict(padded.state_dict(), strict=False)


def test_a_folder_of_a_stock_model_is_not_taken_for_a_converted_one(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(
        InvalidValueError, match=r"no mlkit\.json.*a stock checkpoint is loaded as e"
    ):
        load_pretrained(tiny.llama(), tmp_path)
    save_pretrained(tiny.llama(), tmp_path)
    model = tiny.llama()
    mlkit.convert(model, SMALL)
    with pytest.raises(RunError, match=r"converted \(2 modules by .* in another way .*\(not\)"):
        load_pretrained(model, tmp_path)


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize("build", [tiny.mixtral, tiny.qwen3_moe])
def test_mixtures_are_refused(build):
    with pytest.raises(InvalidValueError, match="is a mixture of experts already"):
        mlkit.convert(build(), SMALL)


def test_dense_layers_beside_mixtures_convert_when_asked_for():
    model = tiny.qwen3_moe(mlp_only_layers=[0])
    with pytest.raises(InvalidValueError, match=r"layers\.1\.mlp: .*mixture.*strict=False leaves"):
        mlkit.convert(model, SMALL)
    report = mlkit.convert(model, LTEConfig(expert_size=8, layers=(0,)))
    assert report.replaced == ["model.layers.0.mlp"]
    assert report.skipped == {"model.layers.1.mlp": "not among the layers (0,)"}


def test_size_that_does_not_divide_names_the_nearest():
    with pytest.raises(InvalidValueError, match=r"expert_size=32, intermediate size 48; .*24, 48"):
        mlkit.convert(tiny.llama(), LTEConfig())
    with pytest.raises(InvalidValueError, match="min_experts is 7, of 6 experts"):
        mlkit.convert(tiny.llama(), LTEConfig(expert_size=8, min_experts=7))


def test_quantised_and_packed_weights_are_refused():
    class Linear8bit(nn.Linear):
        pass

    model = tiny.llama()
    layer = Linear8bit(16, 48)
    layer.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj = layer
    with pytest.raises(InvalidValueError, match=r"'up_proj' is a Linear8bit .*torch\.int8: quant"):
        mlkit.convert(model, SMALL)
    report = mlkit.convert(model, SMALL, strict=False)
    assert report.replaced == ["model.layers.1.mlp"]


class Params4bit(nn.Parameter):
    """As in bitsandbytes: a parameter of bytes."""


class AffineQuantizedTensor(torch.Tensor):
    """As in torchao: a tensor of another kind that says it is float."""


class PackedLinear(nn.Module):
    """As in torch.ao: the weight is a method."""

    def __init__(self):
        super().__init__()
        self.bias = None

    def weight(self):
        return torch.zeros(48, 16)


def quantised(kind):
    layer = nn.Linear(16, 48)
    if kind == "bitsandbytes":
        layer.weight = Params4bit(torch.zeros(384, 1, dtype=torch.uint8), requires_grad=False)
    elif kind == "torchao":
        weight = torch.zeros(48, 16).as_subclass(AffineQuantizedTensor)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    else:
        layer = PackedLinear()
    return layer


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("bitsandbytes", r"Params4bit of torch\.uint8"),
        ("torchao", "AffineQuantizedTensor of torch"),
        ("torch.ao", "PackedLinear with weight method"),
    ],
)
def test_other_kinds_of_quantised_weights_are_explained(kind, held):
    model = tiny.llama()
    model.model.layers[1].mlp.down_proj = quantised(kind)
    with pytest.raises(
        InvalidValueError, match=rf"layers\.1\.mlp: 'down_proj' .*{held}.*: quantised .*then quant"
    ):
        mlkit.convert(model, SMALL)


def test_a_model_without_feed_forward_layers_lists_its_modules():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    with pytest.raises(InvalidValueError, match=r"LTEConfig finds nothing .*Conv2d x2 \(0\)"):
        mlkit.convert(model, SMALL)


def test_chunked_layers_are_refused():
    model = tiny.bert()
    model.bert.encoder.layer[0].chunk_size_feed_forward = 2
    with pytest.raises(InvalidValueError, match="chunk_size_feed_forward = 0"):
        mlkit.convert(model, SMALL)


def test_weights_shared_between_layers_are_refused_and_shared_layers_converted_once():
    model = tiny.llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(InvalidValueError, match="weights are shared with another layer"):
        mlkit.convert(model, SMALL)
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(InvalidValueError, match="weights are shared with another layer"):
        mlkit.convert(model, SMALL)
    model = tiny.llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert mlkit.convert(model, SMALL).replaced == ["model.layers.0.mlp"]
    assert model.model.layers[1].mlp is model.model.layers[0].mlp


def test_half_converted_model_in_two_calls_shares_the_losses():
    model = tiny.llama()
    mlkit.convert(model, SMALL, "*.0.mlp")
    mlkit.convert(model, LTEConfig(expert_size=4), "*.1.mlp")
    first, second = lte_layers(model).values()
    assert first.group is second.group
    assert (first.loss_weight, second.loss_weight) == (0.5, 0.5)
    with pytest.raises(RunError, match="is already converted"):
        mlkit.convert(model, SMALL)


# ------------------------------------------------------------ a user's own layers


def test_own_layer_by_its_three_names_and_the_activation_is_found():
    model = tiny.own()
    expected = model(tiny.vectors())
    mlkit.convert(model, LTEConfig(expert_size=8, projections=("w1", "w3", "w2")))
    layer = model.layers[0]
    assert (layer.layout.activation, layer.layout.gate_proj) == ("silu", "w1")
    set_lte_mode(model, "dense")
    torch.testing.assert_close(model(tiny.vectors()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projections": ("w3", "w1", "w2")}, r"does not compute w2\(act\(w3\(x\)\) \* w1"),
        ({"projections": ("w1", "w3", "w2"), "activation": "relu"}, "does not compute"),
        ({"projections": ("w1", "w2")}, "does not compute"),
        ({"projections": ("w2", "w3", "w1")}, "do not fit one another"),
        ({"projections": ("a", "b", "c")}, "finds nothing to convert in OwnModel"),
    ],
)
def test_wrong_names_or_order_are_noticed(changes, message):
    with pytest.raises(InvalidValueError, match=message):
        mlkit.convert(tiny.own(), LTEConfig(expert_size=8, **changes))


class Dropping(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)
        self.drop, self.inside = nn.Dropout(0.5), inside

    def forward(self, x):
        h = F.gelu(self.up(x))
        return self.down(self.drop(h)) if self.inside else self.drop(self.down(h))


def test_dropout_is_found_after_the_layer_and_refused_inside():
    config = LTEConfig(expert_size=4, projections=("up", "down"))
    model = nn.Sequential(Dropping(inside=False))
    mlkit.convert(model, config)
    assert model[0].layout.dropout == "drop"
    assert model[0].layout.activation == "gelu"
    with pytest.raises(InvalidValueError, match=r"dropout may follow.*random input"):
        mlkit.convert(nn.Sequential(Dropping(inside=True)), config)


def test_own_layer_on_meta_needs_the_activation_named():
    with torch.device("meta"):
        model = tiny.own()
    names = ("w1", "w3", "w2")
    with pytest.raises(InvalidValueError, match=r"cannot be tried on meta: set LTEConfig\.act"):
        mlkit.convert(model, LTEConfig(expert_size=8, projections=names))
    mlkit.convert(model, LTEConfig(expert_size=8, projections=names, activation="silu"))
    assert model.layers[0].router.weight.is_meta


class Registered(tiny.OwnMLP):
    pass


def test_registered_adapter_serves_a_class_and_may_refuse():
    register_ffn_adapter(Registered, lambda m: FFNLayout("w3", "w2", "w1", activation="silu"))
    register_ffn_adapter("Refused", lambda m: "not this one")
    model = nn.Sequential(Registered())
    assert mlkit.convert(model, SMALL).replaced == ["0"]

    class Refused(nn.Module):
        pass

    with pytest.raises(InvalidValueError, match="0: not this one"):
        mlkit.convert(nn.Sequential(Refused()), SMALL)
    with pytest.raises(InvalidTypeError, match="cls must be an nn.Module class"):
        register_ffn_adapter(int, lambda m: None)
    with pytest.raises(InvalidTypeError, match="adapter must map"):
        register_ffn_adapter(Registered, None)


@pytest.mark.parametrize("grouping", ["random", "none"])
def test_other_groupings(grouping):
    model = tiny.llama()
    mlkit.convert(model, LTEConfig(expert_size=8, grouping=grouping))
    order = model.model.layers[0].mlp.neuron_perm
    assert torch.equal(order, torch.arange(48)) == (grouping == "none")
    assert not torch.equal(order, model.model.layers[1].mlp.neuron_perm) or grouping == "none"


def test_bfloat16_model_converts_and_trains():
    model = tiny.llama().bfloat16()
    mlkit.convert(model, SMALL)
    model.train()(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert model.model.layers[0].mlp.router.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21
def test_lora_on_a_converted_model_and_restore_after_the_merge():
    from peft import LoraConfig, get_peft_model

    model, stock = tiny.llama(), tiny.llama()
    mlkit.convert(model, SMALL)
    lora = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"],
                      modules_to_save=["router"])  # fmt: skip
    wrapped = get_peft_model(model, lora)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or "router" in n for n in trained)
    wrapped.train()(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    routers = [p for n, p in wrapped.named_parameters() if "router" in n and p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)
    with pytest.raises(
        RunError, match=r"gate_proj is a Linear, with an adapter .*merge_and_unload"
    ):
        mlkit.restore(model)
    with pytest.raises(InvalidValueError, match="a linear layer with an adapter: convert first"):
        mlkit.convert(get_peft_model(stock, LoraConfig(target_modules=["up_proj"])), SMALL)
    merged = wrapped.merge_and_unload()
    mlkit.restore(merged)
    assert list(merged.state_dict()) == list(tiny.llama().state_dict())
