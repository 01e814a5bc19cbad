"""The command line around Hydra: find the run to resume, explain what could not be composed."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlkit.errors import MlkitError, nearest
from mlkit.run_directory import newest_unfinished

__all__ = ["explain", "prepare", "short_name"]


def prepare(arguments: Sequence[str], conf: Path) -> list[str]:
    """Complete a command line before Hydra sees it.

    `--help` works without a recipe, and `ckpt_path=auto` becomes the newest unfinished run
    directory with the same configuration, if there is one.

    Args:
        arguments: The command line without the program.
        conf: The configuration folder.
    """
    if {"--help", "-h"} & set(arguments) and not _choice(arguments, "recipe"):
        first = min(path.stem for path in (conf / "recipe").glob("*.yaml"))
        return [*arguments, f"recipe={first}"]
    is_wanted = any(re.fullmatch(r"\+{0,2}ckpt_path=auto", a) for a in arguments)
    is_settled = any(a.startswith("hydra.run.dir=") for a in arguments)
    if not is_wanted or is_settled or {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    cfg = _compose(conf, arguments)
    found = newest_unfinished(Path(cfg.paths.output_root) / _choice(arguments, "recipe"), cfg)
    return [*arguments, f"hydra.run.dir={found}"] if found else list(arguments)


def explain(error: Exception, arguments: Sequence[str], conf: Path) -> str:
    """Say in a few lines what was wrong with a command, what exists and what is nearest."""
    if isinstance(error, MlkitError):
        return f"error: {error}"
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return (
            f"error: {error.strerror or error}: {error.filename}. If this is the run directory, "
            "choose another with hydra.run.dir=... or paths.output_root=..."
        )
    text = str(error).strip()
    key = re.search(r"(?:Could not override|Key) '([\w./]+)'", text)
    if key and isinstance(error, ConfigCompositionException):
        return f"error: {text.splitlines()[0]}\n{_hint_key(key.group(1), arguments, conf)}"
    missing = re.search(r"Could not find '([\w]+)/([\w./-]+)'", text) or re.search(
        r"In '.*?': Could not find '([\w]+)/([\w./-]+)'", text
    )
    if missing:
        group, option = missing.groups()
        if group == "hydra":
            extra = "ray" if option.endswith("/ray") else "sweeps"
            return (
                f"error: Hydra's {option} is not installed: pip install 'mlkit-torch[{extra}]' "
                f"(from a clone: pip install -e '.[{extra}]')"
            )
        return f"error: there is no {group} {option!r}; {_known(conf, group, option)}"
    group_error = re.search(r"Could not override '([\w/]+)'\.?\s*\n?No match in the defaults", text)
    if group_error or "No match in the defaults list" in text:
        groups = sorted(p.name for p in conf.iterdir() if p.is_dir())
        return f"error: {text.splitlines()[0]}\nconfiguration groups: {', '.join(groups)}"
    if "You must specify 'recipe'" in text:
        return f"error: choose a recipe: python train.py recipe=...; {_known(conf, 'recipe', '')}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        detail = f"\n{cause}" if cause is not None and str(cause) not in text else ""
        if cause is not None and not isinstance(cause, HydraException | OmegaConfBaseException):
            detail = "\n" + "".join(traceback.format_exception(cause)).rstrip()
        return f"error: {text}{detail}"
    raise error


def _known(conf: Path, group: str, option: str) -> str:
    folder = conf / group
    if not folder.is_dir():
        return nearest(group, (p.name for p in conf.iterdir() if p.is_dir()))
    options = [
        p.relative_to(folder).with_suffix("").as_posix() for p in sorted(folder.rglob("*.yaml"))
    ]
    hint = nearest(option, options)
    known = "known: " + ", ".join(options)
    return known if hint == known else f"{hint} ({known})"


def _hint_key(key: str, arguments: Sequence[str], conf: Path) -> str:
    """Which keys exist where a misspelt one was looked for."""
    kept = [a for a in arguments if not re.match(rf"[+~]*{re.escape(key)}(@|=|$)", a)]
    try:
        cfg = _compose(conf, kept)
    except (HydraException, OmegaConfBaseException):
        return "known keys: python train.py --cfg job"
    path = key.split(".")
    node: object = cfg
    for depth, name in enumerate(path):
        if isinstance(node, DictConfig) and name in node and depth < len(path) - 1:
            node = OmegaConf.select(cfg, ".".join(path[: depth + 1]))
            continue
        keys = [str(k) for k in node if k != "_target_"] if isinstance(node, DictConfig) else []
        where = ".".join(path[:depth])
        hint = nearest(name, keys)
        listing = f"keys of {where}" if where else "top-level keys"
        return f"{hint}\n{listing}: {', '.join(keys)}\n(add a new key with +{key}=...)"
    return "known keys: python train.py --cfg job"


def _choice(arguments: Sequence[str], group: str) -> str:
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"{group}=")), "")


def _compose(conf: Path, arguments: Sequence[str]) -> DictConfig:
    """Compose as Hydra's command line would; of its flags only --config-dir matters here."""
    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and a[0] != "-")]
    folders = re.findall(r"(?:--config-dir|-cd)[= ](\S+)", " ".join(arguments))
    if folders:
        paths = ",".join(f"file://{Path(folder).absolute()}" for folder in folders)
        overrides.append(f"hydra.searchpath=[{paths}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return compose("train", overrides=overrides)


def short_name(overrides: str, limit: int = 120) -> str:
    """A folder name for a job of a sweep: its overrides, or a part and a hash where too long.

    Example:
        >>> short_name("seed=1"), short_name("data.root=/a")
        ('seed=1', 'data.root=_a-7d0f75')
    """
    name = overrides.replace("/", "_")
    if name == overrides and len(name) <= limit:
        return name
    return f"{name[:limit]}-{hashlib.sha256(overrides.encode()).hexdigest()[:6]}"
