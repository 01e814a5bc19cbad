"""The directory of a run on disk: whose it is, whether it is finished, who is running in it."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import mlkit
from mlkit.errors import RunError
from mlkit.report import is_global_zero, read_json, write_json

__all__ = [
    "close_run",
    "config_identity",
    "finished_metrics",
    "git_state",
    "newest_unfinished",
    "open_run",
    "read_state",
    "release_run",
]

_NOT_IDENTITY = ("paths", "logger", "ckpt_path", "optimized_metric", "trainer.profiler")
"""Keys that say where and how a run reports, not what it computes."""


def config_identity(cfg: DictConfig) -> dict[str, Any]:
    """What a configuration computes, as plain data: two runs with the same one are the same run."""
    content = copy.deepcopy(cfg)
    OmegaConf.set_readonly(content, False)
    OmegaConf.set_struct(content, False)
    for key in _NOT_IDENTITY:
        if key != "paths":  # others refer to it
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(content, parent) if parent else content
            if isinstance(node, DictConfig):
                node.pop(name, None)
    plain = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    kept = {str(k): v for k, v in plain.items() if k != "paths"}
    for value in kept.values():
        if isinstance(value, dict):
            value.pop("stage", None)
    return kept


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def read_state(directory: Path) -> dict[str, Any] | None:
    """What `run.json` says of a run directory; None where there is no run."""
    path = directory / "run.json"
    return read_json(path) if path.is_file() else None


def finished_metrics(directory: Path, cfg: DictConfig) -> dict[str, float] | None:
    """Metrics of a finished run in `directory`, None if there is work to do.

    Raises:
        RunError: If the directory belongs to a run with another configuration.
    """
    state = read_state(directory)
    if state is None:
        return None
    identity = config_identity(cfg)
    if state["config_hash"] != _hash(identity):
        raise RunError(
            f"{directory} holds a run with another configuration (differs in "
            f"{', '.join(_differences(state['identity'], identity)) or 'nothing visible'}); choose "
            "another hydra.run.dir, or repeat the first run's overrides to resume it"
        )
    metrics = directory / "metrics.json"
    if state["status"] != "finished" or state.get("stage") != _stages(cfg):
        return None
    return read_json(metrics) if metrics.is_file() else None


def _stages(cfg: DictConfig) -> dict[str, str]:
    """How far each system's run is to go."""
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    return {str(k): v["stage"] for k, v in plain.items() if isinstance(v, dict) and "stage" in v}


def _differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return [] if first == second else [prefix.rstrip(".")]
    keys = sorted({*first, *second})
    missing = object()
    return [
        key
        for k in keys
        for key in _differences(first.get(k, missing), second.get(k, missing), f"{prefix}{k}.")
    ]


def open_run(directory: Path, cfg: DictConfig, system: str) -> None:
    """Mark the directory as this run's.

    Raises:
        RunError: If it cannot be written, or another process is running there.
    """
    if not is_global_zero():
        return
    identity = config_identity(cfg)
    state = {
        "status": "running",
        "recipe": system,
        "stage": _stages(cfg),
        "config_hash": _hash(identity),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "mlkit": mlkit.__version__,
        "python": platform.python_version(),
        "git": git_state(),
        "identity": identity,
    }
    try:
        if not _lock(directory):
            raise RunError(
                f"another process is running in {directory}; wait for it, or choose another "
                "hydra.run.dir"
            )
        write_json(directory / "run.json", state)
        OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
    except OSError as error:
        raise RunError(
            f"cannot write the run directory {directory}: {error.strerror}; choose another with "
            "hydra.run.dir=... or paths.output_root=..."
        ) from error


def close_run(directory: Path, state: Mapping[str, Any] | None = None) -> None:
    """Mark the run as finished, or put back what `run.json` said before."""
    current = read_state(directory) or {}
    write_json(directory / "run.json", state or {**current, "status": "finished"})


def release_run(directory: Path) -> None:
    """Let other processes run in a directory that `open_run` took."""
    if directory in _locks:
        os.close(_locks.pop(directory))


_locks: dict[Path, int] = {}
"""Open lock files of this process's runs; the system lets go of them when the process ends."""


def _lock(directory: Path) -> bool:
    """Take the lock of a run directory; False if another process has it."""
    if directory in _locks:
        return True
    file = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    _locks[directory] = file
    return True


def _is_locked(directory: Path) -> bool:
    if directory not in _locks and _lock(directory):
        release_run(directory)
        return False
    return True


def git_state() -> dict[str, Any]:
    """Commit of the clone the run started from, and whether it had been changed."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except FileNotFoundError:
        return {}


def newest_unfinished(root: Path, cfg: DictConfig) -> Path | None:
    """The newest directory below `root` of a run of `cfg` that stopped before its end."""
    wanted = _hash(config_identity(cfg))
    found = []
    for path in root.glob("*/run.json"):
        state = read_state(path.parent) or {}
        is_same = state.get("status") == "running" and state.get("config_hash") == wanted
        if is_same and not _is_locked(path.parent):
            found.append((state["started"], path.parent))
    return max(found)[1] if found else None
