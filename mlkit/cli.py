"""The command line around Hydra: find the run to resume, explain what could not be composed."""

from __future__ import annotations

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
from mlkit.run import newest_unfinished

__all__ = ["explain", "prepare"]


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
    if "ckpt_path=auto" not in arguments or any(
        a.startswith(("hydra.run.dir=", "-")) for a in arguments
    ):
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
        cfg = _compose(conf, [a for a in kept if "=" in a and not a.startswith(("hydra", "-"))])
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
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return compose("train", overrides=list(arguments))
