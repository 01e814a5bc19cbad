"""The verb itself, with a small converter of its own; the rooms' converters have their tests."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mlkit
from mlkit.convert import (
    Candidate,
    ConversionReport,
    Cost,
    conversions,
    load_pretrained,
    register_converter,
    save_pretrained,
)
from mlkit.errors import InvalidTypeError, InvalidValueError, MlkitError, RunError
from tests.helpers.battery import ALL_PASS, BatteryCase, ConverterBattery, Expectation
from tests.helpers.runs import run_python


@dataclass(frozen=True)
class GainConfig:
    """Linear layers get a learned gain; ones with 13 outputs are refused."""

    gain: float = 1.0
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))


class GainLinear(nn.Linear):
    def __init__(self, stock: nn.Linear, gain: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.weight, self.bias = stock.weight, stock.bias
        self.gain = nn.Parameter(torch.full_like(stock.weight[:1, :1], gain))

    def forward(self, x):
        return super().forward(x) * self.gain


class GainConverter:
    def candidates(self, model, config):
        return [
            Candidate(n, "Linear", "13 is unlucky" if m.out_features == 13 else None)
            for n, m in model.named_modules()
            if type(m) is nn.Linear
        ]

    def build(self, model, names: Sequence[str], config, *, structure_only):
        return {n: GainLinear(model.get_submodule(n), config.gain) for n in names}

    def restore(self, model, names):
        new = {}
        for name in names:
            old = model.get_submodule(name)
            with torch.device("meta"):
                new[name] = nn.Linear(old.in_features, old.out_features)
            new[name].weight, new[name].bias = old.weight, old.bias
        return new

    def cost(self, site):
        count = sum(p.numel() for p in site.parameters())
        return Cost(count, 4 * count, 2 * site.weight.numel())


register_converter(GainConfig, f"{__name__}:GainConverter")


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def inputs() -> tuple[torch.Tensor]:
    return (torch.randn(6, 5, generator=torch.Generator().manual_seed(1)),)


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


class TestGain(ConverterBattery):
    cases = (BatteryCase("gain", build, inputs, GainConfig(), ALL_PASS, call=call),)


def test_a_declared_error_is_expected_and_its_absence_is_a_failure(tmp_path):
    declared = Expectation(InvalidValueError, "unlucky")
    with declared.context():
        mlkit.convert(nn.Sequential(nn.Linear(2, 13)), GainConfig())
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"), declared.context():
        mlkit.convert(build(), GainConfig())


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "first",
    [
        "mlkit.convert",
        "from mlkit.convert import ConversionReport",
        "import mlkit.convert",
        "import mlkit.sparsity",
        "import importlib; importlib.import_module('mlkit.convert')",
    ],
)
def test_the_name_is_the_function_whatever_is_imported_first(first):
    code = (
        f"import sys, mlkit\n{first}\n"
        "from mlkit.convert import ConversionReport, convert\n"
        "assert mlkit.convert is convert and callable(mlkit.restore)\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_register_converter_checks_its_arguments():
    with pytest.raises(InvalidValueError, match=r"path must read 'package\.module:Class'"):
        register_converter(GainConfig, "nowhere")
    with pytest.raises(InvalidValueError, match="already has the converter"):
        register_converter(GainConfig, "else.where:Other")


# -------------------------------------------------------------------- targets


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.encoder:
            x = layer(x)
        return self.head(self.norm(x))


def test_targets_are_names_or_patterns():
    model = Model()
    report = mlkit.convert(model, GainConfig(), ["encoder.[01]", "head"])
    assert report.replaced == ["encoder.0", "encoder.1", "head"]
    assert report.skipped == {"encoder.2": "not among the targets"}
    assert type(model.encoder[2]) is nn.Linear
    assert isinstance(report, ConversionReport)


def test_report_is_a_table_with_costs():
    report = mlkit.convert(Model(), GainConfig(), "encoder.0")
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["module", "class", "result"]
    assert "encoder.0   Linear  replaced  20 -> 21    80 -> 84  32 -> 32" in lines[1]
    assert "not among the targets" in lines[2]
    assert lines[-1].startswith("1 replaced")
    assert (report.before.parameters, report.after.parameters) == (20, 21)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("encodr.0", r"'encodr\.0' matches no module; did you mean 'encoder\.0'"),
        (["head", "tail"], r"'tail' matches no module"),
        ("norm", r"matches 1 modules, but none .*'norm', a LayerNorm"),
        ("", "names the model itself"),
        ([], "targets must be 'auto' or names or patterns"),
        ([3], "targets must be 'auto' or names or patterns"),
    ],
)
def test_bad_targets_raise_and_leave_the_model_alone(targets, message):
    model = Model()
    with pytest.raises(InvalidValueError, match=message):
        mlkit.convert(model, GainConfig(), targets)
    assert not conversions(model)
    assert all(type(layer) is nn.Linear for layer in model.encoder)


def test_partial_misses_pass_when_not_strict_and_total_ones_never():
    report = mlkit.convert(Model(), GainConfig(), ["head", "tail"], strict=False)
    assert report.replaced == ["head"]
    with pytest.raises(InvalidValueError, match="matches no module"):
        mlkit.convert(Model(), GainConfig(), ["tail"], strict=False)


def test_refused_modules_raise_or_are_reported():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 13))
    with pytest.raises(InvalidValueError, match=r"1: 13 is unlucky; strict=False leaves"):
        mlkit.convert(model, GainConfig())
    report = mlkit.convert(model, GainConfig(), strict=False)
    assert report.skipped == {"1": "13 is unlucky"}
    with pytest.raises(InvalidValueError, match="13 is unlucky"):
        mlkit.convert(nn.Sequential(nn.Linear(3, 13)), GainConfig(), strict=False)


def test_root_nothing_and_wrong_types_raise():
    with pytest.raises(InvalidValueError, match=r"the model itself \(Linear\).*wrap it"):
        mlkit.convert(nn.Linear(2, 2), GainConfig())
    with pytest.raises(
        InvalidValueError, match=r"nothing to convert in Sequential.*ReLU x2 \(0\), Seq"
    ):
        mlkit.convert(nn.Sequential(nn.ReLU(), nn.ReLU()), GainConfig())
    with pytest.raises(InvalidTypeError, match="must be an nn.Module, got dict"):
        mlkit.convert({}, GainConfig())
    with pytest.raises(InvalidTypeError, match=r"an instance, got the class GainConfig"):
        mlkit.convert(Model(), GainConfig)
    with pytest.raises(InvalidTypeError, match=r"no converter .*dict; known: .*LTEConfig"):
        mlkit.convert(Model(), {})


def test_converted_twice_raises_and_other_targets_do_not():
    model = Model()
    mlkit.convert(model, GainConfig(), "encoder.0")
    with pytest.raises(RunError, match=r"'encoder\.0' is already converted by GainConfig"):
        mlkit.convert(model, GainConfig())
    with pytest.raises(RunError, match="restore"):
        mlkit.convert(model, GainConfig(2.0), "encoder.*")
    mlkit.convert(model, GainConfig(2.0), "encoder.1")
    assert [c.gain for c in conversions(model).values()] == [1.0, 2.0]
    assert mlkit.restore(model) == ["encoder.0", "encoder.1"]
    with pytest.raises(RunError, match="nothing in Model is converted"):
        mlkit.restore(model)


def test_a_subclass_of_a_config_has_its_converter_and_restore_works_in_a_new_parent():
    class Special(GainConfig):
        pass

    model = Model()
    mlkit.convert(model, Special(), "head")
    assert mlkit.restore(nn.Sequential(nn.Identity(), model)) == ["1.head"]


# ----------------------------------------------------------------------- disk


def test_saved_model_keeps_ties_version_and_several_conversions(tmp_path):
    model = Model()
    model.encoder[2].weight = model.encoder[1].weight
    mlkit.convert(model, GainConfig(2.0), "encoder.0")
    mlkit.convert(model, GainConfig(3.0, (1,)), "head")
    save_pretrained(model, tmp_path)
    settings = json.loads((tmp_path / "mlkit.json").read_text())
    assert settings["mlkit_version"] == mlkit.__version__
    assert settings["tied"] == {"encoder.2.weight": "encoder.1.weight"}
    assert [c["targets"] for c in settings["conversions"]] == [["encoder.0"], ["head"]]
    with torch.device("meta"):
        empty = Model()
    load_pretrained(empty, tmp_path)
    assert empty.encoder[2].weight is empty.encoder[1].weight
    x = torch.randn(3, 4)
    assert torch.equal(empty(x), model(x))


def saved(folder, change=lambda settings: None):
    model = Model()
    mlkit.convert(model, GainConfig(), "head")
    save_pretrained(model, folder)
    settings = json.loads((folder / "mlkit.json").read_text())
    change(settings)
    (folder / "mlkit.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=9), "has format 9"),
        (lambda s: s.pop("conversions"), "damaged"),
        (lambda s: s["conversions"][0].update(config_type="os.path.Evil"), "not registered here"),
        (lambda s: s["conversions"][0].update(config={"gian": 1}), "cannot make GainConfig"),
        (lambda s: s["conversions"][0].update(targets=["heed"]), "did you mean 'head'"),
    ],
)
def test_damaged_settings_raise_and_leave_the_model_alone(tmp_path, change, message):
    saved(tmp_path, change)
    model = Model()
    with pytest.raises(MlkitError, match=message):
        load_pretrained(model, tmp_path)
    assert not conversions(model)


def test_files_that_do_not_fit_raise_and_leave_the_model_alone(tmp_path):
    with pytest.raises(InvalidValueError, match=r"has no mlkit\.json"):
        load_pretrained(Model(), tmp_path)
    saved(tmp_path)
    other = Model()
    other.encoder.append(nn.Linear(4, 4))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InvalidValueError, match=r"does not fit the model: (?s:.)*encoder\.3"):
        load_pretrained(other, tmp_path)
    assert not conversions(other)
    assert list(before) == list(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in before.items())
    other = Model()
    other.encoder[0], other.extra = nn.Linear(4, 5), nn.Linear(2, 2)
    other.encoder[1].weight.data.fill_(7)
    message = r"no extra\.weight; no extra\.bias; encoder.*shape \(4, 4\), in the model \(5, 4\)"
    with pytest.raises(InvalidValueError, match=message):
        load_pretrained(other, tmp_path)
    assert (other.encoder[1].weight == 7).all()
    converted = Model()
    mlkit.convert(converted, GainConfig(5.0), "head")
    with pytest.raises(RunError, match=r"gain=5\.0.* in another way .*gain=1\.0"):
        load_pretrained(converted, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"pickle?")
    with pytest.raises(InvalidValueError, match="damaged"):
        load_pretrained(Model(), tmp_path)


def test_state_that_is_no_tensor_and_meta_weights_are_not_saved(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(InvalidValueError, match=r"_extra_state' is a dict; only tensors"):
        save_pretrained(nn.Sequential(Odd(2, 2)), tmp_path)
    with pytest.raises(InvalidValueError, match="meta device"):
        save_pretrained(nn.Linear(2, 2, device="meta"), tmp_path)
