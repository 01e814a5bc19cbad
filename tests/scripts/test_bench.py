"""The benchmark harness, and a tiny run of every subject's cases."""

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlkit.coresets import CCS
from mlkit.coresets.d2 import d2_select
from mlkit.errors import RunError
from scripts import bench
from scripts.bench import Bench, Row, alternate, in_fresh_process
from scripts.benchmarks import _ccs_features, _ccs_recorder, _ccs_selection
from scripts.benchmarks._harness import calling, peak_rss, spread_of

ROOT = Path(__file__).resolve().parents[2]

CASES = {
    "CCS selection of 20,000": {
        "time",
        "speed-up over the slow loop",
        "peak memory of the process, input included",
    },
    "CCS selection of 200,000": {"time", "peak memory of the process, input included"},
    "recorder beside ResNet-18 on cpu, batch 2, C=10": {
        "update / training step",
        "update",
        "training step",
    },
    "recorder alone on cpu, batch 256, C=10": {"update"},
    "recorder alone on cpu, batch 256, C=1000": {"update"},
    "recorder state, CIFAR10: C=10, 200 epochs": {"memory per example"},
    "recorder state, ImageNet: C=1000, 60 epochs": {"memory per example"},
    "forgetting, 3 epochs of 1,000, C=10": {
        "recording forgetting",
        "recording aum + forgetting + el2n",
    },
    "most forgotten of each class, 1,000 examples": {"selection"},
    "coverage_auc, 500 x 100 x 16": {"time", "time (limit: the product)"},
    "D2 greedy choice of 500 of 5,000, 5 neighbours known": {"time"},
}


# ------------------------------------------------------------------------------------------ rows


def test_a_ratio_above_one_means_that_mlkit_is_better():
    time = Row.of("c", "time", 2.0, "s", peer="p", peer_value=6.0, limit=1.0)
    assert (time.ratio, time.limit_ratio) == (3.0, 0.5)
    speed = Row.of(
        "c", "rate", 2.0, "x", peer="p", peer_value=6.0, limit=1.0, higher_is_better=True
    )
    assert (speed.ratio, speed.limit_ratio) == (2 / 6, 2.0)


def test_a_row_without_peer_or_limit_has_no_ratio():
    row = Row.of("c", "time", 2.0, "s")
    assert (row.ratio, row.limit_ratio, row.peer_value) == (None, None, None)


def test_times_give_medians_and_a_row_per_peer():
    seconds = {"mlkit": [1.0, 3.0, 2.0], "a": [4.0, 4.0, 4.0], "b": [1.0, 1.0, 10.0]}
    first, second = Bench().times("c", seconds, unit="ms", limit=1000.0)
    assert (first.value, first.peer, first.peer_value, first.ratio) == (2000.0, "a", 4000.0, 2.0)
    assert (second.peer, second.peer_value, second.ratio) == ("b", 1000.0, 0.5)
    assert first.limit_ratio == 0.5
    assert first.spread == pytest.approx((1400.0, 2600.0))
    assert first.peer_spread == pytest.approx((4000.0, 4000.0))


def test_times_without_a_peer_give_one_row():
    (row,) = Bench().times("c", {"mlkit": [1.0]})
    assert (row.value, row.peer, row.spread) == (1.0, None, None)


@pytest.mark.parametrize("samples", [[1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], list(range(100))])
def test_the_spread_is_numpys_percentiles(samples):
    assert spread_of(samples) == pytest.approx(tuple(np.quantile(samples, [0.2, 0.8])))


# ----------------------------------------------------------------------------------- alternating


def test_providers_alternate_after_a_warm_up():
    calls = []
    seconds = alternate(
        {"a": calling(calls.append, "a"), "b": calling(calls.append, "b")}, 3, warmup=2
    )
    assert calls == ["a", "b"] * 5
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for taken in seconds.values() for value in taken)


def test_a_provider_may_time_itself():
    own = iter([9.0, 1.0, 2.0])
    assert alternate({"a": lambda: next(own)}, 2)["a"] == [1.0, 2.0]


def test_garbage_collection_is_back_after_a_failure():
    def fail():
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        alternate({"a": fail}, 1)
    assert gc.isenabled()


def test_providers_that_disagree_are_refused():
    with pytest.raises(RunError, match="disagree: counts"):
        Bench().check(False, "counts")


# --------------------------------------------------------------------------------- own processes


def test_a_fresh_process_reports_its_own_peak():
    target = "scripts.benchmarks._ccs_selection:measure"
    ballast = np.ones(60_000_000)  # What this process holds must not count for the child.
    assert peak_rss() > ballast.nbytes
    small = in_fresh_process(target, method="ours", n=1_000)
    large = in_fresh_process(target, method="ours", n=10_000_000)
    assert small["num_selected"] == 100
    assert small["peak_bytes"] < ballast.nbytes / 2
    assert large["peak_bytes"] - small["peak_bytes"] > 40_000_000  # The input alone.


def test_a_failing_process_surfaces_its_traceback():
    with pytest.raises(RunError, match="KeyError: 'nonsense'"):
        in_fresh_process("scripts.benchmarks._ccs_selection:measure", method="nonsense", n=10)


# ---------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("arguments", [["cc"], ["_harness"], []])
def test_an_unknown_name_lists_what_exists(arguments, capsys):
    assert bench.main(arguments) == 2
    assert "known: ccs" in capsys.readouterr().err


def test_list(capsys):
    assert bench.main(["--list"]) == 0
    assert "ccs" in capsys.readouterr().out.split()


def test_a_failing_subject_leaves_the_file(tmp_path, monkeypatch, capsys):
    def fail(name, given):
        raise RunError("the peer fell over")

    for variable in ("OMP", "MKL", "OPENBLAS", "NUMBA"):  # Set by main, put back by monkeypatch.
        monkeypatch.setenv(f"{variable}_NUM_THREADS", "1")
    monkeypatch.setattr(bench, "_run", fail)
    path = tmp_path / "b.json"
    path.write_text("before")
    assert bench.main(["ccs", "--json", str(path)]) == 1
    assert path.read_text() == "before"
    assert "the peer fell over" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "ccs", "--quick"]
    done = subprocess.run(
        [*command, "--json", "out/b.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / "b.json").read_text()), done


def test_the_file_says_where_the_numbers_come_from(quick):
    content, _ = quick
    assert content["subject"] == "ccs"
    assert content["quick"] is True
    assert {"hardware", "torch", "mlkit", "commit", "date", "threads", "rows"} <= set(content)
    assert {"cpu", "cores", "memory_gib"} <= set(content["hardware"])
    assert all(set(row) == set(Row.__dataclass_fields__) for row in content["rows"])


def test_a_quick_run_yields_every_case(quick):
    content, _ = quick
    found: dict[str, set[str]] = {}
    for row in content["rows"]:
        if "cuda" not in row["case"] and "facility" not in row["case"]:
            found.setdefault(row["case"], set()).add(row["metric"])
    assert found == CASES


def test_quick_rows_are_finite_and_consistent(quick):
    content, _ = quick
    for row in content["rows"]:
        assert 0 < row["value"] < math.inf, row
        for other, ratio in (("peer_value", "ratio"), ("limit", "limit_ratio")):
            assert (row[other] is None) == (row[ratio] is None), row
            if row[other] is not None:
                smaller = row[other] / row["value"]
                assert row[ratio] == pytest.approx(smaller) or row[ratio] == pytest.approx(
                    1 / smaller
                ), row
        assert (row["peer"] is None) == (row["peer_value"] is None), row


def test_the_terminal_shows_the_table_and_what_is_missing(quick):
    content, done = quick
    assert "ratio > 1 means that mlkit is better" in done.stdout
    if not any("facility" in row["case"] for row in content["rows"]):
        assert "apricot-select is not installed" in done.stderr


# --------------------------------------------------------------------------------- peers are fair


@pytest.mark.parametrize("n", [1_000, 12_345])
def test_plain_numpy_fills_the_strata_as_ccs_does(n):
    scores = _ccs_selection.scores_like_aum(n)
    report = CCS(prune_rate=0.9, cutoff=0.3).select(scores, hard="low").report
    chosen = _ccs_selection.plain_numpy(scores)
    edges = [stratum["low"] for stratum in report["strata"]] + [np.inf]
    counts = np.histogram(scores[chosen], bins=edges)[0]
    assert len(np.unique(chosen)) == len(chosen) == n // 10
    # Bins are computed in float32 there and float64 here, which can move an example on an edge.
    budgets = [stratum["budget"] for stratum in report["strata"]]
    assert np.abs(counts - budgets).sum() <= 2


def test_scores_have_the_range_of_aum():
    scores = _ccs_selection.scores_like_aum(50_000)
    assert scores.dtype == np.float32
    assert -1 <= scores.min() < -0.99 < 0.99 < scores.max() <= 1
    assert np.median(scores) > 0.5


def test_deepcores_bookkeeping_counts_a_fall_from_right_to_wrong():
    plain = _ccs_recorder.PlainForgetting(2)
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for logits in (right, wrong, wrong, right, wrong):
        plain.update(torch.tensor([1]), logits, torch.tensor([0]))
    assert plain.events.tolist() == [0.0, 2.0]
    assert plain.select(np.array([0, 0]), rate=0.5).tolist() == [1]


def test_the_argmax_loop_is_d2s_rule():
    rng = np.random.default_rng(0)
    neighbors = (
        np.arange(200)[:, None] + rng.permuted(np.tile(np.arange(1, 9), (200, 1)), axis=1)[:, :5]
    ) % 200
    hardness, distances = rng.random(200), rng.random((200, 5))
    expected = d2_select(hardness, neighbors, distances, 50)
    assert (_ccs_features.argmax_loop(hardness, neighbors, distances, 50) == expected).all()


def test_lte_rows_cover_kernel_packed_layers_and_a_model(capsys):
    from mlkit_kernels.sparse_mlp import available_backends
    from scripts.benchmarks import lte

    if "cpp" not in available_backends("cpu"):
        pytest.skip("no C++ compiler")
    found = list(lte.rows(Bench(quick=True)))
    groups = ("decode of a layer", "packed layer, auto, 64 x 256", "packed layer, auto, 128 x 512",
              "decode of a Llama")  # fmt: skip
    counts = {g: sum(row.case.startswith(g) for row in found) for g in groups}
    assert counts == dict(zip(groups, (8, 32, 8, 8), strict=True))
    for row in found:
        assert row.ratio == pytest.approx(
            row.value / row.peer_value if row.unit == "tokens/s" else row.peer_value / row.value
        )
        assert row.limit_ratio is not None
    assert all("best dense" in row.peer for row in found[:8])
    auto = [row for row in found if row.case.startswith("packed layer")]
    # the limit is the stock layer's time and 3 %
    assert all(row.limit == pytest.approx(row.peer_value / 0.97) for row in auto)
    if not torch.cuda.is_available():
        assert "no CUDA device here" in capsys.readouterr().err


def test_lte_rows_of_a_gpu_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = (
        "import torch\n"
        "from scripts.bench import Bench\n"
        "from scripts.benchmarks._lte_gpu import layer_rows\n"
        "for row in layer_rows(Bench(quick=True), torch.device('cpu')): print(row.case, row.peer)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1",
             "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(" 1 tokens" in line for line in lines) == 5 * 4
    assert sum(" 17 tokens" in line for line in lines) == 5 * 3
    for peer in ("F.linear", "torch.compile", "index_select", "TEAL", "masked dense"):
        assert any(line.rpartition("router ")[2].count(peer) for line in lines), peer


def test_embeddings_rows_cover_steps_options_rounds_and_memory(capsys):
    from scripts.benchmarks import embeddings
    from scripts.benchmarks._embeddings_case import has_fbgemm

    found = list(embeddings.rows(Bench(quick=True)))
    groups = {
        "3 tables": 72 + 70 * has_fbgemm(),
        "utilities in a step": 8,
        "options of a store": 10,
        "pruning round": 10,
        "training of": 6,
    }
    counts = {g: sum(row.case.startswith(g) for row in found) for g in groups}
    assert counts == groups
    for row in found:
        assert 0 < row.value < math.inf, row
        assert (row.peer is None) == (row.ratio is None), row
    round_parts = {r.metric for r in found if r.case.startswith("pruning round")}
    assert {"CPU time of threshold and candidates", "CPU time of moving"} <= round_parts
    assert "no CUDA device" in capsys.readouterr().err or torch.cuda.is_available()


def test_embeddings_rows_of_a_gpu_run_on_a_cpu_too():
    from scripts.benchmarks._embeddings_case import Case
    from scripts.benchmarks._embeddings_gpu import case_rows

    found = list(case_rows(Bench(quick=True), Case(tables=3, rows=100, dim=8, batch=16), "cpu"))
    assert {row.metric for row in found} == {"training step", "inference"}
    assert len(found) == 8
    assert all(row.limit == 1.3 * row.peer_value for row in found)


def test_embeddings_that_do_not_fit_are_fewer_tables(monkeypatch, capsys):
    from scripts.benchmarks import _embeddings_room as room
    from scripts.benchmarks._embeddings_case import Case

    case = Case(tables=26, rows=10, dim=8, batch=16)
    monkeypatch.setattr(room, "_available", lambda: room._SLACK + 2500)
    assert room.fitting(Bench(quick=True), case, 1000).tables == 2
    assert "2 tables are measured" in capsys.readouterr().err
    assert room.fitting(Bench(quick=True), case, 10) is case
    monkeypatch.setattr(room, "_available", lambda: None)
    assert room.fitting(Bench(quick=True), case, 10**15) is case


def test_zipf_ids_are_popular_anywhere_and_in_range():
    from scripts.benchmarks._embeddings_case import IDS, Case, batches

    case = Case(tables=2, rows=1000, dim=8, batch=4000)
    uniform, zipf = (torch.bincount(batches(case, ids, 1)[0], minlength=1000) for ids in IDS)
    assert len(zipf) == len(uniform) == 1000
    share = 1 / sum(rank**-1.05 for rank in range(1, 1001))
    assert int(zipf.max()) == pytest.approx(8000 * share, rel=0.15)
    assert int(uniform.max()) < 40
