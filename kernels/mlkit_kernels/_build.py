"""Build the C++ kernels on first use, once for each machine, into the user's cache.

A kernel is compiled for the CPU that it runs on, so the folder's name is a hash of all that the
machine code depends on: torch, Python's platform, compiler and its version, flags, the CPU's model
and features, and the sources. A home directory shared by unlike machines holds one build for each.
Nothing happens at import, and a process that finds the build only opens the library.

Environment: `CXX` names the compiler, `MLKIT_CACHE` moves the cache, `MLKIT_CPU_KERNELS=0` switches
C++ kernels off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

__all__ = ["cache_directory", "cache_key", "cpu_flags", "cpu_kernel_failure", "load_cpu_kernel"]

logger = logging.getLogger(__name__)

_lock = threading.RLock()
_failures: dict[str, str | None] = {}  # kernel -> why it cannot run; None when it is loaded


def cpu_flags() -> list[str]:
    """Return the compiler's flags: optimised for this CPU, without any change to NaN or inf."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return [
        "-O3",
        "-mcpu=native" if apple else "-march=native",
        "-Wno-psabi",  # vectors are passed between inlined functions only
        "-fno-math-errno",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",  # stable ABI of torch 2.11
    ]


def cache_directory() -> Path:
    """Return where builds are kept: `$MLKIT_CACHE/kernels`, else `kernels` in the user's cache."""
    chosen = os.environ.get("MLKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "mlkit" / "kernels"


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _compiler_version(compiler: str) -> str | None:
    """Return what the compiler says of itself, or None if there is none."""
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cpu_model() -> str:
    """Return the CPU's model and features; a virtual machine may hide some of a model's."""
    fields = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.platform()}"
    pairs = (line.partition(":") for line in lines)
    return "\n".join(
        sorted({f"{k.strip()}={v.strip()}" for k, _, v in pairs if k.strip() in fields})
    )


def cache_key(
    sources: Sequence[Path],
    headers: Sequence[Path] = (),
    *,
    flags: Sequence[str] | None = None,
    compiler_version: str = "",
    cpu: str | None = None,
) -> str:
    """Return the hash that names a build's folder.

    Args:
        sources: The files that are compiled; their contents count, not their place.
        headers: The files that these include.
        flags: The compiler's flags; `cpu_flags()` if None.
        compiler_version: What the compiler says of itself.
        cpu: The CPU's model and features; this machine's if None.
    """
    parts = [
        torch.__version__,
        sysconfig.get_platform(),
        _compiler(),
        compiler_version,
        "\0".join(cpu_flags() if flags is None else flags),
        _cpu_model() if cpu is None else cpu,
        *(Path(source).read_text() for source in (*sources, *headers)),
    ]
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let the build find the `ninja` that pip installed, also where no environment is active."""
    spec = importlib.util.find_spec("ninja")
    if shutil.which("ninja") is not None or spec is None:
        yield
        return
    import ninja

    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join(filter(None, [before, ninja.BIN_DIR]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def _build(name: str, sources: Sequence[Path], folder: Path, flags: Sequence[str]) -> None:
    """Compile and load; other processes wait at the lock that `load` takes in `folder`."""
    noisy = logging.getLogger("torch.utils.cpp_extension")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # it warns of a missing CUDA, which a CPU kernel does not need
    try:
        with warnings.catch_warnings():
            # It imports setuptools, which may import the distutils that Python 3.11 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils import cpp_extension

        with _ninja_on_path():
            cpp_extension.load(
                name=name,
                sources=[str(source) for source in sources],
                extra_cflags=list(flags),
                build_directory=str(folder),
                is_python_module=False,
                with_cuda=False,
            )
    finally:
        noisy.setLevel(level)


def _load(name: str, sources: Sequence[Path], headers: Sequence[Path]) -> str | None:
    """Return None once the kernel is loaded, or why that cannot be."""
    if os.environ.get("MLKIT_CPU_KERNELS", "1") == "0":
        return "MLKIT_CPU_KERNELS=0 switches C++ kernels off"
    compiler = _compiler()
    version = _compiler_version(compiler)
    if version is None:
        return f"no C++ compiler: {compiler!r} does not run (set CXX, or install g++ or clang++)"
    flags = cpu_flags()
    key = cache_key(sources, headers, flags=flags, compiler_version=version)
    folder = cache_directory() / f"{name}-{key}"
    library = folder / f"mlkit_{name}.so"
    done = folder / "done"  # written after the library has been loaded once
    try:
        if done.exists():
            torch.ops.load_library(str(library))
            return None
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        logger.info("building the C++ kernel %s in %s (once)", name, folder)
        _build(f"mlkit_{name}", sources, folder, flags)
        done.touch()
        logger.info("built %s in %.1f s", name, time.perf_counter() - start)
    except (OSError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines()
        words = [line for line in lines if "error:" in line] or lines[-3:]
        return f"the build in {folder} failed: {' '.join(words[:3])[:1000]}"
    return None


def load_cpu_kernel(name: str, sources: Sequence[Path], headers: Sequence[Path] = ()) -> bool:
    """Load a C++ kernel's library, which registers its ops; build it if this is the first use.

    The first build takes some ten seconds, a later process some ten milliseconds. Where it cannot
    be built (no compiler, an error) that is said once, as a warning of this module's logger, and
    the answer stays False for the process.

    Args:
        name: The kernel's name, which the library and its folder carry.
        sources: C++ files on the LibTorch stable ABI.
        headers: Files that these include.

    Returns:
        Whether the ops can be called.
    """
    if name in _failures:  # the usual case, without the lock
        return _failures[name] is None
    with _lock:
        if name not in _failures:
            failure = _load(name, sources, headers)
            _failures[name] = failure
            if failure is not None:
                logger.warning(
                    "mlkit_kernels.%s runs its PyTorch reference, which reads all weights: %s",
                    name,
                    failure,
                )
    return _failures[name] is None


def cpu_kernel_failure(name: str) -> str | None:
    """Return why `load_cpu_kernel(name, ...)` said False, or None."""
    return _failures.get(name)
