"""LTEConfig(layers=...): some blocks by number."""

import pytest
import torch
from torch import nn

import mlkit
from mlkit.convert import conversions, load_pretrained, save_pretrained
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity import LTEConfig, lte_layers
from tests.sparsity import tiny


def stack(count=4):
    return tiny.seeded(lambda: tiny.OwnModel(count))


def config(layers, **changes):
    return LTEConfig(expert_size=8, projections=("w1", "w3", "w2"), layers=layers, **changes)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((0,), [0]), ((1, -1), [1, 3]), (range(1, 3), [1, 2]), ((-4, 0), [0]), ([3, 2, 1, 0], None)],
)
def test_numbers_count_from_either_end(layers, expected):
    expected = list(range(4)) if expected is None else expected
    model = stack()
    report = mlkit.convert(model, config(layers))
    assert report.replaced == [f"layers.{i}" for i in expected]
    left = [f"layers.{i}" for i in range(4) if i not in expected]
    assert report.skipped == dict.fromkeys(left, f"not among the layers {tuple(layers)}")
    assert all(name in str(report) for name in left)
    assert {m.loss_weight for m in lte_layers(model).values()} == {1 / len(expected)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_families(name, tmp_path):
    model = tiny.FAMILIES[name]()
    report = mlkit.convert(model, LTEConfig(expert_size=8, layers=(-1,)))
    assert len(report.replaced) == len(report.skipped) == 1
    assert ".1" in report.replaced[0]
    save_pretrained(model, tmp_path)
    again = load_pretrained(tiny.FAMILIES[name](), tmp_path)
    assert conversions(again) == conversions(model)
    assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_named_targets_and_numbers_must_both_hold():
    report = mlkit.convert(stack(), config((0, 1)), ["layers.1", "layers.[03]"])
    assert report.replaced == ["layers.0", "layers.1"]
    assert report.skipped == {
        "layers.2": "not among the layers (0, 1)", "layers.3": "not among the layers (0, 1)",
    }  # fmt: skip
    report = mlkit.convert(stack(), config((0, 1)), ["layers.1"])
    assert report.skipped["layers.0"] == "not among the targets"


def test_contradictions_and_numbers_out_of_range():
    model = stack()
    message = r"'layers\.3' matches only what the config leaves out: layers\.3 is not among the la"
    with pytest.raises(InvalidValueError, match=message):
        mlkit.convert(model, config((0,)), ["layers.0", "layers.3"])
    assert not conversions(model)
    with pytest.raises(InvalidValueError, match=message):
        mlkit.convert(model, config((0,)), ["layers.3"], strict=False)
    for number in (4, -5):
        with pytest.raises(
            InvalidValueError,
            match=rf"layers holds {number}, .* has 4 feed-forward layers: 0 to 3, or -4 to -1",
        ):
            mlkit.convert(model, config((0, number)))
    with pytest.raises(InvalidValueError, match="finds nothing to convert in Sequential"):
        mlkit.convert(nn.Sequential(nn.ReLU()), config((0,)))
    report = mlkit.convert(model, config((0,)), ["layers.0", "layers.3"], strict=False)
    assert report.replaced == ["layers.0"]


def test_a_layer_that_is_left_out_may_be_one_that_cannot_be_converted():
    model = stack()
    model.layers[2].w1 = nn.Linear(12, 33)
    with pytest.raises(InvalidValueError, match=r"layers\.2: its projections do not fit"):
        mlkit.convert(model, config((1, 2)))
    assert mlkit.convert(model, config((1, 3))).replaced == ["layers.1", "layers.3"]


def test_two_configs_for_two_parts_of_a_model_and_back_from_disk(tmp_path):
    model = stack()
    mlkit.convert(model, config((2, 3), router="topp"))
    mlkit.convert(model, config((0, 1), seed=1))
    assert [c.seed for c in conversions(model).values()] == [1, 1, 0, 0]
    with pytest.raises(RunError, match=r"'layers\.1' is already converted"):
        mlkit.convert(model, config((1,)))
    save_pretrained(model, tmp_path)
    again = load_pretrained(stack(), tmp_path)
    assert torch.equal(again(tiny.vectors()), model(tiny.vectors()))
    assert mlkit.restore(again) == [f"layers.{i}" for i in range(4)]


def test_a_shared_layer_counts_once():
    model = stack()
    model.layers[1] = model.layers[0]
    report = mlkit.convert(model, config((1,)))
    assert report.replaced == ["layers.2"]
    assert list(report.skipped) == ["layers.0", "layers.3"]


def test_weights_shared_with_a_layer_that_is_left_out_are_refused():
    model = stack()
    model.layers[3].w1 = model.layers[0].w1
    with pytest.raises(InvalidValueError, match=r"layers\.0: its weights are shared"):
        mlkit.convert(model, config((0,)))
