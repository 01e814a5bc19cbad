"""Packed layers compute what the layers for training compute in hard mode, and come back."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

import mlkit
from mlkit.convert import conversions, load_pretrained, save_pretrained
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError
from mlkit.sparsity import (
    LTEConfig,
    PackedExpertMLP,
    SparseExpertMLP,
    lte_flops,
    lte_layers,
    measure_break_even,
    pack_for_inference,
    set_lte_mode,
    set_lte_threshold,
    unpack,
)
from mlkit_kernels.sparse_mlp import available_backends
from tests.sparsity import tiny

ROUTERS = {
    "sigmoid": {},
    "topp": {"router": "topp", "top_p": 0.5},
    "min_experts": {"min_experts": 2},
}
BACKENDS = ["auto", "reference", "dense", "cpp"]
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="no C++ compiler")


def inputs(name):
    return tiny.images() if name == "vit" else tiny.tokens()


def converted(name, **changes):
    model = tiny.FAMILIES[name]()
    mlkit.convert(
        model,
        LTEConfig(
            **{"expert_size": 8, "router_init": "random", "router_bias": 0.0, "mode": "hard"}
            | changes
        ),
    )
    return model


def same_state(left, right):
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_packs_and_comes_back(name, router):
    model, x = converted(name, **ROUTERS[router]), inputs(name)
    stock_order = copy.deepcopy(model.state_dict())
    names = [(n, type(m)) for n, m in model.named_modules()]
    with torch.no_grad():
        want = model(x).logits
        report = pack_for_inference(model)
        assert [row.name for row in report.rows] == list(lte_layers(model))
        # sums of 16 and 48 terms in another order
        assert relative(model(x).logits, want) < 1e-5
        assert relative(model(x[:1]).logits, want[:1]) < 1e-5
    state = model.state_dict()
    assert set(state) == set(stock_order)
    assert all(torch.equal(state[key], stock_order[key]) for key in state)
    assert conversions(model)
    assert unpack(model) == list(lte_layers(model))
    assert [(n, type(m)) for n, m in model.named_modules()] == names
    same_state(model.state_dict(), stock_order)
    with torch.no_grad():
        assert torch.equal(model(x).logits, want)
    mlkit.restore(model)


# ------------------------------------------------------- all backends, all sizes


def layer(gated=True, bias=True, activation="silu", dtype=torch.float32, **changes):
    config = LTEConfig(
        **{"expert_size": 16, "router_init": "random", "router_bias": 0.0, "mode": "hard"} | changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SparseExpertMLP(48, 16 * 12, config, activation=activation, gated=gated, bias=bias)
        nn.init.normal_(made.router.weight, std=0.3)
    return nn.Sequential(made).to(dtype).eval()


def at_sparsity(model, x, sparsity):
    """Set a threshold that this share of the pairs does not pass, in a gap between two logits."""
    made = model[0]
    if sparsity in (0, 1):
        return made.set_threshold(float(sparsity))
    ordered = made.router(x).flatten().double().sort().values
    middle, room = round(sparsity * len(ordered)), max(1, len(ordered) // 20)
    window = ordered[max(0, middle - room) : middle + room + 1]
    widest = int(window.diff().argmax())
    return made.set_limit(float(window[widest : widest + 2].mean()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
def test_every_backend_is_the_masked_dense_layer(backend, dtype, sparsity):
    if backend == "cpp" and "cpp" not in available_backends():
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for gated, bias, activation in ((True, False, "silu"), (False, True, "gelu_tanh")):
        model = layer(gated, bias, activation, dtype)
        packed = copy.deepcopy(model)
        pack_for_inference(packed, backend=backend)
        for batch, length in ((1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (1, 17), (3, 21), (2, 64)):
            x = torch.randn(length, batch, 48, generator=generator).to(dtype).transpose(0, 1)
            assert batch == 1 or length == 1 or not x.is_contiguous()
            with torch.no_grad():
                at_sparsity(model, x, sparsity)
                packed[0].layer.set_limit(model[0].limit)
                want = copy.deepcopy(model).double()(x.double())  # the same weights, more digits
                got = packed(x)
            assert (got.shape, got.dtype) == (x.shape, dtype)
            assert relative(got, want) < tolerance or not (got - want).abs().max() > 0


@needs_cpp
@pytest.mark.parametrize("limit", [0.0, 0.7, -0.4])
def test_decisions_are_those_of_training(limit):
    """One neuron per expert, always 1, that writes to a channel of its own: y says what ran."""
    size, tokens = 64, 512
    config = LTEConfig(expert_size=1, router_bias=0.1, mode="hard")
    made = SparseExpertMLP(size, size, config, activation="relu", gated=False, bias=True)
    with torch.no_grad():
        made.up_proj.weight.zero_()
        made.up_proj.bias.fill_(1.0)
        made.down_proj.weight.copy_(torch.eye(size))
        made.down_proj.bias.zero_()
        model = nn.Sequential(made).bfloat16()
        x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).bfloat16()
        made.set_limit(limit)
        trained = made.select(made.router(x))
        assert 0.1 < trained.float().mean() < 0.9
        for backend in ("cpp", "dense", "auto"):
            pack_for_inference(model, backend=backend)
            served = torch.cat([model(part) for part in x.split(7)]) > 0.5
            assert (served == trained).float().mean() > 0.999
            unpack(model)


def test_bfloat16_pack_of_a_float_model():
    model, x = converted("llama"), tiny.tokens()
    kept = copy.deepcopy(model)
    with torch.no_grad():
        want = model(x).logits
        report = pack_for_inference(model, dtype=torch.bfloat16)
        assert {row.dtype for row in report.rows} == {torch.bfloat16}
        assert relative(model(x[:, :1]).logits, kept(x[:, :1]).logits) < 2e-2
        assert relative(model(x).logits, want) < 2e-2
        unpack(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        rounded = kept.get_parameter(name)
        if "proj" in name and "mlp" in name:
            bias = name.endswith("down_proj.bias")
            rounded = rounded if bias else rounded.bfloat16().float()
        assert torch.equal(parameter, rounded), name


def test_a_model_that_was_moved_comes_back_where_it_is_now():
    model = converted("opt")
    pack_for_inference(model)
    model.bfloat16()
    unpack(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tiny.tokens()).logits.dtype == torch.bfloat16


# ------------------------------------------------------------------ what users do


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_greedy_generation_has_the_logits_of_the_training_layers(name):
    model, x = converted(name), tiny.tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "pad_token_id": 0,
               "eos_token_id": None, "return_dict_in_generate": True}  # fmt: skip
    want = model.generate(x, **options)
    pack_for_inference(model)
    got = model.generate(x, **options)
    assert torch.equal(got.sequences, want.sequences)
    for left, right in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_threshold_is_the_knob_and_survives():
    model, x = converted("llama"), tiny.tokens()
    reference = copy.deepcopy(model)
    pack_for_inference(model)
    with torch.no_grad():
        for threshold in (0.0, 0.45, 0.5, 1.0):
            set_lte_threshold(model, threshold)
            set_lte_threshold(reference, threshold)
            assert relative(model(x).logits, reference(x).logits) < 1e-5
    set_lte_threshold(model, 0.45)
    unpack(model)
    assert [m.threshold for m in lte_layers(model).values()] == 2 * [pytest.approx(0.45)]


@pytest.mark.parametrize("name", ["own", "bert"])
def test_deepcopy_pickle_and_compile(name):
    model = tiny.own() if name == "own" else tiny.bert()
    config = LTEConfig(expert_size=8, router_init="random", router_bias=0.0, mode="hard",
                       projections=("w1", "w3", "w2") if name == "own" else None)  # fmt: skip
    mlkit.convert(model, config)
    x = tiny.vectors() if name == "own" else tiny.tokens()

    def run(m):
        with torch.no_grad():
            y = m(x)
        return y if name == "own" else y.logits

    pack_for_inference(model)
    want = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), want)
        unpack(other)
        torch.testing.assert_close(run(other), want, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name == "own")
    torch.testing.assert_close(run(compiled), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert"])
def test_saved_while_packed_and_loaded_as_usual(name, tmp_path):
    model, x = converted(name), inputs(name)
    set_lte_threshold(model, 0.4)
    set_lte_mode(model, "soft")
    pack_for_inference(model)
    with torch.no_grad():
        want = model(x).logits
    save_pretrained(model, tmp_path)
    again = load_pretrained(tiny.FAMILIES[name](), tmp_path)
    assert {m.mode for m in lte_layers(again).values()} == {"hard"}
    with torch.no_grad():
        assert relative(again(x).logits, want) < 1e-5
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    with pytest.raises(RuntimeError, match=r"is packed: mlkit\.sparsity\.unpack\(model\), load"):
        model.load_state_dict(again.state_dict())
    with pytest.raises(InvalidValueError, match=r"is packed: .*unpack"):
        load_pretrained(model, tmp_path)
    assert {m.mode for m in lte_layers(model).values()} == {"soft"}
    unpack(model)
    assert {m.mode for m in lte_layers(model).values()} == {"soft"}


def test_weights_are_moved_not_copied():
    model = converted("llama")
    before = sum(p.numel() for p in model.parameters())
    parameters = {id(p) for p in model.parameters()}
    layers = list(lte_layers(model).values())
    pack_for_inference(model)
    assert sum(p.numel() for p in model.parameters()) == before
    for made in layers:
        held = [p.numel() for n, p in made.named_parameters() if "router" not in n]
        assert sum(held) == made.hidden_size  # the bias of the output projection is shared
    unpack(model)
    assert {id(p) for p in model.parameters()} == parameters


def test_a_layer_under_two_names_stays_one():
    model = tiny.llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    mlkit.convert(model, LTEConfig(expert_size=8, mode="hard"))
    want = model(tiny.tokens()).logits
    assert len(pack_for_inference(model).rows) == 1
    first, second = (block.mlp for block in model.model.layers)
    assert first is second
    assert isinstance(first, PackedExpertMLP)
    torch.testing.assert_close(model(tiny.tokens()).logits, want, rtol=1e-4, atol=1e-6)
    unpack(model)
    assert model.model.layers[0].mlp is model.model.layers[1].mlp
    assert torch.equal(model(tiny.tokens()).logits, want)


def test_gradients_reach_the_input():
    model = layer(gated=False, activation="relu2")
    x = torch.randn(3, 48, requires_grad=True, generator=torch.Generator().manual_seed(0))
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    pack_for_inference(model)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    assert relative(got, want) < 1e-5


def test_flops_are_those_of_the_unpacked_model():
    for name in ("llama", "opt"):
        model = converted(name)
        want = lte_flops(model, 0.5)
        pack_for_inference(model)
        assert lte_flops(model, 0.5) == want


# ------------------------------------------------------------------- break-even


@needs_cpp
def test_auto_measures_once_for_each_kind_of_layer(caplog):
    model = nn.Sequential(layer()[0], layer()[0], layer(gated=False)[0])
    with caplog.at_level(logging.INFO, "mlkit"):
        report = pack_for_inference(model)
    lines = [r.message for r in caplog.records if "dense above" in r.message]
    assert [line.split()[1] for line in lines] == ["2", "1"]
    assert model[0].prices is model[1].prices
    assert model[0].prices is not model[2].prices
    assert all(list(row.dense_above) == [1, 2, 4, 8] for row in report.rows)
    assert all(0 <= f <= 1 for row in report.rows for f in row.dense_above.values())
    assert "100% (1)" in str(report) or "% (1)" in str(report)
    assert set(measure_break_even(model)) == {"0", "1", "2"}
    unpack(model)
    pack_for_inference(model, backend="cpp")
    assert model[0].prices is None
    assert measure_break_even(model) == {}
    with pytest.raises(RunError, match="no layer of Linear is packed"):
        measure_break_even(nn.Linear(2, 2))


# -------------------------------------------------------------------- refusals


def test_training_mode_is_refused():
    model = converted("llama")
    model.train()
    pack_for_inference(model)
    assert not model.training
    with pytest.raises(
        RunError, match=r"cannot be trained: mlkit\.sparsity\.unpack\(model\) first"
    ):
        model.train()
    model.eval()
    unpack(model)
    model.train()


def test_modes_verbs_and_order():
    model = converted("bert", mode="soft")
    with pytest.raises(RunError, match="is packed: there is nothing to undo"):
        unpack(model)
    with pytest.raises(RunError, match=r"no LTE layer: mlkit\.convert"):
        pack_for_inference(tiny.llama())
    report = pack_for_inference(model)
    assert {row.mode for row in report.rows} == {"soft"}
    with pytest.raises(RunError, match="is packed already"):
        pack_for_inference(model)
    with pytest.raises(RunError, match=r"runs in hard mode, got mode='dense': unpack"):
        set_lte_mode(model, "dense")
    set_lte_mode(model, "hard")
    with pytest.raises(RunError, match=r"packed: mlkit\.sparsity\.unpack\(model\) first"):
        mlkit.restore(model)
    with pytest.raises(RunError, match="already converted"):
        mlkit.convert(model, LTEConfig(expert_size=8))
    unpack(model)
    assert {m.mode for m in lte_layers(model).values()} == {"hard"}
    mlkit.restore(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, InvalidValueError, "backend must be one of auto, .*got 'cuda'"),
        ({"dtype": torch.int8}, InvalidValueError, "dtype must be one of .*got torch.int8"),
        ({"backend": "triton"}, RunError, r"'triton' cannot run here: it needs a CUDA.*on cpu"),
    ],
)
def test_bad_arguments(options, error, message):
    model = converted("llama")
    with pytest.raises(error, match=message):
        pack_for_inference(model, **options)
    assert all(isinstance(m, SparseExpertMLP) for m in lte_layers(model).values())
    assert model(tiny.tokens()).logits.isfinite().all()


@needs_cpp
def test_types_that_a_backend_does_not_take():
    model = layer(dtype=torch.float64)
    with pytest.raises(InvalidTypeError, match=r"'cpp' takes .*'0' has torch.float64: set dtype"):
        pack_for_inference(model, backend="cpp")
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = model(x)
    pack_for_inference(model)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_layers_that_cannot_be_packed_say_why():
    made = layer()
    with pytest.raises(InvalidValueError, match=r"the model itself is an LTE layer.*Sequential"):
        pack_for_inference(made[0])
    made[0].up_proj.double()
    with pytest.raises(InvalidValueError, match=r"several types \(torch.float32, torch.float64\)"):
        pack_for_inference(made)
    with torch.device("meta"):
        empty = tiny.llama()
    mlkit.convert(empty, LTEConfig(expert_size=8))
    with pytest.raises(InvalidValueError, match="on the meta device: load its weights first"):
        pack_for_inference(empty)

    class Odd(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    model = tiny.llama()
    for block in model.model.layers:
        block.mlp.act_fn = Odd()
    mlkit.convert(model, LTEConfig(expert_size=8))
    with pytest.raises(InvalidValueError, match=r"activation of '.*mlp', Odd, is none of .*silu"):
        pack_for_inference(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21
def test_adapters_must_be_merged_first():
    peft = pytest.importorskip("peft")
    model = converted("llama")
    config = peft.LoraConfig(target_modules=["up_proj"], r=2)
    with_adapter = peft.get_peft_model(model, config)
    with pytest.raises(InvalidValueError, match=r"'up_proj' of '.*' is a Linear.*merge_and_unload"):
        pack_for_inference(with_adapter)
    pack_for_inference(with_adapter.merge_and_unload())
