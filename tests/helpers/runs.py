"""Run a recipe from a test: inside the test's process, or as a user does from a shell."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from mlkit.run import train

__all__ = [
    "CONF",
    "ROOT",
    "Run",
    "compose_job",
    "is_installed",
    "kill_when",
    "run_here",
    "run_python",
    "run_train",
]

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


@dataclass(frozen=True)
class Run:
    """What a run left.

    Args:
        directory: Its run directory.
        value: What `train` returned.
    """

    directory: Path
    value: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Contents of `metrics.json`."""
        return json.loads((self.directory / "metrics.json").read_text())

    @property
    def state(self) -> dict[str, object]:
        """Contents of `run.json`."""
        return json.loads((self.directory / "run.json").read_text())

    @property
    def units(self) -> dict[str, dict[str, float]]:
        """Results of the finished units by key, without their times."""
        folder = self.directory / "units"
        found = {
            p.relative_to(folder).with_suffix("").as_posix(): json.loads(p.read_text())
            for p in sorted(folder.rglob("*.json"))
        }
        return {k: {n: x for n, x in v.items() if n != "seconds"} for k, v in found.items()}


def is_installed(module: str) -> bool:
    """Whether an optional module can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is absent
        return False


# --------------------------------------------------------------------------- in this process


@contextmanager
def compose_job(directory: Path, *overrides: str) -> Iterator[DictConfig]:
    """Compose a job with the run directory `directory`, as Hydra does; `hydra:` resolves inside."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            full = compose(
                "train",
                overrides=[f"hydra.runtime.output_dir='{directory}'", *overrides],
                return_hydra_config=True,
            )
            HydraConfig.instance().set_config(full)
            job = copy.deepcopy(full)
            with open_dict(job):
                del job["hydra"]
            yield job
    finally:
        HydraConfig.instance().cfg = None
        GlobalHydra.instance().clear()


def run_here(directory: Path, *overrides: str) -> Run:
    """Run `train.py` with these overrides in this process and put its global settings back."""
    directory.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    lightning_log = logging.getLogger("lightning.pytorch")
    level = lightning_log.level
    try:
        with compose_job(directory, *overrides) as cfg:
            return Run(directory, train(cfg))
    finally:
        lightning_log.setLevel(level)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


# --------------------------------------------------------------------------- as a user does


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "PL_GLOBAL_SEED")}
    return {**kept, "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **(extra or {})}


def run_python(
    *arguments: str,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on `arguments`; the exit status is the caller's to check."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_train(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run `python train.py` and fail with its output if it fails."""
    done = run_python("train.py", *arguments, environment=environment, timeout=timeout)
    assert done.returncode == 0, f"train.py {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


def kill_when(condition: Callable[[], bool], *arguments: str, timeout: float = 120) -> None:
    """Start `python train.py`, and SIGKILL it as soon as `condition` holds.

    Raises:
        AssertionError: If it ended by itself before, or the condition never held.
    """
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=_environment(None),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + timeout
    try:
        while not condition():
            if process.poll() is not None:
                raise AssertionError(
                    f"it ended before it could be killed:\n{process.stdout.read()}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"the moment to kill it did not come within {timeout} s")
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended by itself"
