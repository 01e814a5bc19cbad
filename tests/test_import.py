"""Imports are cheap, public names exist, and the documentation knows each of them."""

import importlib
import importlib.util
import json
import re
import types

import pytest

import mlkit
from tests.helpers.runs import ROOT, run_python

ROOMS = sorted(p.parent.name for p in (ROOT / "mlkit").glob("*/__init__.pyi"))
HEAVY = (
    "torch",
    "lightning",
    "torchvision",
    "datasets",
    "transformers",
    "matplotlib",
    "wandb",
    "flwr",
)
LIGHT_USES = {
    "mlkit": "import mlkit; mlkit.__version__",
    "mlkit.run": "import mlkit.run, mlkit.cli",
    "mlkit.report": "import mlkit.report; mlkit.report.Report('t').markdown()",
    "rooms": "import mlkit; [getattr(mlkit, name) for name in mlkit.__all__]",
    "mlkit.coresets": (
        "import numpy as np; from mlkit.coresets import CCS\n"
        "assert len(CCS(prune_rate=0.5).select(np.arange(100.0), hard='low')) == 50"
    ),
    "mlkit.serving": (
        "from mlkit.serving import FCFSScheduler, HyGenScheduler, LinearLatency\n"
        "from mlkit.serving import Request, SimEngine\n"
        "latency = LinearLatency.from_coefficients({'Sp': 1e-4}, intercept=0.01)\n"
        "for scheduler in (FCFSScheduler(), HyGenScheduler(1.0)):\n"
        "    SimEngine(scheduler, latency, num_blocks=9).run([Request('a', None, 3, 4)])"
    ),
    "mlkit.data": (
        "from mlkit.data import DataSpec\n"
        "DataSpec(name='x', train={}, test={}, input_shape=[1], num_classes=2).check_files()"
    ),
    "mlkit.embeddings": (
        "from mlkit.embeddings import FIITEDConfig, HashingConfig, MemoryReport\n"
        "from mlkit.embeddings.fiited.budget import plan\n"
        "from mlkit.embeddings.memory import dense_bytes, parse_budget\n"
        "HashingConfig(0.5), MemoryReport(1, 0, 0, 0, 0, 1, 1)\n"
        "least = parse_budget(0.5, dense_bytes(1000, 64, 'rowwise_adagrad'))\n"
        "config = FIITEDConfig(memory_budget=0.5, optimizer='rowwise_adagrad')\n"
        "assert plan(config, 1000, 64).total_bytes <= least"
    ),
    "mlkit.embeddings.settings": (
        "from mlkit.embeddings.settings import FIITEDSettings\nFIITEDSettings(byte_fractions=0.35)"
    ),
    "mlkit.federated": (
        "import numpy as np, mlkit.federated\n"
        "from mlkit.federated import FedTransConfig, LocalTraining\n"
        "from mlkit.federated import TraceAvailability, dirichlet_partition\n"
        "FedTransConfig(), LocalTraining()\n"
        "dirichlet_partition(np.arange(100) % 5, 4, 1.0, seed=0)\n"
        "assert TraceAvailability([0], [1.0], [2.0]).next_check_in(0.0) == 1"
    ),
    "mlkit.federated.settings": (
        "from mlkit.federated.settings import FedTransSettings, PopulationSettings\n"
        "FedTransSettings()\n"
        "PopulationSettings(name='x', partition='iid')"
    ),
    "settings": (
        "from mlkit.coresets.settings import CCSSettings\n"
        "CCSSettings(prune_rate=0.9, methods={'r': {'_target_': 'mlkit.coresets.RandomSelector'}})"
    ),
}


@pytest.mark.parametrize("name", LIGHT_USES)
def test_light_use_imports_no_heavy_package(name):
    report = f"import json, sys; print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    done = run_python("-W", "error", "-c", f"{LIGHT_USES[name]}\n{report}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("name", ROOMS)
def test_room_by_attribute_is_the_module(name):
    assert getattr(mlkit, name) is importlib.import_module(f"mlkit.{name}")


def test_every_room_is_public():
    assert set(ROOMS) <= set(mlkit.__all__)


def exports(room: str) -> dict[str, str]:
    """Public name to the module it comes from, as the stub beside the package says."""
    stub = (ROOT / "mlkit" / room / "__init__.pyi").read_text()
    lines = re.findall(r"^from \.([\w.]+) import (\w+)(?: as (\w+))?$", stub, re.MULTILINE)
    assert len(lines) == len([line for line in stub.splitlines() if "import" in line])
    assert all(name == alias for _, name, alias in lines), "`import x as x` is what re-exports"
    return {name: module for module, name, _ in lines}


@pytest.mark.parametrize("name", ["mlkit", *(f"mlkit.{room}" for room in ROOMS)])
def test_every_public_name_resolves_and_hides_no_module(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        value = getattr(package, public)
        if (name, public) == ("mlkit", "convert"):
            # Bound to the function at import, over the module that defines it.
            importlib.import_module("mlkit.convert")
            assert mlkit.convert is value
            assert value.__module__ == "mlkit.convert"
        elif importlib.util.find_spec(f"{name}.{public}") is not None:
            # Importing a submodule binds its name in the package: that must not change the export.
            module = importlib.import_module(f"{name}.{public}")
            assert getattr(package, public) is value
            assert value is module or value is getattr(module, public), public
        else:
            assert not isinstance(value, types.ModuleType), public


@pytest.mark.parametrize("room", ROOMS)
def test_public_list_is_what_the_modules_list(room):
    package = importlib.import_module(f"mlkit.{room}")
    assert set(package.__all__) == set(exports(room))
    for public, source in exports(room).items():
        module = importlib.import_module(f"mlkit.{room}.{source}")
        assert getattr(package, public) is getattr(module, public)
        assert public in module.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="coreset"):
        mlkit.coreset  # noqa: B018
    with pytest.raises(ImportError, match="CSS"):
        from mlkit.coresets import CSS  # noqa: F401
    with pytest.raises(ImportError):
        importlib.import_module("mlkit.coresets.absent")


@pytest.mark.parametrize("name", ["mlkit", *(f"mlkit.{room}" for room in ROOMS)])
def test_every_public_name_is_in_the_documentation(name):
    pages = {p: p.read_text() for p in sorted((ROOT / "docs").rglob("*.md"))}
    assert pages, "there is no page in docs/"
    text = "\n".join(pages.values())
    code = "".join(re.findall(r"(?s)```.*?```|`[^`\n]+`", text))
    public = importlib.import_module(name).__all__
    absent = [n for n in public if not re.search(rf"\b{re.escape(n)}\b", code)]
    assert not absent, f"{name}: no page of docs/ mentions {', '.join(absent)}"
