"""Report and RunContext: a run directory is whole, finite, and written by one process."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from mlkit.errors import InvalidValueError
from mlkit.report import Report, RunContext, Table, is_global_zero, write_json

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Memory:
    """A Lightning logger's interface, kept in a list."""

    def __init__(self):
        self.rows, self.saves = [], 0

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))

    def save(self):
        self.saves += 1


# --------------------------------------------------------------------------- report


def test_report_is_written_whole(tmp_path):
    report = Report("A title", facts={"data": "digits"}, verdict=["ours wins by 3 points"])
    report.metric("test_accuracy/ccs/0.9", 0.5)
    report.metric("count", 3)
    report.table("Accuracy", ["method", "0.9"], [["ccs", 50.0], ["random", 47]])
    report.figure("curve", Figure())
    report.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["curve.png", "metrics.json", "report.md"]
    assert json.loads((folder / "metrics.json").read_text()) == {
        "test_accuracy/ccs/0.9": 0.5,
        "count": 3.0,
    }
    assert (folder / "report.md").read_text() == (
        "# A title\n\n"
        "- ours wins by 3 points\n\n"
        "## Accuracy\n\n| method | 0.9 |\n| --- | --- |\n| ccs | 50.0 |\n| random | 47 |\n\n"
        "![curve](curve.png)\n\n"
        "## What was run\n\n| what | value |\n| --- | --- |\n| data | digits |\n"
    )


def test_empty_report_is_its_title(tmp_path):
    report = Report("Nothing")
    report.write(tmp_path)
    assert (tmp_path / "report.md").read_text() == "# Nothing\n"
    assert json.loads((tmp_path / "metrics.json").read_text()) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metric_must_be_finite(value):
    report = Report("t")
    with pytest.raises(InvalidValueError, match="'loss' must be finite, got"):
        report.metric("loss", value)
    assert report.metrics == {}


def test_metric_is_recorded_once():
    report = Report("t")
    report.metric("loss", 1.0)
    with pytest.raises(InvalidValueError, match="'loss' was recorded before"):
        report.metric("loss", 1.0)
    assert report.metrics == {"loss": 1.0}


@pytest.mark.parametrize("row", [[], ["a"], ["a", "b", "c"]])
def test_row_has_one_cell_per_column(row):
    report = Report("t")
    with pytest.raises(InvalidValueError, match=f"'T': a row has {len(row)} cells for 2 columns"):
        report.table("T", ["x", "y"], [["fine", "too"], row])
    assert "T" not in report.markdown()


@given(st.lists(st.lists(st.from_regex(r"\A[\w.% ±-]{1,9}\Z"), min_size=2, max_size=2), max_size=5))
def test_markdown_table_has_the_cells_back(rows):
    lines = Table("t", ["a", "b"], rows).markdown().split("\n")
    assert lines[:2] == ["| a | b |", "| --- | --- |"]
    assert [line[2:-2].split(" | ") for line in lines[2:]] == rows


def test_terminal_shows_tables_and_verdict_as_they_stand(capsys):
    report = Report("t", verdict=["ccs [95 % interval] +3.0"])
    report.table("Accuracy in percent", ["method", "accuracy"], [["ccs", "50.1 ± 0.2"]])
    report.show()
    shown = capsys.readouterr().out
    assert "ccs [95 % interval] +3.0" in shown
    assert "50.1 ± 0.2" in shown


# --------------------------------------------------------------------------- files


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": math.nan})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


# --------------------------------------------------------------------------- units


def test_unit_is_computed_once_and_kept(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"test": 0.25, "note": "text"}

    run = RunContext(tmp_path)
    first = run.unit("fits/ccs/0.9/seed0", compute)
    assert first == run.unit("fits/ccs/0.9/seed0", compute)
    assert first.items() >= {"test": 0.25, "note": "text"}.items()
    assert first["seconds"] >= 0
    stored = json.loads((tmp_path / "units/fits/ccs/0.9/seed0.json").read_text())
    assert stored == first
    assert len(calls) == 1


def test_resumed_run_computes_only_what_is_left(tmp_path):
    RunContext(tmp_path).unit("a/0.7", lambda: {"x": 1})
    resumed = RunContext(tmp_path)
    assert list(resumed.finished) == ["a/0.7"]

    def must_not_run():
        raise AssertionError("computed again")

    assert resumed.unit("a/0.7", must_not_run)["x"] == 1
    assert resumed.unit("a/0.75", lambda: {"x": 2})["x"] == 2
    assert set(RunContext(tmp_path).finished) == {"a/0.7", "a/0.75"}


def test_failing_unit_leaves_nothing_behind(tmp_path):
    run = RunContext(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.unit("a", lambda: {"x": 1 / 0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.unit("b", lambda: {"x": math.nan})
    assert RunContext(tmp_path).finished == {}
    assert not list(tmp_path.rglob("*.partial"))


def test_half_written_unit_is_not_taken_for_a_finished_one(tmp_path):
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "a.json.partial").write_text('{"x"')
    run = RunContext(tmp_path)
    assert run.finished == {}
    assert run.unit("a", lambda: {"x": 1})["x"] == 1


def test_loggers_get_the_numbers_of_each_unit_one_step_further(tmp_path):
    memory = Memory()
    run = RunContext(tmp_path, loggers=[memory])
    run.unit("a", lambda: {"x": 1, "name": "text"})
    run.unit("b", lambda: {"x": 2.5})
    run.log({"own": 3.0})
    assert [step for step, _ in memory.rows] == [0, 1, 2]
    assert memory.rows[0][1] == {"a/x": 1.0, "a/seconds": memory.rows[0][1]["a/seconds"]}
    assert memory.rows[1][1]["b/x"] == 2.5
    assert memory.rows[2][1] == {"own": 3.0}
    assert memory.saves == 3


def test_loggers_of_a_resumed_run_get_the_finished_units_again(tmp_path):
    RunContext(tmp_path).unit("a", lambda: {"x": 1})
    memory = Memory()
    run = RunContext(tmp_path, loggers=[memory])
    run.unit("b", lambda: {"x": 2})
    assert [set(row) for _, row in memory.rows] == [{"a/x", "a/seconds"}, {"b/x", "b/seconds"}]
    assert [step for step, _ in memory.rows] == [0, 1]


# --------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("environment", "writes"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "3", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "5"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
        ({"RANK": ""}, True),
    ],
)
def test_one_process_of_a_launched_job_writes(environment, writes, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_global_zero() is writes


def test_other_ranks_compute_but_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = RunContext(tmp_path)
    assert run.unit("a", lambda: {"x": 1})["x"] == 1
    assert run.finished["a"]["x"] == 1
    assert list(tmp_path.iterdir()) == []


def read_what_rank_zero_wrote(rank, world_size, folder):
    import time
    from pathlib import Path

    def compute():
        if rank == 0:
            time.sleep(0.5)
            (Path(folder) / "scores.txt").write_text("written by 0")
        return {"rank": rank}

    run = RunContext(Path(folder))
    run.unit("score", compute)
    return (Path(folder) / "scores.txt").read_text(), (
        Path(folder) / "units/score.json"
    ).read_text()


def test_files_of_a_unit_are_there_for_every_rank_after_it(tmp_path):
    from tests.helpers.ddp import run_ddp

    first, second = run_ddp(read_what_rank_zero_wrote, 2, str(tmp_path))
    assert first == second
    assert first[0] == "written by 0"
    assert json.loads(first[1])["rank"] == 0
