"""The recipe end to end on tiny sizes: what it records, resumes, refuses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.data.ctr import ctr_loader
from mlkit.data.ctr.synthetic import synthetic
from mlkit.embeddings import dynamic_stores
from mlkit.embeddings.memory import dense_bytes
from mlkit.embeddings.settings import METHODS, FIITEDSettings
from mlkit.errors import InvalidValueError, RunError
from recipes.fiited_dims import chunk_statistics, partial_rank_correlation
from recipes.fiited_memory import peak_memory
from recipes.fiited_networks import network, table_optimizers
from recipes.fiited_report import recovery_rounds
from tests.helpers.data import fixture_overrides
from tests.helpers.runs import compose_job, run_here, run_python

SIZES = [400, 900, 1500, 300]
STREAM = [
    "data.stream.num_samples=12000", f"+data.stream.table_sizes={SIZES}", "data.batch_size=256",
]  # fmt: skip
SMOKE = ["recipe=fiited", "debug=smoke", *STREAM, "fiited.config.prune_every=4"]
SHORT = [*SMOKE, "fiited.methods=[dense,fiited,hashing]", "fiited.memory_steps=1"]
NINE = [m for m in METHODS if m != "magnitude"]

MODEL = {
    "net": {
        "_target_": "mlkit.models.DLRM",
        "embedding_dim": 64,
        "bottom_sizes": [64],
        "top_sizes": [8],
    },
    "dense_optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.001},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_here(
        tmp_path_factory.mktemp("fiited"), *SMOKE, "fiited.byte_fractions=[0.5,0.35]"
    )  # fmt: skip


def test_every_method_has_its_quality_bytes_and_time(finished):
    names = ["dense/1", *(f"{m}/{f}" for m in NINE if m != "dense" for f in (0.5, 0.35))]
    for measure in ("auc", "auc_std", "bytes", "byte_fraction", "weight_fraction", "step_ms"):
        found = {k for k in finished.metrics if k.startswith(f"{measure}/")}
        assert found == {f"{measure}/{n}" for n in names}
    assert all(0 < finished.metrics[f"auc/{n}"] < 1 for n in names)
    assert all(finished.metrics[f"step_ms/{n}"] > 0 for n in names)
    peaks = {k: v for k, v in finished.metrics.items() if k.startswith("peak_rss_bytes/")}
    assert set(peaks) == {f"peak_rss_bytes/{m}" for m in NINE}
    assert all(peak > 2**26 for peak in peaks.values()), "torch alone takes more"
    for ours in ("fiited", "fiited_prefix"):
        others = {m for m in NINE if m not in (ours, "fiited")}
        for fraction in (0.5, 0.35):
            assert {f"auc_difference/{ours}-{m}/{fraction}" for m in others} <= set(
                finished.metrics
            )
    report = (finished.directory / "report.md").read_text()
    assert "auc_and_time.png" in report
    assert (finished.directory / "auc_and_time.png").stat().st_size > 10_000
    assert "synthetic clicks" in report
    assert "0.35: fiited " in report


def test_no_method_has_more_bytes_than_its_budget(finished):
    dense = sum(rows * (64 * 4 + 4) for rows in SIZES)  # a number of row-wise Adagrad for each row
    assert finished.metrics["bytes/dense/1"] == dense
    for method in NINE[1:]:
        for fraction in (0.5, 0.35):
            held = finished.metrics[f"bytes/{method}/{fraction}"]
            assert 0.8 * fraction * dense < held <= fraction * dense, method
            share = finished.metrics[f"byte_fraction/{method}/{fraction}"]
            assert share == pytest.approx(held / dense)
            assert finished.metrics[f"weight_fraction/{method}/{fraction}"] <= fraction * 260 / 256


def test_rounds_are_watched_through_the_drift(finished):
    for method in ("fiited", "fiited_prefix", "adaembed"):
        unit = finished.units[f"{method}/0.5/seed0"]
        assert unit["num_steps"] == 20
        steps = [step for step, _ in unit["coverage"]]
        assert steps == sorted(set(steps))
        assert len(steps) == len(unit["churn"]) > 2
        assert all(0 <= share <= 1 for _, share in unit["coverage"])
        assert finished.metrics[f"recovery_rounds/{method}/0.5"] >= 1
    assert "recovery_rounds/hashing/0.5" not in finished.metrics
    assert finished.metrics["all_or_nothing/adaembed/0.5"] == 1


def test_a_run_goes_on_where_it_stopped_with_the_same_numbers(tmp_path):
    one = run_here(tmp_path / "a", *SHORT)
    units = one.directory / "units"
    (units / "fiited/0.35/seed0.json").unlink()
    kept = units / "dense/1/seed0.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "auc": 0.25}))
    state = json.loads((one.directory / "run.json").read_text())
    (one.directory / "run.json").write_text(json.dumps({**state, "status": "running"}))
    before = one.metrics
    (one.directory / "metrics.json").unlink()
    again = run_here(tmp_path / "a", *SHORT)
    assert again.metrics["auc/dense/1"] == 0.25, "a finished unit is not run again"

    def same(metrics):
        return {k: v for k, v in metrics.items() if "step_ms" not in k and "dense" not in k}

    assert same(again.metrics) == same(before)


@pytest.mark.parametrize("data", ["avazu", "obd"])
def test_other_clicks(data, tmp_path):
    own = fixture_overrides(data, tmp_path / "data")
    run = run_here(
        tmp_path / "run", "recipe=fiited", "debug=smoke", f"data={data}", *own, "model=deepfm",
        "data.batch_size=32", "fiited.methods=[dense]", "fiited.memory_steps=1",
    )  # fmt: skip
    assert 0 <= run.metrics["auc/dense/1"] <= 1


# --------------------------------------------------------------------------- recovery


def rounds_by_hand(coverage, drifts):
    """One round after the other, with a memory of the share before the last drift."""
    counts, back = [], True
    for number, drift in enumerate(drifts):
        before, count, recovered = None, 0, False
        for step, share in coverage:
            if step <= drift:
                before = share
            elif number + 1 < len(drifts) and step > drifts[number + 1]:
                break
            elif not recovered:
                count += 1
                recovered = before is not None and share >= before - 0.01
        if before is not None and count:
            counts.append(count)
            back = back and recovered
    return counts, back


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 20), max_size=12),
    st.lists(st.floats(0.5, 12.5), max_size=3, unique=True).map(sorted),
)
def test_recovery_is_counted_in_rounds(shares, drifts):
    coverage = [(step, share / 20) for step, share in enumerate(shares, 1)]
    assert recovery_rounds(coverage, drifts) == rounds_by_hand(coverage, drifts)


def test_recovery_of_a_known_course():
    course = [(10, 0.9), (20, 0.5), (30, 0.895), (40, 0.9), (50, 0.2), (60, 0.3)]
    assert recovery_rounds(course, [15.0]) == ([2], True)
    assert recovery_rounds(course, [15.0, 45.0]) == ([2, 2], False)
    assert recovery_rounds(course, [5.0, 70.0]) == ([], True)


# --------------------------------------------------------------------------- dimensions


def ranks(values):
    """Mean rank of each value, equal ones together."""
    below = (values[None, :] < values[:, None]).sum(1)
    return below + (values[None, :] == values[:, None]).sum(1) / 2


def test_partial_rank_correlation_is_that_of_residuals():
    rng = np.random.default_rng(0)
    given_ = rng.integers(0, 40, 300)
    x, y = given_ + rng.integers(0, 30, 300), given_ - rng.integers(0, 9, 300)
    design = np.stack([ranks(given_), np.ones(300)], 1)
    left = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in (ranks(x), ranks(y))]
    expected = np.corrcoef(*left)[0, 1]
    assert partial_rank_correlation(x, y, given_) == pytest.approx(expected, abs=1e-9)
    assert partial_rank_correlation(np.ones(300), y, given_) == 0


@pytest.mark.parametrize("method", ["fiited", "adaembed"])
def test_statistics_of_chunks(method):
    stream = synthetic(
        seed=0, num_samples=4000, table_sizes=SIZES, val_fraction=0.1, test_fraction=0.1
    )
    chosen = FIITEDSettings(byte_fractions=0.4, config={"prune_every": 2, "num_chunks": 4})
    sizes = {"table_sizes": SIZES, "num_dense": stream.num_dense}
    net = network(MODEL, sizes, chosen, method, 0.4, 0)
    tables = table_optimizers(net, chosen, method)
    for batch, _ in zip(ctr_loader(stream, "train", 200), range(6), strict=False):
        net(batch["dense"], batch["sparse"]).square().sum().backward()
        for optimizer in tables:
            optimizer.step()
            optimizer.zero_grad()
    found = chunk_statistics(net, stream)
    (store,) = dynamic_stores(net)
    dims = np.concatenate([store.dims(t).numpy() for t in range(len(SIZES))])
    assert found["density"] == pytest.approx(dims.sum() / (64 * sum(SIZES)))
    ends = sum(int(d in (0, 64)) for d in dims)
    assert found["all_or_nothing"] == pytest.approx(ends / sum(SIZES))
    assert (method == "adaembed") == (found["all_or_nothing"] == 1)
    true, often = (np.concatenate(x) for x in (stream.true_dims(), stream.frequency()))
    alone = np.corrcoef(ranks(often), ranks(true))[0, 1]
    assert found["frequency_alone"] == pytest.approx(alone, abs=1e-9)


# --------------------------------------------------------------------------- memory


def peak(rows, methods, **more):
    chosen = {"byte_fractions": 0.1, "methods": methods, "memory_steps": 1}
    chosen["config"] = {"utility_dtype": "uint8"}
    sizes = {"table_sizes": [rows, rows], "num_dense": 4}
    return peak_memory({**MODEL, **more}, sizes, chosen, 0.1, 256)


def test_training_never_holds_the_dense_tables():
    dense = 2 * dense_bytes(800_000, 64, "rowwise_adagrad")  # 0.4 GB
    small = peak(1000, ["dense", "fiited", "hashing"])
    large = peak(800_000, ["dense", "fiited", "hashing"])
    grown = {method: large[method] - small[method] for method in large}
    assert grown["dense"] > 0.95 * dense, "the measure sees tables"
    for method in ("fiited", "hashing"):
        assert 0.08 * dense < grown[method] < 0.25 * dense, method


def test_a_failure_in_the_process_that_is_measured_is_told():
    absent = {**MODEL["net"], "_target_": "mlkit.models.DLMR"}
    with pytest.raises(RunError, match=r"(?s)measures memory failed.*DLMR.*method dense ended"):
        peak(10, ["dense"], net=absent)


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fiited.byte_fractions=35"], r"byte_fractions must be fractions .* in \(0, 1\), got 35"),
        (["fiited.byte_fractions=[]"], "byte_fractions must be fractions"),
        (["fiited.byte_fractions=[0.5,0.5]"], "byte_fractions names one twice"),
        (["fiited.methods=[dense,fited]"], "no fiited.methods 'fited'; did you mean 'fiited'"),
        (["fiited.methods=[fiited]"], "fiited.methods must hold 'dense'"),
        (["+fiited.baselines.caffe.seed=1"], "no fiited.baselines 'caffe'; did you mean 'cafe'"),
        (["fiited.optimizer=adam"], "fiited.optimizer must be rowwise_adagrad, adagrad or sgd"),
        (["~fiited.table_lr.default"], "fiited.table_lr must hold 'default'"),
        (["+fiited.table_lr.fited=1"], "fiited.table_lr must hold 'default', and methods"),
        (["fiited.table_lr.default=0"], "fiited.table_lr must be above 0"),
        (["fiited.num_seeds=0"], "fiited.num_seeds must be at least 1"),
        (["fiited.window=0"], "fiited.window must be at least 1"),
        (["fiited.memory_steps=0"], "fiited.memory_steps must be at least 1"),
        (["fiited.memory_scale=0"], "fiited.memory_scale must be at least 1"),
        (["fiited.max_steps=0"], "fiited.max_steps must be at least 1, got 0"),
        (["fiited.config.hysteresis=-1"], "hysteresis"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(overrides, message, tmp_path):
    with pytest.raises(InvalidValueError, match=message):
        run_here(tmp_path, "recipe=fiited", *overrides)
    assert not (tmp_path / "run.json").exists()


def test_settings_need_no_torch(tmp_path):
    code = (
        "import sys; from mlkit.embeddings.settings import FIITEDSettings; "
        "FIITEDSettings(byte_fractions=[0.5, 0.35]); assert 'torch' not in sys.modules"
    )
    assert run_python("-c", code).returncode == 0
    with compose_job(tmp_path, "recipe=fiited") as cfg:
        assert list(cfg.fiited.methods) == NINE
    chosen = FIITEDSettings(byte_fractions=0.5, table_lr={"default": 0.1, "adaembed": 0.2})
    assert chosen.conversion("dense", 0.5, 0) is None
    rows = chosen.conversion("adaembed", 0.25, 3)
    assert (rows.num_chunks, rows.lr, rows.seed, rows.memory_budget) == (1, 0.2, 3, 0.25)
    assert chosen.conversion("fiited_prefix", 0.5, 0).prefix
    assert not chosen.conversion("fiited", 0.5, 0).prefix
    assert chosen.conversion("magnitude", 0.5, 0).utility == "l2"
