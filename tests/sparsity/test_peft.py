"""LoRA on converted models: what trains, both stages, adapters on disk, merge and restore."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mlkit
from mlkit.convert import load_pretrained, save_pretrained
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity import (
    LTEConfig,
    SparsityControl,
    TwoStageSchedule,
    freeze_routers,
    lte_flops,
    lte_layers,
    lte_lora_config,
    lte_stats,
    set_lte_mode,
    set_lte_threshold,
    set_lte_weights,
)
from mlkit.sparsity.schedule import drop_router_state
from tests.sparsity import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

FAMILIES = ("llama", "phi3", "gpt2", "opt", "bert")
CONFIG = LTEConfig(expert_size=8, router_bias=0.0)


def wrapped(name, config=CONFIG, **settings):
    from peft import get_peft_model

    model = tiny.FAMILIES[name]()
    mlkit.convert(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, lte_lora_config(model, r=2, **settings))


def loss(model, mask=None):
    return model(input_ids=tiny.tokens(), attention_mask=mask).logits.square().mean()


def train(model, steps=6, schedule=True, control=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    stages = TwoStageSchedule(steps, 0.5)
    model.train()
    for number in range(steps):
        if schedule:
            stages.apply(model, number, [optimizer])
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if control is not None:
            control.step(model)
    return optimizer


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_on_the_projections_and_nowhere_else(name):
    model = wrapped(name)
    layers = lte_layers(model)
    adapted = {n.rpartition(".")[0] for n, m in model.named_modules() if n.endswith("lora_A")}
    inside = [p.removesuffix(".router") for p in layers]
    block = {"bert": "attention", "gpt2": "attn"}.get(name, "self_attn")
    assert adapted
    assert not any(f".{block}." in n for n in adapted), "c_proj and output.dense occur there, too"
    counts = {"llama": 3, "phi3": 2, "gpt2": 2, "opt": 1, "bert": 2}
    assert len(adapted) == counts[name] * len(inside)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "router.modules_to_save.default" in n for n in trained)
    assert sum("router" in n for n in trained) == 2 * len(layers)
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "base_layer")} == {"Linear"}
    fan = {m.fan_in_fan_out for m in model.modules() if hasattr(m, "base_layer")}
    assert fan == {name == "gpt2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_output_is_that_of_the_converted_model(name):
    model, plain = wrapped(name), tiny.FAMILIES[name]()
    mlkit.convert(plain, CONFIG)
    x = tiny.tokens()
    for mode in ("dense", "soft", "hard"):
        set_lte_mode(plain, mode)
        set_lte_mode(model, mode)
        assert {m.mode for m in lte_layers(model).values()} == {mode}
        assert torch.equal(model.eval()(input_ids=x).logits, plain(x).logits)
    set_lte_threshold(model, 0.6)
    set_lte_threshold(plain, 0.6)
    assert torch.equal(model(input_ids=x).logits, plain(x).logits)
    mask = torch.ones_like(x)
    mask[0, 2:] = 0
    model(input_ids=x, attention_mask=mask)
    assert lte_stats(model, reset=True).tokens % int(mask.sum()) != 0
    model(input_ids=x, attention_mask=mask)
    assert lte_stats(model).tokens == int(mask.sum())
    sparsity = lte_flops(plain, 0.5)
    assert lte_flops(model, 0.5) == sparsity, "copies of routers and adapters are no linear layers"


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages_train_and_freeze_the_copy_in_use(name):
    model = wrapped(name)
    set_lte_weights(model, eta=2.0)
    base = {n: p.clone() for n, p in model.named_parameters()
            if "lora_" not in n and "modules_to_save" not in n}  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    schedule, layers = TwoStageSchedule(6, 0.5), list(lte_layers(model).values())
    seen = []
    for number in range(6):
        schedule.apply(model, number, [optimizer])
        active = [p for layer in layers for p in layer.router.modules_to_save.parameters()]
        first = [p for layer in layers for p in layer.router.original_module.parameters()]
        assert not any(p.requires_grad for p in first), "DDP would wait for their gradients"
        assert all(p.requires_grad is (number < 3) for p in active)
        assert all((p in optimizer.state) is (0 < number < 3) for p in active)
        seen.append([p.clone() for p in active])
        optimizer.zero_grad()
        loss(model.train()).backward()
        assert all((p.grad is not None) is (number < 3) for p in active)
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(seen[0], seen[3], strict=True)), (
        "stage 1 trains them"
    )
    assert all(torch.equal(a, b) for a, b in zip(seen[3], active, strict=True))
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    freeze_routers(model, False)
    assert all(p.requires_grad for p in active)
    assert not any(p.requires_grad for p in first)
    drop_router_state(model, optimizer)


def test_control_moves_the_copy_in_use():
    model = wrapped("llama", LTEConfig(expert_size=8))
    control = SparsityControl(0.5, interval=2)
    before = [m.routing.bias.clone() for m in lte_layers(model).values()]
    train(model, 12, control=control)
    layers = list(lte_layers(model).values())
    assert all(not torch.equal(a, m.routing.bias) for a, m in zip(before, layers, strict=True))
    assert {m.limit for m in layers} == {control.threshold.limit}
    assert layers[0].routing is layers[0].router.modules_to_save["default"]


def test_without_the_adapter_the_base_routes_as_it_did():
    model = wrapped("llama")
    plain = tiny.llama()
    mlkit.convert(plain, CONFIG)
    train(model)
    with model.disable_adapter():
        assert {m.mode for m in lte_layers(model).values()} == {"soft"}
        found = model.eval()(input_ids=tiny.tokens()).logits
    assert torch.equal(found, plain(tiny.tokens()).logits)
    assert {m.mode for m in lte_layers(model).values()} == {"hard"}


# ----------------------------------------------------------------------- disk


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_adapter_works_on_a_freshly_converted_model(name, tmp_path):
    from peft import PeftModel

    model = wrapped(name)
    train(model)
    set_lte_threshold(model, 0.55)
    expected = model.eval()(input_ids=tiny.tokens()).logits
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(k.endswith("router.neuron_perm") for k in keys) == len(lte_layers(model))
    assert sum(k.endswith("router._extra_state") for k in keys) == len(lte_layers(model))
    # Another machine's k-means may end elsewhere: another seed stands for it.
    for config in (CONFIG, LTEConfig(expert_size=8, seed=5), LTEConfig(expert_size=8, mode="hard")):
        fresh = tiny.FAMILIES[name]()
        mlkit.convert(fresh, config)
        again = PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert {(m.mode, m.limit) for m in lte_layers(again).values()} == {
            ("hard", next(iter(lte_layers(model).values())).limit)
        }
        torch.testing.assert_close(
            again(input_ids=tiny.tokens()).logits, expected, rtol=1e-5, atol=1e-6
        )
        for a, b in zip(lte_layers(again).values(), lte_layers(model).values(), strict=True):
            assert all(torch.equal(r.neuron_perm, b.neuron_perm) for r in a.routers())
        mlkit.restore(again.merge_and_unload())


def test_an_adapter_of_another_order_beside_one_that_is_there_is_refused(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path / "one")
    other = wrapped("llama", LTEConfig(expert_size=8, seed=5))
    with pytest.raises(RuntimeError, match=r"another order of the neurons than that of the adapt"):
        other.load_adapter(tmp_path / "one", "second")
    same = wrapped("llama")
    same.load_adapter(tmp_path / "one", "second")
    same.set_adapter("second")
    assert lte_layers(same)
    assert torch.equal(
        same.eval()(input_ids=tiny.tokens()).logits, model.eval()(input_ids=tiny.tokens()).logits
    )


def test_whole_state_and_save_pretrained_of_the_wrapped_model(tmp_path):
    model = wrapped("gpt2")
    train(model)
    expected = model.eval()(input_ids=tiny.tokens()).logits
    again = wrapped("gpt2", LTEConfig(expert_size=8, router_bias=0.0, seed=5))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(input_ids=tiny.tokens()).logits, expected)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(wrapped("gpt2"), tmp_path)
    assert torch.equal(loaded.eval()(input_ids=tiny.tokens()).logits, expected)


# -------------------------------------------------------------- merge, restore


@pytest.mark.parametrize("name", FAMILIES)
def test_merge_then_restore_gives_the_trained_dense_model(name, tmp_path):
    model = wrapped(name)
    train(model)
    expected = {}
    for mode in ("hard", "dense"):
        set_lte_mode(model, mode)
        expected[mode] = model.eval()(input_ids=tiny.tokens()).logits
    merged = model.merge_and_unload()
    for mode in ("dense", "hard"):
        set_lte_mode(merged, mode)
        torch.testing.assert_close(
            merged(tiny.tokens()).logits, expected[mode], rtol=1e-4, atol=1e-5
        )
    save_pretrained(merged, tmp_path)
    again = load_pretrained(tiny.FAMILIES[name](), tmp_path)
    assert torch.equal(again(tiny.tokens()).logits, merged(tiny.tokens()).logits)
    mlkit.restore(merged)
    stock = tiny.FAMILIES[name]()
    assert list(merged.state_dict()) == list(stock.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(
        merged(tiny.tokens()).logits, expected["dense"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_padded_neurons_stay_silent_under_adapters(name):
    config = LTEConfig(expert_size=20, pad_to_multiple=True, mode="dense")
    model = wrapped(name, config, init_lora_weights=False)  # A and B random: everything moves
    train(model, 3, schedule=False)
    expected = model.eval()(input_ids=tiny.tokens()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------- config


def test_the_config_passes_settings_on():
    model = tiny.llama()
    mlkit.convert(model, LTEConfig(expert_size=8, layers=(1,)))
    config = lte_lora_config(
        model, 4, also=["q_proj"], lora_alpha=32, modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    assert (config.r, config.lora_alpha, config.task_type) == (4, 32, "CAUSAL_LM")
    names = {f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert set(config.target_modules) == {*names, "q_proj"}
    assert config.modules_to_save == ["router", "lm_head"]
    json.dumps(sorted(config.target_modules))


def test_bad_calls():
    with pytest.raises(RunError, match="has no LTE layer"):
        lte_lora_config(tiny.llama())
    model = wrapped("llama")
    with pytest.raises(InvalidValueError, match=r"gate_proj has an adapter already"):
        lte_lora_config(model)
    plain = tiny.llama()
    mlkit.convert(plain, CONFIG)
    with pytest.raises(InvalidValueError, match="name other modules by also="):
        lte_lora_config(plain, target_modules=["x"])
    assert isinstance(copy.deepcopy(model), nn.Module)
