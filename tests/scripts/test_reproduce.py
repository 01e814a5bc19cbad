"""Reproducing claims: runs, what is stored of them, and the documents made of it."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import mlkit
from mlkit.report import Report, Table
from scripts import reproduce
from scripts.claims._claim import Claim, Figure, all_claims
from scripts.claims._documents import END, START, render
from scripts.claims.ccs import table, verdict

ROOT = Path(__file__).resolve().parents[2]

METRIC = "test_accuracy_difference/ccs-random/0.9"
LOW, HIGH = (METRIC.replace("difference", f"difference_{end}") for end in ("low", "high"))
FIGURE = Figure("CCS against a random subset", METRIC, "+7.04 points (abstract)", is_headline=True)

TRAIN = textwrap.dedent('''
    """Stands in for train.py: writes what a finished run leaves behind."""
    import json, sys
    from datetime import datetime, UTC
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from mlkit.report import Report
    values = dict(a.split("=", 1) for a in sys.argv[1:])
    if "fail" in values:
        print("about to fail")
        raise RuntimeError("no such thing as " + values["fail"])
    folder = Path(values["hydra.run.dir"])
    report = Report("r", metrics={{"{metric}": 0.05, "{low}": 0.01, "{high}": 0.09}})
    report.facts |= {{"data": "digits (mlkit.data.digits.digits)", "seeds": "0, 1, 2 (init)"}}
    report.write(folder)
    for key, seconds in (("full/seed0", 1.5), ("fits/ccs/0.9/seed0", 2.0)):
        path = folder / "units" / f"{{key}}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({{"seconds": seconds}}))
    state = folder / "run.json"
    if not state.is_file():
        started = values.get("started", datetime.now(UTC).isoformat(timespec="seconds"))
        state.write_text(json.dumps({{"started": started, "mlkit": "0.0.9",
                                     "git": {{"commit": "0123456789abcdef"}}}}))
    print("a run of", values)
''')  # fmt: skip


def claim(name="sys-one", **changes):
    settings = {
        "system": "sys",
        "title": "One thing is above another",
        "overrides": ("recipe=sys",),
        "paper": (FIGURE,),
        "verdict": lambda metrics: f"The difference is {metrics[METRIC]:.3f}.",
        "table": lambda metrics: Table("Numbers", ["name"], [[name] for name in metrics]),
    }
    return Claim(name=name, **{**settings, **changes})


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    script = TRAIN.format(root=str(ROOT), metric=METRIC, low=LOW, high=HIGH)
    (folder / "train.py").write_text(script)
    return folder


@pytest.fixture
def run(clone, tmp_path):
    """Run the command line on made-up claims; return its exit status."""

    def call(*argv, claims):
        return reproduce.main(list(argv), claims=claims, clone=clone, documents=tmp_path)

    return call


def stored(tmp_path, name="sys-one"):
    return json.loads((tmp_path / "docs" / "results" / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------ runs


def test_a_run_is_stored_with_all_that_is_known_of_it(run, tmp_path):
    assert run("sys", claims=[claim()]) == 0
    result = stored(tmp_path)
    assert result["command"] == (
        "python train.py recipe=sys hydra.run.dir=outputs/reproduce/sys-one"
    )
    assert result["data"] == "digits (mlkit.data.digits.digits)"
    assert result["seeds"] == [0, 1, 2]
    assert result["seconds"] == 3.5
    assert result["metrics"][METRIC] == 0.05
    assert result["mlkit"] == mlkit.__version__
    assert {"hardware", "torch", "commit", "date"} <= set(result)


def test_a_run_that_was_finished_before_keeps_its_version_and_day(run, tmp_path):
    old = claim(overrides=("recipe=sys", "started=2001-02-03T04:05:06+00:00"))
    assert run(claims=[old]) == 0
    result = stored(tmp_path)
    assert result["mlkit"] == "0.0.9"
    assert result["commit"] == "0123456789ab"
    assert result["date"] == "2001-02-03"


def test_a_failing_run_shows_its_output_and_changes_no_file(run, tmp_path, capsys):
    assert run(claims=[claim()]) == 0
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in _files(tmp_path / "docs")}
    capsys.readouterr()
    assert run(claims=[claim(overrides=("fail=this",))]) == 1
    shown = capsys.readouterr().err
    assert "about to fail" in shown
    assert "RuntimeError: no such thing as this" in shown
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in _files(tmp_path / "docs")}
    assert after == before


def test_one_failure_does_not_stop_the_others(run, tmp_path):
    claims = [claim("sys-bad", overrides=("fail=this",)), claim("sys-good")]
    assert run(claims=claims) == 1
    assert stored(tmp_path, "sys-good")["metrics"]
    assert not (tmp_path / "docs" / "results" / "sys-bad.json").exists()
    assert "sys-good.json" in (tmp_path / "docs" / "RESULTS.md").read_text()


def test_what_cannot_run_here_is_listed_and_not_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path / "empty"))
    claims = [
        claim("sys-heavy", is_heavy=True, needs_data="cifar10"),
        claim("sys-fetch", needs_data="fashion_mnist"),
    ]
    assert run(claims=claims) == 0
    shown = capsys.readouterr().out
    assert "sys-heavy: not run here: needs your own copy of the data and a GPU" in shown
    assert "python scripts/fetch_data.py fashion_mnist" in shown
    assert run("--all", "sys-heavy", claims=claims) == 0
    assert "put your copy of cifar10 into $MLKIT_DATA" in capsys.readouterr().out
    text = (tmp_path / "docs" / "RESULTS.md").read_text()
    assert text.count("not run here: needs your own copy of the data and a GPU") == 1
    assert "not run yet" in text


def test_all_runs_what_is_heavy_when_its_data_are_there(run, tmp_path, monkeypatch):
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path / "data"))
    assert run("--all", claims=[claim(is_heavy=True, needs_data="cifar10")]) == 0
    assert stored(tmp_path)["metrics"]


def test_names_choose_systems_and_claims(run, tmp_path):
    claims = [claim("a-one", system="a"), claim("a-two", system="a"), claim("b-one", system="b")]
    assert run("a-two", "b", claims=claims) == 0
    names = {p.stem for p in (tmp_path / "docs" / "results").glob("*.json")}
    assert names == {"a-two", "b-one"}


def test_an_unknown_name_lists_what_exists(capsys):
    assert reproduce.main(["ccs-digit"]) == 2
    shown = capsys.readouterr().err
    assert "did you mean 'ccs-digits'" in shown
    assert "ccs-cifar100" in shown


def test_list_names_every_claim(capsys):
    assert reproduce.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(c.name in shown for c in all_claims())
    assert "needs your own copy of the data and a GPU" in shown


def test_facts_are_read_from_a_report():
    report = Report("Title", facts={"data": "digits (a | b)", "steps": "700"})
    report.table("Numbers", ["name", "value"], [["a", "1"]])
    facts = reproduce.read_facts(report.markdown())
    assert facts == {"data": "digits (a | b)", "steps": "700"}


# ------------------------------------------------------------------------------------- documents


def bench_file(**changes):
    row = {
        "case": "select 10", "metric": "time", "value": 0.5, "unit": "s", "peer": "loop",
        "peer_value": 2.0, "ratio": 4.0, "limit": 0.1, "limit_ratio": 0.2, "spread": [0.4, 0.6],
        "peer_spread": None,
    }  # fmt: skip
    return {
        "subject": "ccs", "hardware": {"cpu": "Chip", "cores": 2, "memory_gib": 4.0},
        "torch": "2", "mlkit": "1", "commit": "abc", "date": "2030-01-01", "threads": 1,
        "quick": False, "rows": [row], **changes,
    }  # fmt: skip


def result_file(low=0.01, high=0.09):
    return {
        "claim": "sys-one", "system": "sys", "title": "t", "command": "python train.py recipe=sys",
        "data": "digits (source, sha256 0123)", "seeds": [0, 1, 2], "seconds": 3.5,
        "facts": {"data": "digits (source, sha256 0123)", "steps": "700"},
        "hardware": {"cpu": "Chip", "cores": 2, "memory_gib": 4.0, "gpu": "Card"},
        "torch": "2", "mlkit": "1", "commit": None, "date": "2030-01-01",
        "metrics": {METRIC: 0.05, LOW: low, HIGH: high},
    }  # fmt: skip


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    (folder / "sys-one.json").write_text(json.dumps(result_file()))
    (folder / "bench-ccs.json").write_text(json.dumps(bench_file()))
    return tmp_path


def test_results_hold_the_claim_its_run_and_the_benchmark(documents):
    render(documents, [claim(), claim("sys-two")])
    text = (documents / "docs" / "RESULTS.md").read_text()
    assert (
        "| CCS against a random subset (sys-one) | +7.04 points (abstract) | +5.0 points | digits |"
        " 3 seeds, 95 %: +1.0 to +9.0 | same direction |"
    ) in text
    assert "The difference is 0.050." in text
    assert "| data | digits (source, sha256 0123) |" in text
    assert "Chip, 2 cores, 4.0 GiB, Card" in text
    assert "| CCS against a random subset (sys-two) |" in text
    assert "not run yet" in text
    assert r"| select 10 | time | 0.5 s \[0.4, 0.6\] | loop | 2 | 4 | 0.1 | 0.2 |" in text


def test_rendering_again_changes_nothing(documents):
    readme = documents / "README.md"
    readme.write_text(f"# Top\n\n{START}\nold\n{END}\n\nBottom\n")
    assert reproduce.main(["--render"], claims=[claim()], documents=documents) == 0
    first = (readme.read_text(), (documents / "docs" / "RESULTS.md").read_text())
    assert reproduce.main(["--render"], claims=[claim()], documents=documents) == 0
    assert (readme.read_text(), (documents / "docs" / "RESULTS.md").read_text()) == first


def test_the_readme_keeps_what_is_outside_the_block(documents):
    readme = documents / "README.md"
    readme.write_text(f"# Top\n\n{START}\nold\n{END}\n\nBottom\n")
    render(documents, [claim(), claim("sys-two")])
    text = readme.read_text()
    assert text.startswith(f"# Top\n\n{START}\n")
    assert text.endswith(f"{END}\n\nBottom\n")
    assert "old" not in text
    assert "+5.0 points | sys-one, 3 seeds, 95 %: +1.0 to +9.0 | same direction" in text
    assert "| select 10 | time | 0.5 s | loop | 2 | 4 |" in text
    assert "sys-two" not in text


@pytest.mark.parametrize("text", ["# Top\n", f"# Top\n{START}\n"])
def test_a_readme_without_both_markers_stays_as_it_is(documents, text):
    (documents / "README.md").write_text(text)
    assert render(documents, [claim()]) == [documents / "docs" / "RESULTS.md"]
    assert (documents / "README.md").read_text() == text


def test_a_quick_benchmark_is_marked_and_kept_out_of_the_readme(documents):
    path = documents / "docs" / "results" / "bench-ccs.json"
    path.write_text(json.dumps(bench_file(quick=True)))
    (documents / "README.md").write_text(f"{START}{END}")
    render(documents, [claim()])
    assert "no measurement" in (documents / "docs" / "RESULTS.md").read_text()
    assert "select 10" not in (documents / "README.md").read_text()


def test_rendering_without_any_result(tmp_path):
    (tmp_path / "README.md").write_text(f"{START}{END}")
    render(tmp_path, [claim()])
    assert "not run yet" in (tmp_path / "docs" / "RESULTS.md").read_text()
    assert "Nothing has been measured yet." in (tmp_path / "README.md").read_text()


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (0.01, 0.09, 1, "same direction"),
        (-0.01, 0.09, 1, "no difference shown"),
        (0.0, 0.0, 1, "no difference shown"),
        (-0.09, -0.01, 1, "opposite direction"),
        (-0.09, -0.01, -1, "same direction"),
        (0.01, 0.09, -1, "opposite direction"),
    ],
)
def test_the_verdict_of_a_figure_follows_its_interval(low, high, sign, expected):
    figure = Figure("w", METRIC, "p", sign=sign)
    assert figure.verdict({METRIC: (low + high) / 2, LOW: low, HIGH: high}) == expected


def test_the_verdict_of_a_figure_without_an_interval():
    figure = Figure("w", METRIC, "p", terms=("test_accuracy/ccs/0.9", "test_accuracy/random/0.9"))
    assert figure.verdict({}) == "not measured"
    assert figure.verdict({METRIC: -0.1}) == "not the same direction, no interval"
    one_seed = {"test_accuracy/ccs/0.9": 0.8, "test_accuracy/random/0.9": 0.7}
    assert figure.value(one_seed) == pytest.approx(0.1)
    assert figure.verdict(one_seed) == "same direction, no interval"


def test_the_verdict_of_ccs_sorts_the_rates():
    metrics = {}
    for rate, low, high in (("0.7", -0.2, -0.1), ("0.9", -0.1, 0.1), ("0.95", 0.1, 0.2)):
        for end, value in (("", (low + high) / 2), ("_low", low), ("_high", high)):
            metrics[f"test_accuracy_difference{end}/ccs-hardest/{rate}"] = value
    assert verdict(metrics) == (
        "CCS is below hardest at 0.7, not told apart from hardest at 0.9, above hardest at 0.95 "
        "pruned."
    )
    assert verdict({"test_accuracy/ccs/0.9": 0.5}) == "One seed has no interval: see the table."


def test_the_table_of_ccs_orders_the_rates():
    shown = table(
        {
            "test_accuracy/full/0": 0.98,
            "test_accuracy_std/full/0": 0.01,
            "test_accuracy/ccs/0.95": 0.5,
            "test_accuracy/ccs/0.9": 0.625,
            "cutoff/ccs/0.9": 0.3,
            "val_accuracy/ccs/0.9": 0.1,
        }
    )
    assert shown.columns == ["method", "nothing pruned", "0.9 pruned", "0.95 pruned"]
    assert shown.rows == [["full", "98.0 ± 1.0", "", ""], ["ccs", "", "62.5 (cutoff 0.3)", "50.0"]]


# ------------------------------------------------------------------------------- declared claims


def test_names_of_claims_are_unique_and_begin_with_their_system():
    names = [c.name for c in all_claims()]
    assert len(set(names)) == len(names)
    assert all(c.name.startswith(f"{c.system}-") for c in all_claims())


@pytest.mark.parametrize(
    "declared", [c for c in all_claims() if c.system == "ccs"], ids=lambda c: c.name
)
def test_the_figures_of_ccs_are_metrics_that_its_run_records(declared):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides=list(declared.overrides))
    for figure in declared.paper:
        _, comparison, rate = figure.metric.split("/")
        assert comparison.removeprefix("ccs-") in cfg.ccs.methods
        assert float(rate) in cfg.ccs.prune_rate
        assert figure.terms is not None


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_real_run_is_stored(tmp_path):
    overrides = ("recipe=ccs", "debug=smoke", "ccs.num_seeds=2")
    real = claim("test-smoke", overrides=overrides, table=table, verdict=verdict)
    shutil.rmtree(ROOT / real.run_directory, ignore_errors=True)
    try:
        assert reproduce.main([], claims=[real], documents=tmp_path) == 0
    finally:
        shutil.rmtree(ROOT / real.run_directory, ignore_errors=True)
    result = stored(tmp_path, "test-smoke")
    assert result["seeds"] == [0, 1]
    assert result["data"].startswith("digits")
    assert FIGURE.interval(result["metrics"]) is not None
    assert "Test accuracy %" in (tmp_path / "docs" / "RESULTS.md").read_text()
