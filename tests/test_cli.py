"""The command line: help and mistakes are answered in words, at once (before torch is imported)."""

import json
import re

import pytest
import yaml

from tests.helpers.runs import CONF, ROOT, is_installed, run_python

TRAIN = """
import json, runpy, sys
path, sys.argv = sys.argv[1], ["train.py", *sys.argv[2:]]
try:
    runpy.run_path(path, run_name="__main__")
finally:
    heavy = sorted({"torch", "lightning", "torchvision", "matplotlib"} & set(sys.modules))
    print("\\nHEAVY", json.dumps(heavy))
"""


class Answer:
    """What a command said: `code`, `out`, `err`, and the heavy packages it loaded."""

    def __init__(self, *arguments, cwd):
        done = run_python("-c", TRAIN, str(ROOT / "train.py"), *arguments, cwd=cwd)
        self.out, _, heavy = done.stdout.partition("\nHEAVY ")
        assert heavy, f"it did not come back:\n{done.stdout}\n{done.stderr}"
        self.code, self.err, self.heavy = done.returncode, done.stderr, json.loads(heavy)
        start = self.err.find("error: ")
        self.message = self.err[start:] if start >= 0 else ""


@pytest.fixture
def ask(tmp_path):
    """Give `train.py` a command line, in an empty folder."""
    return lambda *arguments: Answer(*arguments, cwd=tmp_path)


# --------------------------------------------------------------------------- what is no mistake


def test_help_lists_commands_and_every_group_without_a_recipe(ask):
    answer = ask("--help")
    assert (answer.code, answer.heavy) == (0, [])
    assert "python train.py recipe=ccs debug=smoke" in answer.out
    for folder in (p for p in CONF.iterdir() if p.is_dir() and list(p.glob("*.yaml"))):
        options = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        assert f"{folder.name}: {options}" in answer.out


def test_cfg_job_prints_the_composed_configuration(ask):
    answer = ask("recipe=ccs", "ccs.prune_rate=0.5", "--cfg", "job")
    assert (answer.code, answer.heavy) == (0, [])
    composed = yaml.safe_load(answer.out)
    assert composed["ccs"]["prune_rate"] == 0.5
    assert composed["data"]["name"] == "digits"
    assert composed["recipe"]["_target_"] == "recipes.ccs.CCS"


def test_users_extend_the_configuration_from_their_own_folder(ask, tmp_path):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "own.yaml").write_text("name: own\nroot: null\n")
    answer = ask("--config-dir", str(tmp_path / "mine"), "recipe=ccs", "data=own", "--cfg", "job")
    assert answer.code == 0
    assert yaml.safe_load(answer.out)["data"] == {"name": "own", "root": None}


# --------------------------------------------------------------------------- what is one

MISTAKES = {
    "no recipe": ([], [r"choose a recipe: python train\.py recipe=", "ccs"]),
    "unknown recipe": (["recipe=cs"], ["there is no recipe 'cs'", "did you mean 'ccs'"]),
    "unknown option": (
        ["recipe=ccs", "data=digit"],
        ["there is no data 'digit'", "did you mean 'digits'", "known: .*cifar10.*fashion_mnist"],
    ),
    "unknown optional option": (
        ["recipe=ccs", "debug=smok"],
        ["there is no debug 'smok'", "did you mean 'smoke'"],
    ),
    "unknown experiment": (
        ["recipe=ccs", "experiment=ccs/cifar11"],
        ["there is no experiment 'ccs/cifar11'", "'ccs/cifar10'"],
    ),
    "unknown group": (
        ["recipe=ccs", "dta=digits"],
        ["'dta'", "did you mean 'data'", "top-level keys: .*model.*trainer"],
    ),
    "misspelt key": (
        ["recipe=ccs", "ccs.prun_rate=0.5"],
        [r"'ccs\.prun_rate'", "did you mean 'prune_rate'", "keys of ccs: .*num_seeds"],
    ),
    "misspelt nested key": (
        ["recipe=ccs", "ccs.methods.ccs.cutof=0"],
        ["did you mean 'cutoff'", r"keys of ccs\.methods\.ccs: .*num_strata"],
    ),
    "misspelt room": (
        ["recipe=ccs", "ccz.prune_rate=0.5"],
        [r"'ccz\.prune_rate'", "did you mean 'ccs'"],
    ),
    "key without value": (["recipe=ccs", "seed"], ["'seed'", "missing EQUAL"]),
    "sweep without -m": (["recipe=ccs", "seed=0,1"], ["seed=0,1", "--multirun"]),
    "pruning rate": (
        ["recipe=ccs", "ccs.prune_rate=1.5"],
        [r"ccs\.prune_rate must be a number in \[0, 1\), got 1\.5"],
    ),
    "label noise": (
        ["recipe=ccs", "data.label_noise=2"],
        [r"data\.label_noise must be a number in \[0, 1\], got 2"],
    ),
    "validation share": (
        ["recipe=ccs", "data.val_fraction=1"],
        [r"data\.val_fraction must be a number in \[0, 1\), got 1"],
    ),
    "stage": (["recipe=ccs", "ccs.stage=scor"], [r"ccs\.stage 'scor'", "did you mean 'score'"]),
    "score": (
        ["recipe=ccs", "ccs.score=aun"],
        ["no score 'aun' is recorded", "did you mean 'aum'"],
    ),
    "cutoffs above every rate": (
        ["recipe=ccs", "ccs.cutoffs=[0.99]"],
        [r"no cutoff to search at prune_rate=0\.7", r"ccs\.cutoffs=\[0\.99\]"],
    ),
    "no steps": (
        ["recipe=ccs", "ccs.max_steps=0"],
        [r"ccs\.max_steps must be an integer above 0, got 0"],
    ),
    "absent scores": (
        ["recipe=ccs", "ccs.scores_path=absent.safetensors", "ccs.num_seeds=1"],
        ["absent.safetensors is not a file"],
    ),
    "one table for several seeds": (
        ["recipe=ccs", "ccs.scores_path=absent.safetensors"],
        [r"put \{seed\} into the path", r"ccs\.num_seeds=1"],
    ),
    "processes in a sweep": (
        ["-m", "recipe=ccs", "trainer=ddp", "seed=0,1", "hydra.sweep.dir=sweep"],
        [r"trainer\.devices=2 does not work in a sweep", "launcher=slurm"],
    ),
    "rate twice": (["recipe=ccs", "ccs.prune_rate=[0.9,0.9]"], ["names a rate twice"]),
    "rate that is no number": (
        ["recipe=ccs", "ccs.prune_rate=abc"],
        [r"ccs\.prune_rate must be a number in \[0, 1\), got 'abc'"],
    ),
    "score that no run records": (
        ["recipe=ccs", "ccs.score=cal"],
        ["no score 'cal' is recorded", "known: .*aum"],
    ),
    "batch size that is no number": (
        ["recipe=ccs", "data.batch_size=abc"],
        [r"data\.batch_size must be an integer of at least 1, got 'abc'"],
    ),
    "checkpoint path": (
        ["recipe=ccs", "ckpt_path=last.ckpt"],
        [r"ckpt_path must be null or auto, got 'last\.ckpt'", r"hydra\.run\.dir="],
    ),
    "data not fetched": (
        ["recipe=ccs", "data=fashion_mnist", "data.root=absent"],
        [
            "fashion_mnist is neither in ",
            r"python scripts/fetch_data\.py fashion_mnist",
            r"data\.root=/path/to/your/copy",
        ],
    ),
    "data that cannot be fetched": (
        ["recipe=ccs", "data=cifar10", "data.root=absent"],
        ["cifar10 is not at absent", r"set data\.root=/path/to/your/copy"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_explained_before_torch_is_imported(ask, tmp_path, name):
    arguments, patterns = MISTAKES[name]
    answer = ask(*arguments)
    assert answer.code != 0
    assert answer.message, f"no 'error: ...' in\n{answer.err}"
    for pattern in patterns:
        assert re.search(pattern, answer.message, re.DOTALL), answer.message
    assert "Traceback" not in answer.err
    assert "If this is the run directory" not in answer.message
    assert answer.heavy == []
    assert not list(tmp_path.rglob("run.json"))


def test_unwritable_run_directory_is_one_clear_error(ask, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for override in (f"hydra.run.dir={tmp_path}/file/run", f"paths.output_root={tmp_path}/file"):
        answer = ask("recipe=ccs", override)
        assert answer.code != 0
        assert str(tmp_path / "file") in answer.message
        assert "choose another with hydra.run.dir=... or paths.output_root=..." in answer.message
        assert "Traceback" not in answer.err
        assert answer.heavy == []
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("override", "module", "extra"),
    [
        ("launcher=joblib", "hydra_plugins.hydra_joblib_launcher", "sweeps"),
        ("launcher=slurm", "hydra_plugins.hydra_submitit_launcher", "sweeps"),
        ("hparams_search=ccs", "hydra_plugins.hydra_optuna_sweeper", "sweeps"),
        ("launcher=ray", "hydra_plugins.hydra_ray_launcher", "ray"),
    ],
)
def test_absent_plugin_names_its_extra(ask, override, module, extra):
    if is_installed(module):
        pytest.skip(f"{module} is installed")
    answer = ask("-m", "recipe=ccs", override)
    assert answer.code != 0
    assert f"pip install 'mlkit-torch[{extra}]'" in answer.message
    assert answer.heavy == []


def test_failure_of_a_users_class_keeps_its_traceback(ask):
    answer = ask("recipe=ccs", "data._target_=os.path.join")
    assert answer.code != 0
    assert "Traceback" in answer.message
    assert "os.path.join" in answer.message or "posixpath.join" in answer.message
    assert "full_key: data" in answer.message


def test_explain_does_not_swallow_other_errors():
    from mlkit.cli import explain

    with pytest.raises(ZeroDivisionError):
        explain(ZeroDivisionError("boom"), [], CONF)
