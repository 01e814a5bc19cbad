"""Run a recipe: check the configuration, open the run directory, run, write the report.

Imports no torch. The order matters: what can be refused without loading anything is refused first.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import mlkit
from mlkit.errors import InvalidValueError, MlkitError, RunError, nearest
from mlkit.report import Report, RunContext, is_global_zero, write_json

__all__ = ["config_identity", "newest_unfinished", "train"]

log = logging.getLogger(__name__)

_NOT_IDENTITY = ("paths", "logger", "ckpt_path", "optimized_metric", "trainer.profiler")
"""Keys that say where and how a run reports, not what it computes."""


def train(cfg: DictConfig) -> float | None:
    """Run the recipe of a composed configuration inside a Hydra job.

    Returns:
        The metric named by `optimized_metric`, for sweepers; None without one.

    Raises:
        MlkitError: For a configuration that cannot run, before anything is loaded.
    """
    hydra = HydraConfig.get()
    system = hydra.runtime.choices["recipe"]
    directory = Path(hydra.runtime.output_dir)
    if cfg.get("ckpt_path") not in (None, "auto"):
        raise InvalidValueError(
            f"ckpt_path must be null or auto, got {cfg.ckpt_path!r}; to resume a certain run, give "
            "its folder: hydra.run.dir=..."
        )
    settings = build(cfg[system])
    parts = {"data": build(cfg.data)}
    parts["data"].check_files()
    metrics = _finished_metrics(directory, cfg)
    if metrics is None:
        _open(directory, cfg, system)
        report = _run(cfg, directory, settings, parts)
        metrics = report.metrics
        if is_global_zero():
            report.write(directory)
            _set_status(directory, "finished")
            report.show()
            print(f"\nrun directory: {directory}")
    else:
        log.info("%s is finished already; delete it to run again", directory)
        print((directory / "report.md").read_text())
    return _optimized(cfg.get("optimized_metric"), metrics)


def build(node: DictConfig) -> Any:
    """Instantiate a configuration node; an mlkit error inside comes out as itself."""
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MlkitError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise


def _run(cfg: DictConfig, directory: Path, settings: Any, parts: Mapping[str, Any]) -> Report:
    loggers = _open_loggers(cfg)
    context = RunContext(directory, cfg.seed, loggers if is_global_zero() else ())
    nodes = {k: node for k, node in cfg.recipe.items() if not str(k).startswith("_")}
    recipe_class = get_object(cfg.recipe._target_)
    if cfg.num_threads:
        import torch

        torch.set_num_threads(cfg.num_threads)
    recipe = recipe_class(settings=settings, **parts, **nodes)
    status = "failed"
    try:
        report: Report = recipe.run(context)
        for logger in context.loggers:
            logger.log_metrics(report.metrics)
        status = "success"
    except KeyboardInterrupt:
        log.warning("interrupted; to go on, give the same command with hydra.run.dir=%s", directory)
        raise
    finally:
        for logger in loggers:
            logger.finalize(status)
        if "wandb" in sys.modules:  # or the next job of a sweep would log to this run
            sys.modules["wandb"].finish(exit_code=int(status != "success"))
    return report


def _open_loggers(cfg: DictConfig) -> list[Any]:
    with warnings.catch_warnings():
        # A resumed run logs its finished units again, so nothing is lost.
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        loggers = [instantiate(node) for node in (cfg.get("logger") or {}).values()]
        for logger in loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    return loggers


# --------------------------------------------------------------------------- run directory


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


def _read_state(directory: Path) -> dict[str, Any] | None:
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _finished_metrics(directory: Path, cfg: DictConfig) -> dict[str, float] | None:
    """Metrics of a finished run in `directory`, None if there is work to do.

    Raises:
        RunError: If the directory belongs to a run with another configuration.
    """
    state = _read_state(directory)
    if state is None:
        return None
    identity = config_identity(cfg)
    if state["config_hash"] != _hash(identity):
        raise RunError(
            f"{directory} holds a run with another configuration (differs in "
            f"{', '.join(_differences(state['identity'], identity)) or 'nothing visible'}); choose "
            "another hydra.run.dir, or repeat the first run's overrides to resume it"
        )
    stage = {k: v.get("stage") for k, v in OmegaConf.to_container(cfg).items() if _has_stage(v)}  # type: ignore[union-attr]
    if state["status"] != "finished" or state.get("stage") != stage:
        return None
    return json.loads((directory / "metrics.json").read_text())


def _has_stage(value: Any) -> bool:
    return isinstance(value, dict) and "stage" in value


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


def _open(directory: Path, cfg: DictConfig, system: str) -> None:
    """Mark the directory as this run's; refuse one that cannot be written."""
    if not is_global_zero():
        return
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    identity = config_identity(cfg)
    state = {
        "status": "running",
        "recipe": system,
        "stage": {k: v.get("stage") for k, v in plain.items() if _has_stage(v)},
        "config_hash": _hash(identity),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "mlkit": mlkit.__version__,
        "python": platform.python_version(),
        "git": _git_state(),
        "identity": identity,
    }
    try:
        write_json(directory / "run.json", state)
        OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
    except OSError as error:
        raise RunError(
            f"cannot write the run directory {directory}: {error.strerror}; choose another with "
            "hydra.run.dir=... or paths.output_root=..."
        ) from error


def _set_status(directory: Path, status: str) -> None:
    state = _read_state(directory) or {}
    write_json(directory / "run.json", {**state, "status": status})


def _git_state() -> dict[str, Any]:
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
    """The newest unfinished run directory below `root` with the configuration `cfg`."""
    wanted = _hash(config_identity(cfg))
    found = []
    for path in root.glob("*/run.json"):
        state = _read_state(path.parent) or {}
        if state.get("status") == "running" and state.get("config_hash") == wanted:
            found.append((state["started"], path.parent))
    return max(found)[1] if found else None


def _optimized(name: str | None, metrics: Mapping[str, float]) -> float | None:
    if name is None:
        return None
    if name not in metrics:
        raise InvalidValueError(
            f"optimized_metric={name} is not a metric of this run; {nearest(name, metrics)}"
        )
    return metrics[name]
