"""Converted models on disk: `model.safetensors` beside `mlkit.json`, and nothing that executes."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlkit.convert import (
    _CONVERTERS,
    _apply,
    _by_config,
    _is_meta,
    _qualified,
    conversions,
    restore,
)
from mlkit.errors import InvalidValueError, RunError, UnknownNameError, nearest

__all__ = ["load", "save"]

WEIGHTS, SETTINGS = "model.safetensors", "mlkit.json"
FORMAT = 1


def save(model: nn.Module, directory: Path) -> None:
    """Write a model; see `mlkit.convert.save_pretrained`."""
    import mlkit

    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    kept: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InvalidValueError(
                f"state {key!r} is a {type(value).__name__}; only tensors can be saved without "
                "pickle: remove it or make it a tensor"
            )
        if value.is_meta:
            raise InvalidValueError(f"{key!r} is on the meta device: there is nothing to save")
        place = (value.data_ptr(), value.dtype, value.shape, value.stride(), str(value.device))
        if value.numel() and place in kept:
            tied[key] = kept[place]
        else:
            kept[place] = key
            tensors[key] = value.detach().contiguous()
    if len({t.untyped_storage().data_ptr() for t in tensors.values()}) < len(tensors):
        tensors = {key: value.clone() for key, value in tensors.items()}
    settings = {
        "format": FORMAT,
        "mlkit_version": mlkit.__version__,
        "tied": tied,
        "conversions": [
            {
                "config_type": _registered(config),
                "config": _fields(config),
                "targets": names,
            }
            for config, names in _by_config(conversions(model))
        ],
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, {"format": "pt", "mlkit": mlkit.__version__})
    (directory / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def load(model: nn.Module, directory: Path) -> None:
    """Convert and fill a model; see `mlkit.convert.load_pretrained`."""
    settings = _read(directory)
    planned = [(_make_config(entry), list(entry["targets"])) for entry in settings["conversions"]]
    done = conversions(model)
    if done:
        asked = {name: config for config, names in planned for name in names}
        if done != asked:
            raise RunError(
                f"the model is converted ({_summary(done)}) in another way than the one in "
                f"{directory} ({_summary(asked)}); mlkit.restore(model) first"
            )
    else:
        _check_names(model, directory, [name for _, names in planned for name in names])
    try:
        if not done:
            for config, names in planned:
                _apply(model, config, names, strict=True, structure_only=True)
        _load_tensors(model, directory, settings["tied"])
    except Exception:
        if not done and conversions(model):
            restore(model)
        raise


def _read(directory: Path) -> dict[str, Any]:
    for name in (SETTINGS, WEIGHTS):
        if not (directory / name).is_file():
            raise InvalidValueError(
                f"{directory} has no {name}: mlkit's save_pretrained did not write it; a stock "
                "checkpoint is loaded as ever, before or after mlkit.convert"
            )
    try:
        settings = json.loads((directory / SETTINGS).read_text())
        number = settings["format"]
        _ = settings["conversions"], settings["tied"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InvalidValueError(f"{directory / SETTINGS} is damaged: {error!r}") from error
    if number != FORMAT:
        raise InvalidValueError(
            f"{directory / SETTINGS} has format {number!r} (by mlkit "
            f"{settings.get('mlkit_version')}), this mlkit reads {FORMAT}"
        )
    return dict(settings)


def _registered(config: Any) -> str:
    names = [_qualified(cls) for cls in type(config).__mro__]
    return next(name for name in names if name in _CONVERTERS)


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def _make_config(entry: dict[str, Any]) -> Any:
    name = entry["config_type"]
    if name not in _CONVERTERS:
        raise UnknownNameError(
            f"the saved model was converted by {name!r}, which is not registered here; "
            f"{nearest(name, _CONVERTERS)}"
        )
    module, cls = name.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), cls)(**entry["config"])
    except TypeError as error:
        raise InvalidValueError(f"cannot make {cls} from the saved fields: {error}") from error


def _check_names(model: nn.Module, directory: Path, names: list[str]) -> None:
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in known:
            raise InvalidValueError(
                f"{directory} holds a model with a converted {name!r}, which "
                f"{type(model).__name__} does not have; {nearest(name, known)}"
            )


def _load_tensors(model: nn.Module, directory: Path, tied: dict[str, str]) -> None:
    try:
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise InvalidValueError(f"{directory / WEIGHTS} is damaged: {error}") from error
    tensors |= {alias: tensors[key] for alias, key in tied.items()}
    _check_fit(model, directory, tensors)
    assign = _is_meta(model)
    try:
        model.load_state_dict(tensors, strict=True, assign=assign)
    except RuntimeError as error:
        raise InvalidValueError(f"{directory} does not fit the model: {error}") from error
    if assign:
        for alias, key in tied.items():
            owner, _, name = alias.rpartition(".")
            kept_owner, _, kept = key.rpartition(".")
            if name == "_extra_state":  # each module took its own
                continue
            value = getattr(model.get_submodule(kept_owner), kept)
            setattr(model.get_submodule(owner), name, value)


def _check_fit(model: nn.Module, directory: Path, tensors: dict[str, Tensor]) -> None:
    """Say what does not fit before anything is copied."""
    expected = model.state_dict()
    wrong = [f"no {key}" for key in expected if key not in tensors]
    wrong += [f"{key}, which the model has not" for key in tensors if key not in expected]
    wrong += [
        f"{key} of shape {tuple(value.shape)}, in the model {tuple(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape and not _resizes(model, key)
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise InvalidValueError(
            f"{directory} does not fit the model: it holds {'; '.join(wrong[:5])}{more}"
        )


def _resizes(model: nn.Module, key: str) -> bool:
    """Whether the module of a key of the state takes tensors of other shapes than its own."""
    owner = key.rpartition(".")[0]
    found = dict(model.named_modules(remove_duplicate=False)).get(owner)
    return bool(getattr(found, "resizes_on_load", False))


def _summary(done: dict[str, Any]) -> str:
    groups = _by_config(done)
    return "; ".join(f"{len(names)} modules by {config!r}" for config, names in groups) or "not"
