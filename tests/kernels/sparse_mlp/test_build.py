"""Building on first use: the key of the cache, the life of a build, machines without a compiler."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlkit_kernels import _build

ROOT = Path(__file__).resolve().parents[3]

EMPTY_PATH = """
import logging, sys, warnings
warnings.simplefilter("error")
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("mlkit_kernels").addHandler(Keep())
import torch
from mlkit_kernels.sparse_mlp import available_backends, sparse_mlp, sparse_mlp_reference
x, router, up, down = (torch.randn(s) for s in [(2, 8), (3, 8), (3, 4, 8), (3, 2, 8)])
assert not records, "nothing is built at import"
for _ in range(3):
    y = sparse_mlp(x, router, None, up, down)
assert torch.equal(y, sparse_mlp_reference(x, router, None, up, down))
assert available_backends() == ("dense", "reference")
print(len(records), *records)
"""

SECOND_USE = """
import sys
import torch
from mlkit_kernels import _build
from pathlib import Path
ok = _build.load_cpu_kernel("toy", [Path(sys.argv[1])])
print(ok, "torch.utils.cpp_extension" in sys.modules, torch.ops.mlkit_test.answer())
"""

TOY = """
#include <torch/csrc/stable/library.h>
namespace {
int64_t answer() { return 42; }
}
STABLE_TORCH_LIBRARY_FRAGMENT(mlkit_test, m) { m.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(mlkit_test, CompositeExplicitAutograd, m) {
  m.impl("answer", TORCH_BOX(&answer));
}
"""


def run(code, *args, **env):
    full = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **env}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=full,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "toy.cpp"
    path.write_text(TOY)
    return path


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and a process that has tried nothing yet."""
    monkeypatch.setenv("MLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "_failures", {})
    return tmp_path / "cache" / "kernels"


def test_key_changes_with_all_that_the_code_depends_on(source, monkeypatch):
    def key(**changes):
        given = {"flags": ["-O3"], "compiler_version": "g++ 12", "cpu": "A"}
        return _build.cache_key([source], **{**given, **changes})

    keys = {
        key(),
        key(flags=["-O2"]),
        key(flags=["-O3", "-march=native"]),
        key(compiler_version="g++ 13"),
        key(cpu="B"),
    }
    monkeypatch.setenv("CXX", "some-other-compiler")
    keys.add(key())
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(_build.torch, "__version__", "9.9")
    keys.add(key())
    monkeypatch.undo()
    assert len(keys) == 7
    assert key() in keys
    source.write_text(TOY + "// edited\n")
    assert key() not in keys


def test_import_builds_nothing_and_imports_no_torch():
    code = "import sys, mlkit_kernels.sparse_mlp as s; print('torch' in sys.modules, dir(s))"
    done = run(code)
    assert done.stdout.startswith(
        "False ['ACTIVATIONS', 'available_backends', 'break_even_fraction'"
    )


def test_flags_keep_nan():
    assert not any("fast-math" in flag or "finite" in flag for flag in _build.cpu_flags())


def test_default_key_is_this_machine(source):
    assert _build.cache_key([source]) == _build.cache_key(
        [source], flags=_build.cpu_flags(), cpu=_build._cpu_model()
    )


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("MLKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _build.cache_directory() == tmp_path / "mlkit" / "kernels"
    monkeypatch.setenv("MLKIT_CACHE", str(tmp_path / "here"))
    assert _build.cache_directory() == tmp_path / "here" / "kernels"


def test_builds_once_then_only_opens_the_library(source, fresh, tmp_path):
    if _build._compiler_version(_build._compiler()) is None:
        pytest.skip("no C++ compiler")
    first = run(SECOND_USE, str(source), MLKIT_CACHE=str(tmp_path / "cache"))
    assert first.stdout.split() == ["True", "True", "42"], first.stderr
    (folder,) = fresh.iterdir()
    assert folder.name.startswith("toy-")
    assert (folder / "done").exists()
    second = run(SECOND_USE, str(source), MLKIT_CACHE=str(tmp_path / "cache"))
    assert second.stdout.split() == ["True", "False", "42"], second.stderr


def test_without_a_compiler_the_reference_runs_and_says_so_once(tmp_path):
    done = run(EMPTY_PATH, PATH="", CXX="", MLKIT_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 mlkit_kernels.sparse_mlp runs its PyTorch reference")
    assert "no C++ compiler" in done.stdout
    assert not list(tmp_path.iterdir())


def test_compile_error_is_one_warning_with_the_compilers_words(fresh, source, caplog):
    if _build._compiler_version(_build._compiler()) is None:
        pytest.skip("no C++ compiler")
    source.write_text("this is not C++;\n")
    with caplog.at_level(logging.WARNING, logger="mlkit_kernels._build"):
        assert not _build.load_cpu_kernel("toy", [source])
        assert not _build.load_cpu_kernel("toy", [source])
    assert len(caplog.records) == 1
    assert "toy.cpp:1:1: error:" in caplog.text
    assert "failed" in str(_build.cpu_kernel_failure("toy"))
    assert not list(fresh.glob("*/done"))


def test_environment_switches_kernels_off(fresh, source, monkeypatch):
    monkeypatch.setenv("MLKIT_CPU_KERNELS", "0")
    assert not _build.load_cpu_kernel("toy", [source])
    assert "MLKIT_CPU_KERNELS=0" in str(_build.cpu_kernel_failure("toy"))
    assert not fresh.exists()


def test_ninja_of_the_environment_is_found_without_a_path(monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", "")
    with _build._ninja_on_path():
        assert _build.shutil.which("ninja")
    assert os.environ["PATH"] == ""
