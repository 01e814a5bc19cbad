"""Every configuration composes and names things that exist; every experiment runs one step."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from mlkit.cli import prepare
from mlkit.errors import InvalidValueError
from mlkit.run import build
from mlkit.serving import LinearLatency
from tests.helpers.data import fixture_overrides
from tests.helpers.runs import CONF, ROOT, compose_job, is_installed, run_here
from tests.helpers.text import network_overrides

ONE_STEP = {
    "ccs": [
        "ccs.max_steps=1",
        "ccs.num_seeds=1",
        "ccs.prune_rate=[0.5]",
        "ccs.cutoffs=[0.1]",
        "ccs.unseen=easy",
        "data.batch_size=8",
    ],
    "lte": [
        "lte.start_steps=1",
        "lte.steps=2",
        "lte.num_seeds=1",
        "lte.methods=[dense,lte]",
        "lte.target_sparsity=0.5",
        "lte.calibration_batches=1",
        "lte.decode.hidden_size=32",
        "lte.decode.intermediate_size=64",
        "lte.decode.repeats=1",
        "data.sequence_length=16",
        "data.batch_size=8",
    ],
    "fiited": [
        "fiited.byte_fractions=0.6",
        "fiited.max_steps=1",
        "fiited.num_seeds=1",
        "fiited.methods=[dense,fiited,narrow]",
        "fiited.window=1",
        "fiited.memory_steps=1",
        "fiited.memory_scale=1",
    ],
    "hygen": [
        "hygen.tolerance=[0.5]",
        "hygen.duration=20",
        "hygen.num_seeds=1",
        "hygen.max_iter=1",
        "hygen.num_held_out=0",
        "hygen.min_requests=1",
        "hygen.psm_requests=5",
    ],
    "fedtrans": [
        "fedtrans.rounds=2",
        "fedtrans.num_seeds=1",
        "fedtrans.lr_grid=[0.1]",
        "fedtrans.methods=[fedtrans,heterofl]",
        "fedtrans.clients_per_round=3",
        "fedtrans.eval_every=1",
        "fedtrans.training.steps=1",
        "population.num_clients=6",
        "++population.min_examples=2",
        "++population.min_test=1",
    ],
}
"""Per recipe, what makes any of its experiments a matter of seconds. A new recipe adds a line."""

IMAGES, TEXT, CLICKS = "mlkit.data.DataSpec", "mlkit.data.TextSpec", "mlkit.data.CTRSpec"
"""Kinds of data. A recipe says in `recipe._takes_` which one it is for."""

MODULES = {
    IMAGES: "mlkit.models.lightning.Classifier",
    TEXT: "mlkit.models.TransformerModule",
    CLICKS: "mlkit.models.CTRModule",
}
"""The LightningModule of the model groups for each kind."""

CUSTOM = {
    IMAGES: [
        "data=custom",
        "data.train._target_=mlkit.data.digits.digits",
        "+data.train.split=train",
        "data.test._target_=mlkit.data.digits.digits",
        "+data.test.split=test",
        "data.input_shape=[1,8,8]",
        "data.num_classes=10",
        "data.num_workers=0",
    ],
    TEXT: [
        "data=custom_text",
        f"data.train.data_files='{ROOT}/docs/*.md'",
        f"data.test.data_files='{ROOT}/README.md'",
        "data.num_workers=0",
    ],
    CLICKS: ["data=criteo"],
}
"""The data group for a user's own set, and what it leaves to the user."""

LEFT_TO_USER = {
    **{option: own for option, *own in CUSTOM.values()},
    "model=hf_causal_lm": ["model.net.pretrained=owner/model"],
    "model=hf_classifier": ["model.net.pretrained=owner/model"],
}
"""What an option does not settle itself, by option."""

MODEL_OF = {"shakespeare_roles": "char_mlp"}
"""The model group of data that are not images."""

PLUGINS = {
    "launcher": {
        "joblib": "hydra_plugins.hydra_joblib_launcher",
        "ray": "hydra_plugins.hydra_ray_launcher",
        "slurm": "hydra_plugins.hydra_submitit_launcher",
    },
    "hparams_search": {"*": "hydra_plugins.hydra_optuna_sweeper"},
}
"""What an option needs beside the core dependencies."""


def trace_overrides(folder: Path) -> list[str]:
    """A recorded trace of a minute in Azure's format."""
    path = folder / "trace.csv"
    rows = [f"2023-11-16 18:{i // 60:02d}:{i % 60:02d}.1234567,{2000 + i},20" for i in range(600)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return [f"trace.path='{path}'"]


def options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


RECIPES = options("recipe")
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "recipe")


def skip_without_plugin(group: str, option: str) -> None:
    wanted = PLUGINS.get(group, {})
    module = wanted.get(option, wanted.get("*"))
    if module is not None and not is_installed(module):
        pytest.skip(f"{group}={option} needs {module}: pip install 'mlkit-torch[sweeps]' (or ray)")


def recipe_of(group: str, option: str) -> str:
    """The recipe that an experiment or a search space is for, by the first part of its name.

    Of another group, the first recipe that chooses an option of its own.
    """
    head = option.split("/")[0]
    if group in ("experiment", "hparams_search") and head in RECIPES:
        return head
    texts = {r: (CONF / "recipe" / f"{r}.yaml").read_text() for r in RECIPES}
    return next((r for r, text in texts.items() if f"override /{group}:" in text), RECIPES[0])


def user_file(option: str, folder: Path) -> list[str]:
    """The file that an option leaves to the user."""
    if option == "latency=profile":
        path = folder / "profile.json"
        LinearLatency.from_coefficients({"Sp": 1e-4}, intercept=0.01).save(path)
        return [f"latency.path='{path}'"]
    if option.endswith("_file"):
        return [f"{option.split('=')[0]}.path=mine"]
    return []


def kind_of(group: str, option: str) -> str:
    """The kind of data that a data or model group is for."""
    target = OmegaConf.load(CONF / group / f"{option}.yaml")._target_
    return target if group == "data" else {m: kind for kind, m in MODULES.items()}[target]


def taken_by(recipe: str) -> str:
    return OmegaConf.load(CONF / "recipe" / f"{recipe}.yaml").recipe._takes_.get("data")


def choices_for(kind: str, group: str, option: str) -> list[str]:
    """Overrides that choose an option for a kind of data, with a recipe that takes this kind.

    Where no recipe does yet, the first one composes (it would refuse to run) with other options of
    this kind.
    """
    chosen = {"recipe": next((r for r in RECIPES if taken_by(r) == kind), None)}
    if chosen["recipe"] is None:
        chosen["recipe"] = RECIPES[0]
        for other in ("data", "model"):
            chosen[other] = next(o for o in options(other) if kind_of(other, o) == kind)
    chosen[group] = option
    words = [f"{name}={value}" for name, value in chosen.items()] + paired(group, option)
    return words + [more for word in words for more in LEFT_TO_USER.get(word, [])]


def paired(group: str, option: str) -> list[str]:
    """The override that goes with an option, where the data's inputs are not images."""
    if group == "data":
        return [f"model={MODEL_OF[option]}"] if option in MODEL_OF else []
    return [f"data={data}" for data, model in MODEL_OF.items() if model == option]


def targets(node: object, path: str = "") -> dict[str, str]:
    """Every `_target_` below a composed node, by its path."""
    found = {}
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            found[path or "."] = node["_target_"]
        for key, value in node.items():
            found |= targets(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            found |= targets(value, f"{path}[{number}]")
    return found


def check(cfg: DictConfig) -> None:
    """Everything resolves, every `_target_` exists, and the recipe's own values are in range."""
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    found = targets(plain)
    assert "recipe" in found
    for path, target in found.items():
        try:
            get_class(target)
        except ValueError:  # a function
            assert callable(get_method(target)), path
    head = plain["recipe"]["_target_"].split(".")[1]
    build(cfg[head])
    for part in plain["recipe"]["_takes_"]:
        build(cfg[part])


def agree(cfg: DictConfig, data: str) -> None:
    """The data are called by their group, and the network fits them."""
    assert cfg.data.name == data
    for key in ("num_classes", "input_shape"):
        if key in cfg.model.net:
            assert cfg.model.net[key] == cfg.data[key]


@pytest.mark.parametrize(
    ("recipe", "data"),
    [(r, d) for r in RECIPES for d in options("data") if kind_of("data", d) == taken_by(r)],
)
def test_recipe_composes_with_data_of_its_kind(recipe, data, tmp_path):
    own = [*LEFT_TO_USER.get(f"data={data}", []), *paired("data", data)]
    with compose_job(tmp_path, f"recipe={recipe}", f"data={data}", *own) as cfg:
        check(cfg)
        agree(cfg, data)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if taken_by(r)])
def test_recipe_refuses_data_of_another_kind_before_it_starts(recipe, tmp_path):
    other = next(kind for kind in MODULES if kind != taken_by(recipe))
    chosen = {g: next(o for o in options(g) if kind_of(g, o) == other) for g in ("data", "model")}
    words = [f"{group}={option}" for group, option in chosen.items()]
    left = [more for word in words for more in LEFT_TO_USER.get(word, [])]
    kind = other.rsplit(".", 1)[1]
    with pytest.raises(
        InvalidValueError,
        match=rf"recipe={recipe} takes a {taken_by(recipe)}, and data={chosen['data']} is a {kind}",
    ):
        run_here(tmp_path, f"recipe={recipe}", *words, *left)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.filterwarnings("ignore:.*of the examples share one of")
@pytest.mark.parametrize("recipe", [r for r in RECIPES if taken_by(r)])
def test_a_users_own_data_run(recipe, tmp_path):
    own = CUSTOM[taken_by(recipe)]
    files = fixture_overrides(own[0].removeprefix("data="), tmp_path / "data")
    short = [*ONE_STEP[recipe], "data.batch_size=200"]
    done = run_here(tmp_path / "run", f"recipe={recipe}", *own, *files, *short)
    assert done.metrics


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in ("data", "model") for o in options(g)]
)
def test_data_and_models_compose_with_their_kind(group, option, tmp_path):
    with compose_job(tmp_path, *choices_for(kind_of(group, option), group, option)) as cfg:
        check(cfg)


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in GROUPS if g not in ("data", "model") for o in options(g)],
)
def test_option_composes(group, option, tmp_path):
    skip_without_plugin(group, option)
    chosen = [f"recipe={recipe_of(group, option)}", f"{group}={option}"]
    with compose_job(tmp_path / "run", *chosen, *user_file(chosen[1], tmp_path)) as cfg:
        check(cfg)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_first_in_its_own_command(recipe, tmp_path):
    with compose_job(tmp_path, f"recipe={recipe}", "debug=smoke") as cfg:
        assert cfg.recipe._target_.startswith(f"recipes.{recipe}.")
        check(cfg)


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF))
)
def test_commands_in_comments_compose(path, tmp_path):
    text = "\n".join(line for line in path.read_text().splitlines() if "#" in line)
    commands = re.findall(r"python train\.py ([^#\n;]*?)(?:   +|[;#]|$)", text, re.MULTILINE)
    if path.parent.parent.name == "experiment" or path.parent.name == "experiment":
        assert commands, "an experiment says the command that runs it"
        option = path.relative_to(CONF / "experiment").with_suffix("").as_posix()
        assert any(f"experiment={option}" in c for c in commands)
    for command in commands:
        words = [w for w in shlex.split(command) if w != "-m"]
        if any(w.startswith(("<", "[")) or "=<" in w for w in words):
            continue  # a template
        for group, _, option in (w.partition("=") for w in words):
            skip_without_plugin(group, option)
        first_values = [re.sub(r"(=[^\[,]*),.*", r"\1", w) for w in words]  # of a sweep
        with compose_job(tmp_path, *first_values) as cfg:
            check(cfg)


@pytest.mark.filterwarnings("ignore:.*of the examples share one of")
@pytest.mark.filterwarnings("ignore:.*were visited less often than window")
@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_runs_one_step(experiment, tmp_path):
    recipe = recipe_of("experiment", experiment)
    assert recipe in ONE_STEP, f"add an entry for {recipe} to ONE_STEP"
    overrides = [f"recipe={recipe}", f"experiment={experiment}"]
    with compose_job(tmp_path / "run", *overrides) as cfg:
        methods = list(cfg[recipe].get("methods", []))
        fixtures = fixture_overrides(cfg.data.name, tmp_path / "data") if "data" in cfg else []
        if "path" in cfg.get("trace", {}):
            fixtures += trace_overrides(tmp_path)
        pretrained = str(cfg.model.net.get("pretrained") or "") if "model" in cfg else ""
    network = [] if not pretrained else network_overrides(Path(pretrained).name, tmp_path / "net")
    run = run_here(tmp_path / "run", *overrides, *ONE_STEP[recipe], *fixtures, *network)
    assert run.state["status"] == "finished"
    if recipe == "ccs":
        for method in methods:
            assert 0 <= run.metrics[f"test_accuracy/{method}/0.5"] <= 1
    if recipe == "hygen":
        assert run.metrics["total_tokens_per_s/hygen/0.5"] > 0
    if recipe == "fiited":
        assert 0 <= run.metrics["auc/fiited/0.6"] <= 1
    if recipe == "lte":
        assert 0 <= run.metrics["ffn_sparsity/lte/0.5"] <= 1
    if recipe == "fedtrans":
        assert 0 <= run.metrics["client_accuracy/fedtrans"] <= 1


@pytest.mark.parametrize("population", options("population"))
def test_population_runs_one_step(population, tmp_path):
    run = run_here(tmp_path, "recipe=fedtrans", f"population={population}", *ONE_STEP["fedtrans"])
    assert f"{population}: 6 clients" in (run.directory / "report.md").read_text()


def test_options_of_the_documented_groups_exist():
    assert {"callbacks", "data", "debug", "experiment", "hparams_search", "launcher", "logger",
            "model", "paths", "trainer"} <= set(GROUPS)  # fmt: skip
    assert {"cpu", "gpu", "ddp"} <= set(options("trainer"))
    assert {"csv", "wandb", "tensorboard"} <= set(options("logger"))


def test_help_composes_with_the_first_recipe():
    assert prepare(["--help"], CONF) == ["--help", f"recipe={RECIPES[0]}"]
    assert prepare(["--help", "recipe=ccs"], CONF) == ["--help", "recipe=ccs"]
    assert prepare(["recipe=ccs", "seed=1"], CONF) == ["recipe=ccs", "seed=1"]


@pytest.mark.parametrize(
    ("recipe", "model"),
    [(r, m) for r in RECIPES for m in options("model") if kind_of("model", m) == taken_by(r)],
)
def test_recipe_composes_with_models_of_its_kind(recipe, model, tmp_path):
    own = [*LEFT_TO_USER.get(f"model={model}", []), *paired("model", model)]
    with compose_job(tmp_path, f"recipe={recipe}", f"model={model}", *own) as cfg:
        check(cfg)
        if taken_by(recipe) == IMAGES:  # a network for text learns its vocabulary from the data
            assert instantiate(cfg.model.net)
