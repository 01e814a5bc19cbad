"""Whole runs: what they leave; interrupted, repeated, staged and distributed ones agree."""

import json
import os
from pathlib import Path

import pytest

from mlkit.cli import prepare
from mlkit.coresets import ScoreTable
from mlkit.errors import InvalidValueError, RunError
from tests.helpers.interrupt import InterruptedFitError
from tests.helpers.runs import CONF, Run, kill_when, run_here, run_train

METHODS, RATES = ("random", "hardest", "ccs"), ("0.7", "0.9", "0.95")
SMOKE = ("recipe=ccs", "debug=smoke")
TINY = (*SMOKE, "ccs.max_steps=8", "ccs.prune_rate=0.9", "ccs.cutoffs=[0.1]")
"""Seven units in half a second."""

pytestmark = pytest.mark.filterwarnings("ignore:.*of the examples share one of")


def stamps(directory: Path) -> dict[str, int]:
    """When each file below a directory was last written."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): p.stat().st_mtime_ns for p in files}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The default run at the sizes of debug=smoke. Tests must leave it as it is."""
    return run_here(tmp_path_factory.mktemp("smoke"), *SMOKE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("tiny"), *TINY)


# --------------------------------------------------------------------------- what a run leaves


def test_metrics_are_flat_numbers_with_the_agreed_names(smoke):
    assert all(type(v) is float for v in smoke.metrics.values())
    wanted = {"test_accuracy/full/0"} | {
        f"{measure}/{method}/{rate}"
        for measure in ("test_accuracy", "test_accuracy_std", "coverage_auc")
        for method in METHODS
        for rate in RATES
    }
    assert wanted <= set(smoke.metrics)
    assert all(0 <= v <= 1 for k, v in smoke.metrics.items() if k.startswith("test_accuracy"))


def test_run_directory_is_complete(smoke):
    assert {
        "accuracy_and_coverage.png",
        "config.yaml",
        "csv/metrics.csv",
        "metrics.json",
        "report.md",
        "run.json",
        "scores/features-seed0.safetensors",
        "scores/seed0.safetensors",
        "selections/ccs/0.9-cutoff0.1/seed0.safetensors",
        "units/fits/random/0.95/seed0.json",
        "units/full/0/seed0.json",
        "units/selections/hardest/0.7/seed0.json",
    } <= set(stamps(smoke.directory))
    assert not list(smoke.directory.rglob("*.partial"))
    assert smoke.state["status"] == "finished"
    assert (smoke.directory / "accuracy_and_coverage.png").read_bytes().startswith(b"\x89PNG")
    # one fit and one selection for each of random, hardest and ccs with three cutoffs; one full fit
    assert len(smoke.units) == 1 + 2 * len(RATES) * (2 + 3)


def test_report_says_what_was_run_and_compares(smoke):
    report = (smoke.directory / "report.md").read_text()
    assert "| method | 0.7 pruned | 0.9 pruned | 0.95 pruned |" in report
    assert "| data | digits" in report
    for method in METHODS:
        cell = f"{100 * smoke.metrics[f'test_accuracy/{method}/0.9']:.1f} ± 0.0"
        assert any(cell in row for row in report.splitlines() if row.startswith(f"| {method} |"))


def test_csv_log_has_every_unit_and_the_metrics(smoke):
    header = (smoke.directory / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"{key}/seconds" for key in smoke.units} | set(smoke.metrics) <= set(header)


def test_saved_configuration_is_resolved(smoke):
    from omegaconf import OmegaConf

    saved = OmegaConf.load(smoke.directory / "config.yaml")
    assert saved.ccs.max_steps == 20
    assert "${" not in (smoke.directory / "config.yaml").read_text()


def test_python_train_py_repeats_the_numbers_and_ends_with_the_table(smoke, tmp_path):
    done = run_train(*SMOKE, f"hydra.run.dir={tmp_path}")
    assert Run(tmp_path).metrics == smoke.metrics
    assert Run(tmp_path).units == smoke.units
    *_, last = done.stdout.strip().splitlines()
    assert last == f"run directory: {tmp_path}"
    assert f"{100 * smoke.metrics['test_accuracy/ccs/0.95']:.1f} ± 0.0" in done.stdout
    assert (tmp_path / "train.log").is_file()


def test_another_seed_gives_other_numbers(tiny, tmp_path):
    other = run_here(tmp_path, *TINY, "seed=1")
    assert other.metrics.keys() == tiny.metrics.keys()
    assert other.metrics != tiny.metrics


def test_several_seeds_are_averaged_and_compared_in_pairs(tiny, tmp_path):
    run = run_here(tmp_path, *TINY, "ccs.num_seeds=2")
    fits = [run.units[f"fits/random/0.9/seed{seed}"]["test"] for seed in (0, 1)]
    assert fits[0] == tiny.metrics["test_accuracy/random/0.9"]
    assert run.metrics["test_accuracy/random/0.9"] == pytest.approx(sum(fits) / 2)
    assert run.metrics["test_accuracy_std/random/0.9"] == pytest.approx(
        abs(fits[0] - fits[1]) / 2**0.5
    )
    ours = [run.units[f"fits/ccs/0.9-cutoff0.1/seed{seed}"]["test"] for seed in (0, 1)]
    assert run.metrics["test_accuracy_difference/ccs-random/0.9"] == pytest.approx(
        (sum(ours) - sum(fits)) / 2
    )
    assert "95 % interval" in (run.directory / "report.md").read_text()


# --------------------------------------------------------------------------- repeating and resuming


def test_finished_run_is_not_run_again(tiny, capsys):
    before = stamps(tiny.directory)
    assert run_here(tiny.directory, *TINY).metrics == tiny.metrics
    assert stamps(tiny.directory) == before
    assert capsys.readouterr().out.startswith("# Coreset selection (CCS)")


def test_directory_of_another_configuration_is_refused_naming_the_key(tiny):
    before = stamps(tiny.directory)
    with pytest.raises(RunError, match=r"another configuration \(differs in seed\)"):
        run_here(tiny.directory, *TINY, "seed=1")
    with pytest.raises(RunError, match=r"ccs\.methods\.ccs\.num_strata"):
        run_here(tiny.directory, *TINY, "ccs.methods.ccs.num_strata=7")
    assert stamps(tiny.directory) == before


def test_where_a_run_reports_is_not_part_of_its_identity(tiny):
    before = stamps(tiny.directory)
    run_here(tiny.directory, *TINY, "paths.output_root=elsewhere", "ckpt_path=auto", "logger=wandb")
    assert stamps(tiny.directory) == before


def test_optimized_metric_is_returned(tiny):
    name = "val_accuracy/ccs/0.9"
    assert tiny.value is None
    assert run_here(tiny.directory, *TINY, f"optimized_metric={name}").value == tiny.metrics[name]


def test_unknown_optimized_metric_is_refused_with_the_nearest(tiny):
    with pytest.raises(InvalidValueError, match="did you mean 'val_accuracy/ccs/0.9'"):
        run_here(tiny.directory, *TINY, "optimized_metric=val_acuracy/ccs/0.9")


def test_ckpt_path_is_auto_or_nothing(tmp_path):
    with pytest.raises(InvalidValueError, match=r"null or auto, got 'last.ckpt'.*hydra.run.dir"):
        run_here(tmp_path, *TINY, "ckpt_path=last.ckpt")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The root folder of a run that was killed while it worked; its run directory is in ccs/."""
    root = tmp_path_factory.mktemp("killed")

    def some_units_are_done() -> bool:
        return len(list((root / "ccs").glob("*/units/fits/**/*.json"))) >= 2

    kill_when(some_units_are_done, *SMOKE, f"paths.output_root={root}")
    return root


def test_killed_run_is_found_and_resumed_without_repeating_finished_units(smoke, killed):
    (interrupted,) = (killed / "ccs").iterdir()
    assert not (interrupted / "metrics.json").exists()
    units = {k: v for k, v in stamps(interrupted).items() if k.startswith("units/")}
    assert 0 < len(units) < len(smoke.units)

    automatic = [*SMOKE, f"paths.output_root={killed}", "ckpt_path=auto"]
    assert prepare(automatic, CONF) == [*automatic, f"hydra.run.dir={interrupted}"]
    resumed = run_here(interrupted, *automatic)
    assert units.items() <= stamps(interrupted).items()
    assert resumed.metrics == smoke.metrics
    assert resumed.units == smoke.units
    header = (interrupted / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert all(f"{key}/seconds" in header for key in smoke.units)

    assert prepare(automatic, CONF) == automatic  # it is finished now
    explicit = [*automatic, "hydra.run.dir=elsewhere"]
    assert prepare(explicit, CONF) == explicit


def test_ckpt_path_auto_leaves_other_configurations_and_finished_runs_alone(tmp_path):
    from mlkit.run_directory import newest_unfinished
    from tests.helpers.runs import compose_job

    for name, status in (("older", "running"), ("newer", "running"), ("done", "finished")):
        run = run_here(tmp_path / name, *TINY, "ccs.stage=score")
        run_json = {
            **run.state,
            "status": status,
            "started": {"older": "1", "newer": "2"}.get(name, "3"),
        }
        (run.directory / "run.json").write_text(json.dumps(run_json))
    with compose_job(tmp_path, *TINY) as cfg:
        assert newest_unfinished(tmp_path, cfg) == tmp_path / "newer"
        cfg.seed = 7
        assert newest_unfinished(tmp_path, cfg) is None
        assert newest_unfinished(tmp_path / "absent", cfg) is None


def assert_same_fit(first: Run, second: Run) -> None:
    assert first.metrics == second.metrics
    tables = [
        ScoreTable.load(r.directory / "scores" / "seed0.safetensors") for r in (first, second)
    ]
    assert (tables[0].visits == tables[1].visits).all()
    for name in ("aum", "confidence"):
        assert (tables[0][name].values == tables[1][name].values).all()


def test_fit_killed_in_the_middle_goes_on_from_its_checkpoint(tmp_path):
    overrides = (
        *SMOKE,
        "ccs.stage=score",
        "ccs.max_steps=300",
        "callbacks=checkpoint",
        "callbacks.checkpoint.every_n_train_steps=7",
    )
    killed = tmp_path / "killed"
    checkpoint = killed / "checkpoints" / "full" / "0" / "seed0" / "last.ckpt"
    kill_when(checkpoint.is_file, *overrides, f"hydra.run.dir={killed}")
    assert not Run(killed).units
    written = checkpoint.stat().st_mtime_ns
    resumed, whole = run_here(killed, *overrides), run_here(tmp_path / "whole", *overrides)
    assert checkpoint.stat().st_mtime_ns > written
    assert_same_fit(resumed, whole)


STEPS_OF_AN_EPOCH = 5  # 1,213 examples in batches of 256
CHECKPOINTS = (
    *SMOKE,
    "ccs.stage=score",
    "ccs.max_steps=12",
    "data.batch_size=256",
    "callbacks=checkpoint",
    "callbacks.checkpoint.every_n_train_steps=1",
    "+callbacks.interrupt._target_=tests.helpers.interrupt.InterruptAt",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("uninterrupted"), *CHECKPOINTS)


@pytest.mark.parametrize(
    "step",
    [1, STEPS_OF_AN_EPOCH - 1, STEPS_OF_AN_EPOCH, STEPS_OF_AN_EPOCH + 1, 2 * STEPS_OF_AN_EPOCH],
)
def test_fit_goes_on_from_any_step_as_if_nothing_had_happened(
    uninterrupted, step, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLKIT_TEST_INTERRUPT", str(step))
    with pytest.raises(InterruptedFitError, match=f"after step {step}"):
        run_here(tmp_path, *CHECKPOINTS)
    monkeypatch.delenv("MLKIT_TEST_INTERRUPT")
    assert Run(tmp_path).state["status"] == "running"
    assert_same_fit(run_here(tmp_path, *CHECKPOINTS), uninterrupted)


# --------------------------------------------------------------------------- stages


def test_stages_one_after_another_equal_one_run(tiny, tmp_path):
    scored = run_here(tmp_path, *TINY, "ccs.stage=score")
    assert set(scored.units) == {"full/0/seed0"}
    assert "ccs.stage=train" in (tmp_path / "report.md").read_text()
    selected = run_here(tmp_path, *TINY, "ccs.stage=select")
    assert {k.split("/")[0] for k in selected.units} == {"full", "selections"}
    scores = stamps(tmp_path / "scores")
    trained = run_here(tmp_path, *TINY, "ccs.stage=train")
    assert stamps(tmp_path / "scores") == scores
    assert trained.metrics == tiny.metrics
    assert trained.units == tiny.units


def test_saved_scores_replace_the_scoring(tiny, tmp_path):
    path = tiny.directory / "scores" / "seed0.safetensors"
    run = run_here(tmp_path, *TINY, f"ccs.scores_path={path}")
    assert run.metrics == tiny.metrics
    for selection in (tiny.directory / "selections").rglob("*.safetensors"):
        same = tmp_path / "selections" / selection.relative_to(tiny.directory / "selections")
        assert same.read_bytes() == selection.read_bytes()


# --------------------------------------------------------------------------- loggers, profile


def test_tensorboard_leaves_its_events(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    run_here(tmp_path, *TINY, "ccs.stage=score", "logger=tensorboard")
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"test_accuracy/full/0" in events.read_bytes()
    assert (tmp_path / "csv" / "metrics.csv").is_file()


def test_profile_is_left_in_the_run_directory(tmp_path):
    run_here(tmp_path, "recipe=ccs", "debug=profile", "ccs.stage=score", "ccs.max_steps=8")
    profiles = [p.read_text() for p in tmp_path.glob("*profile*.txt")]
    assert any("run_training_batch" in text for text in profiles)


# --------------------------------------------------------------------------- sweeps, processes


def test_sweep_logs_each_job_to_its_own_offline_wandb_run_and_skips_finished_jobs(tmp_path):
    arguments = ("-m", *TINY, "ccs.stage=score", "seed=0,1", f"paths.output_root={tmp_path}")
    sweep = tmp_path / "ccs" / "sweep"
    # nothing listens there: a run that needs the network would fail
    offline = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_DIR": "", "WANDB_API_KEY": ""}
    run_train(*arguments, "logger=wandb", environment=offline)
    jobs = sorted(p.parent for p in sweep.glob("*/run.json"))
    assert [Run(job).state["identity"]["seed"] for job in jobs] == [0, 1]
    for job in jobs:
        assert len(list((job / "wandb").glob("offline-run-*"))) == 1
        assert (job / "csv" / "metrics.csv").is_file()
    before = {job: stamps(job / "units") | stamps(job / "scores") for job in jobs}
    done = run_train(*arguments, "logger=csv")
    assert done.stdout.count("is finished already") == 2
    assert sorted(p.parent for p in sweep.glob("*/run.json")) == jobs
    assert {job: stamps(job / "units") | stamps(job / "scores") for job in jobs} == before


def test_two_processes_give_the_same_files_as_one(tiny, tmp_path):
    done = run_train(*TINY, "trainer=ddp", f"hydra.run.dir={tmp_path}")
    run = Run(tmp_path)
    assert run.metrics.keys() == tiny.metrics.keys()
    assert run.units.keys() == tiny.units.keys()
    assert run.state["status"] == "finished"
    assert not list(tmp_path.rglob("*.partial"))
    # both ran, one spoke
    assert (tmp_path / "train_ddp_process_1.log").is_file()
    assert done.stdout.count("run directory:") == 1
    assert done.stdout.count("Test accuracy %") == 1
    table = ScoreTable.load(tmp_path / "scores" / "seed0.safetensors")
    visited = table.visits
    # 8 steps of 2 x 64 examples: below one epoch of the 1,213, so each was seen at most once
    assert visited.sum() == 8 * 2 * 64
    assert visited.max() == 1


def test_environment_is_put_back(tmp_path):
    before = dict(os.environ)
    run_here(tmp_path, *TINY, "ccs.stage=score")
    assert dict(os.environ) == before
