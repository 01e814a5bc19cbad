"""The recipe end to end on tiny sizes: what it records, resumes, refuses."""

import json

import pytest
import torch

from mlkit.convert import conversions, load_pretrained
from mlkit.errors import InvalidValueError
from mlkit.models import causal_lm
from mlkit.sparsity import LTEConfig, lte_layers
from mlkit.sparsity.settings import METHODS, LTESettings
from recipes.lte_decode import DecodeTimes
from tests.helpers.runs import compose_job, run_here, run_python

SHORT = [
    "recipe=lte", "lte.start_steps=3", "lte.steps=8", "lte.calibration_batches=2",
    "lte.decode.hidden_size=64", "lte.decode.intermediate_size=128", "lte.decode.repeats=2",
    "lte.config.expert_size=8", "data.batch_size=16", "model.net.config.num_hidden_layers=2",
    "model.net.config.hidden_size=32", "model.net.config.intermediate_size=64",
    "model.net.config.num_attention_heads=2", "model.net.config.num_key_value_heads=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    every = f"lte.methods=[{','.join(METHODS)}]"
    return run_here(
        tmp_path_factory.mktemp("lte"), *SHORT, every, "lte.num_seeds=2",
        "lte.target_sparsity=[0.5,0.75]",
    )  # fmt: skip


def test_every_method_has_its_quality_sparsity_and_time(finished):
    names = ["dense/0", *(f"{m}/{t}" for m in METHODS if m != "dense" for t in (0.5, 0.75))]
    for measure in ("quality", "ffn_sparsity", "decode_ms", "decode_speedup"):
        assert {f"{measure}/{n}" for n in names} <= set(finished.metrics)
    assert all(finished.metrics[f"decode_ms/{n}"] > 0 for n in names)
    assert finished.metrics["ffn_sparsity/dense/0"] == 0
    assert -6 < finished.metrics["quality/dense/0"] < -2, "between uniform bytes and trained"
    for method in ("magnitude", "moefication"):
        assert finished.metrics[f"ffn_sparsity/{method}/0.5"] == pytest.approx(0.5, abs=0.05)
    for low in (0.5, 0.75):
        name = f"lte-random_router/{low}"
        ends = [finished.metrics[f"quality_difference{e}/{name}"] for e in ("_low", "", "_high")]
        assert ends == sorted(ends)
    report = (finished.directory / "report.md").read_text()
    assert "quality_and_layers.png" in report
    assert "pydoc" in report
    assert "0.75: lte skips" in report


def test_flops_follow_from_the_measured_sparsity(finished):
    """Blocks of Llama with 32 and 64: attention 4 H^2, feed-forward 3 H I, router H N."""
    for name in ("lte/0.5", "random_router/0.75"):
        sparsity = finished.metrics[f"ffn_sparsity/{name}"]
        attention, ffn, router = 4 * 32**2, 3 * 32 * 64, 32 * 8
        share = (attention + ffn * (1 - sparsity) + router) / (attention + ffn)
        assert finished.metrics[f"flops_fraction/{name}"] == pytest.approx(share, abs=1e-4)


def test_trained_routers_moved_and_fixed_ones_did_not(finished):
    def routers(key):
        net = causal_lm(config=_config(), vocab_size=258)
        load_pretrained(net, finished.directory / "models" / key)
        assert {layer.mode for layer in lte_layers(net).values()} == {"hard"}
        return [layer.router.weight.detach() for layer in lte_layers(net).values()], net

    fixed, net = routers("fixed_router/0.5/seed0")
    trained, _ = routers("lte/0.5/seed0")
    random, _ = routers("random_router/0.5/seed0")
    assert len(conversions(net)) == 2
    for rows in fixed:
        torch.testing.assert_close(rows.norm(dim=1), torch.full((8,), 3.0))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(trained, fixed, strict=True))
    assert all((rows.abs() <= 32**-0.5).all() for rows in random)


def _config():
    return {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip


def test_a_run_goes_on_where_it_stopped_with_the_same_numbers(finished, tmp_path):
    one = run_here(tmp_path / "a", *SHORT)
    units = one.directory / "units"
    for unit in ("lte/0.75/seed0", "decode/lte/0.75", "magnitude/0.75/seed0"):
        (units / f"{unit}.json").unlink()
    state = json.loads((one.directory / "run.json").read_text())
    (one.directory / "run.json").write_text(json.dumps({**state, "status": "running"}))
    before = one.metrics
    (one.directory / "metrics.json").unlink()
    again = run_here(tmp_path / "a", *SHORT)

    def same(metrics):
        return {k: v for k, v in metrics.items() if not k.startswith("decode")}

    assert same(again.metrics) == same(before)
    assert run_here(tmp_path / "b", *SHORT).units["lte/0.75/seed0"] == again.units["lte/0.75/seed0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lte.target_sparsity=75"], r"target_sparsity must be in \(0, 1\), got 75"),
        (["lte.target_sparsity=[]"], "must name each sparsity once"),
        (["lte.target_sparsity=[0.5,0.5]"], "must name each sparsity once"),
        (["lte.methods=[dense,lte,magnitud]"], "did you mean 'magnitude'"),
        (["lte.methods=[magnitude]"], "must have dense and lte"),
        (["lte.steps=1"], "lte.steps must be an integer of at least 2, got 1"),
        (["lte.lr=0"], "lte.lr must be a number above 0"),
        (["lte.stage1_fraction=1"], r"lte.stage1_fraction must be in \(0, 1\)"),
        (["+lte.config.expert_sise=8"], "did you mean 'expert_size'"),
        (["lte.config.expert_size=0"], "expert_size must be at least 1, got 0"),
        (["lte.decode.repeats=0"], "lte.decode.repeats must be an integer above 0"),
        (["lte.decode.expert_size=48"], "expert_size must divide intermediate_size"),
        (["+lte.decode.width=8"], "no lte.decode.width"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(overrides, message, tmp_path):
    with pytest.raises(InvalidValueError, match=message):
        run_here(tmp_path, "recipe=lte", *overrides)
    assert not (tmp_path / "run.json").exists()


def test_an_expert_size_that_does_not_fit_the_model_names_what_does(tmp_path):
    with pytest.raises(InvalidValueError, match="expert_size must divide the intermediate size"):
        run_here(tmp_path, *SHORT, "lte.config.expert_size=24")


def test_settings_need_no_torch(tmp_path):
    code = (
        "import sys; from mlkit.sparsity.settings import LTESettings; "
        "LTESettings(target_sparsity=[0.5]); assert 'torch' not in sys.modules"
    )
    assert run_python("-c", code).returncode == 0
    with compose_job(tmp_path, "recipe=lte") as cfg:
        assert cfg.lte.config.expert_size == 16
    literal = LTESettings(target_sparsity=0.5).lte_config("lte_literal", 0.5, 0)
    assert literal == LTEConfig.paper_literal(target_sparsity=0.5)
    assert LTESettings(target_sparsity=0.5).lte_config("random_router", 0.5, 3).seed == 3


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_what_is_timed_computes_the_layer(sparsity):
    """The kernel with its share of experts, TEAL's columns with theirs, against the dense layer."""
    timed = DecodeTimes(64, 256, 16, 1)
    layer = timed.layers[0]
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        dense = layer.linear(x)
        torch.testing.assert_close(layer.mv(x[0])[None], dense, rtol=1e-4, atol=1e-5)
        if sparsity == 0:
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(layer.kernel(x, 0.0)(), dense, **close)
            torch.testing.assert_close(layer.columns(x[0], 0.0, 0.0)()[None], dense, **close)
        else:
            logits = (x @ layer.packed[0].T)[0]
            kept = logits.topk(16 - round(sparsity * 16)).indices
            chosen = torch.zeros(16, 16).index_fill(0, kept, 1).flatten()
            gate, up, down = layer.weights
            h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) * chosen
            torch.testing.assert_close(
                layer.kernel(x, sparsity)(), h @ down.T, rtol=1e-4, atol=1e-5
            )
    found = timed.measure("lte", sparsity, 0.0)
    assert found["ms"] > 0
    assert found["dense_ms"] > 0
