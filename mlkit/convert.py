"""The one verb for modules: `mlkit.convert(model, config)` swaps parts of a model in place.

The type of the config says what happens: each room names its converter in a table of strings, so
that this file imports no room, and no torch either before a model is there. `mlkit.convert` is
this file's function (`mlkit/__init__.py` binds it at import, so it is never the module); the rest
comes by `from mlkit.convert import ConversionReport, save_pretrained`.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mlkit._conversion_report import Candidate, ConversionReport, ConversionRow, Cost
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Candidate",
    "ConversionReport",
    "ConversionRow",
    "Converter",
    "Cost",
    "conversions",
    "convert",
    "load_pretrained",
    "register_converter",
    "restore",
    "save_pretrained",
]

_CONVERTERS: dict[str, str] = {
    "mlkit.embeddings.fiited.config.FIITEDConfig": (
        "mlkit.embeddings.fiited.converter:FIITEDConverter"
    ),
    "mlkit.sparsity.config.LTEConfig": "mlkit.sparsity.converter:LTEConverter",
    **{
        f"mlkit.embeddings.baselines.config.{name}": (
            "mlkit.embeddings.baselines.converter:BaselineConverter"
        )
        for name in ("CAFEConfig", "HashingConfig", "MDEConfig", "NarrowConfig", "QRConfig")
    },
}
_TAG = "_mlkit_conversion"


@runtime_checkable
class Converter(Protocol):
    """What a room provides for one type of config; made anew, without arguments, for each call.

    A *site* is what a target names. The replacements may be the site itself or modules inside it
    (a layer of BERT keeps its attention). `save_pretrained` writes the config as JSON by its
    dataclass fields and `load_pretrained` makes it by its constructor, which must accept lists
    where it holds tuples. What else belongs to a converted module and is no parameter (a mode) goes
    into a buffer or, as a tensor, into `get_extra_state`, so that every checkpoint has it.
    """

    def candidates(self, model: nn.Module, config: Any) -> list[Candidate]:
        """Every site in the model under the first of its names; refused ones with the reason.

        Converted sites need not be among them, unless the config leaves them out.
        """
        ...

    def build(
        self, model: nn.Module, names: Sequence[str], config: Any, *, structure_only: bool
    ) -> Mapping[str, nn.Module]:
        """New modules for these sites, by their full names; the model is not touched yet.

        With `structure_only`, weights will be loaded afterwards: compute nothing from the present.
        """
        ...

    def restore(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, nn.Module]:
        """Stock modules for these converted sites, by the full names of what they replace."""
        ...

    def cost(self, site: nn.Module) -> Cost:
        """The cost of what this converter changes in a site, before and after conversion."""
        ...


@dataclass
class _Tag:
    """Written on a converted site; it survives deepcopy, pickle and a new parent."""

    config: Any
    kind: str


# ------------------------------------------------------------------- registry


def register_converter(config_type: type | str, path: str) -> None:
    """Say which converter serves a type of config.

    Args:
        config_type: The class, or its qualified name ("package.module.Class").
        path: Where the `Converter` is: "package.module:Class"; imported on first use.

    Raises:
        InvalidValueError: If the path has no colon, or the type has another converter.
    """
    name = config_type if isinstance(config_type, str) else _qualified(config_type)
    if path.count(":") != 1:
        raise InvalidValueError(f"path must read 'package.module:Class', got {path!r}")
    if _CONVERTERS.setdefault(name, path) != path:
        raise InvalidValueError(f"{name} already has the converter {_CONVERTERS[name]}")


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _converter(config: Any) -> Converter:
    if isinstance(config, type):
        raise InvalidTypeError(
            f"config must be an instance, got the class {config.__name__}: "
            f"write {config.__name__}(...)"
        )
    for cls in type(config).__mro__:
        if path := _CONVERTERS.get(_qualified(cls)):
            module, name = path.split(":")
            made: Converter = getattr(importlib.import_module(module), name)()
            return made
    known = ", ".join(sorted(name.rsplit(".", 1)[1] for name in _CONVERTERS))
    raise InvalidTypeError(
        f"no converter for a config of type {_qualified(type(config))}; known: {known}. "
        "register_converter (of mlkit.convert) adds others"
    )


# --------------------------------------------------------------------- verbs


def convert(
    model: nn.Module, config: Any, targets: str | Iterable[str] = "auto", *, strict: bool = True
) -> ConversionReport:
    """Replace modules of a model in place, as the type of the config says.

    Parameters are moved, not copied; keys of the `state_dict` outside the replaced modules stay. A
    module that is reached by several names is converted once and stays shared. On the `meta`
    device the structure is built and the rest comes with the weights. If anything is wrong, the
    model is left as it was.

    Args:
        model: Changed in place. It must hold the targets; it cannot be one itself.
        config: For instance `mlkit.sparsity.LTEConfig(...)`.
        targets: "auto" (every module that the converter knows), or names or patterns
            (`fnmatch`: "*.mlp", "layers.[01].mlp").
        strict: Raise if one target matches nothing, or if a module that was asked for cannot be
            converted; otherwise such modules are rows of the report. Targets of which none
            matches always raise.

    Returns:
        What was replaced and what was not.

    Raises:
        InvalidValueError: For targets as above, or a model that this config cannot convert.
        InvalidTypeError: For a config without converter.
        RunError: If a target is converted already.
    """
    _check_model(model)
    return _apply(model, config, targets, strict=strict, structure_only=_is_meta(model))


def _apply(
    model: nn.Module,
    config: Any,
    targets: str | Iterable[str],
    *,
    strict: bool,
    structure_only: bool,
) -> ConversionReport:
    converter = _converter(config)
    patterns = None if targets == "auto" else _patterns(targets)
    done = conversions(model)
    candidates = converter.candidates(model, config)
    left_out = {c.name for c in candidates if c.left_out}
    _refuse_converted(config, patterns, {n: c for n, c in done.items() if n not in left_out})
    known = [
        candidate
        for candidate in candidates
        if not any(candidate.name == name or _is_inside(candidate.name, name) for name in done)
    ]
    wanted = known if patterns is None else _select(model, known, patterns, strict)
    wanted = [c for c in wanted if c.left_out is None]
    refused = {c.name: c.refusal for c in wanted if c.refusal is not None}
    chosen = [c for c in wanted if c.refusal is None]
    if not known:
        raise InvalidValueError(
            f"{type(config).__name__} finds nothing to convert in {type(model).__name__}; "
            f"the classes of its modules, and the first of each: {_classes(model)}"
        )
    if not wanted:
        raise InvalidValueError(
            f"nothing is left to convert: {known[0].name} is {known[0].left_out}"
        )
    if refused and (strict or not chosen):
        first = [f"{name}: {reason}" for name, reason in list(refused.items())[:3]]
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        hint = "" if not chosen else "; strict=False leaves these out"
        raise InvalidValueError(f"cannot convert {'; '.join(first)}{more}{hint}")
    names = [c.name for c in chosen]
    before = {name: converter.cost(model.get_submodule(name)) for name in names}
    new = dict(converter.build(model, names, config, structure_only=structure_only))
    _check_root(model, new)
    _put(model, new, set(names))
    kinds = {c.name: c.kind for c in chosen}
    for name in names:
        model.get_submodule(name).__dict__[_TAG] = _Tag(config, kinds[name])
    rows = []
    for c in known:
        if c.name in before:
            after = converter.cost(model.get_submodule(c.name))
            rows.append(ConversionRow(c.name, c.kind, "replaced", "", before[c.name], after))
        else:
            reason = c.refusal if c in wanted else c.left_out or "not among the targets"
            rows.append(ConversionRow(c.name, c.kind, "skipped", reason or ""))
    return ConversionReport(config, tuple(rows))


def restore(model: nn.Module) -> list[str]:
    """Put stock modules back in place of the converted ones, with the trained weights.

    Returns:
        Names of the modules that were put back.

    Raises:
        RunError: If nothing in the model is converted.
    """
    _check_model(model)
    done = conversions(model)
    if not done:
        raise RunError(f"nothing in {type(model).__name__} is converted: there is nothing to undo")
    for config, names in _by_config(done):
        new = dict(_converter(config).restore(model, names))
        _check_root(model, new)
        for name in names:
            model.get_submodule(name).__dict__.pop(_TAG, None)
        _put(model, new, set(names))
    return list(done)


def save_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Write the weights as safetensors, and configs, targets and version as JSON.

    Raises:
        InvalidValueError: If the state of the model holds something that is not a tensor.
    """
    from mlkit._pretrained import save

    save(model, Path(directory))


def load_pretrained(model: nn.Module, directory: str | Path) -> nn.Module:
    """Convert a stock model as a saved one was, and load its weights; no pickle is read.

    Args:
        model: The unconverted model, or one converted in the same way; on the `meta` device it
            takes the tensors as they are in the file.
        directory: What `save_pretrained` wrote.

    Returns:
        The model.

    Raises:
        InvalidValueError: If the files are absent or do not fit the model.
        RunError: If the model is converted in another way.
    """
    from mlkit._pretrained import load

    _check_model(model)
    load(model, Path(directory))
    return model


def conversions(model: nn.Module) -> dict[str, Any]:
    """Return the config of every converted site by its (first) name in the model."""
    return {
        name: module.__dict__[_TAG].config
        for name, module in model.named_modules()
        if _TAG in module.__dict__
    }


# -------------------------------------------------------------------- helpers


def _check_model(model: nn.Module) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _is_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def _is_inside(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(parent + ".")


def _by_config(done: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    groups: list[tuple[Any, list[str]]] = []
    for name, config in done.items():
        for known, names in groups:
            if type(known) is type(config) and known == config:
                names.append(name)
                break
        else:
            groups.append((config, [name]))
    return groups


def _classes(model: nn.Module) -> str:
    counts = Counter(type(m).__name__ for m in model.modules())
    first: dict[str, str] = {}
    for name, module in model.named_modules():
        first.setdefault(type(module).__name__, name or "the model")
    return ", ".join(f"{kind} x{count} ({first[kind]})" for kind, count in counts.most_common(15))


def _patterns(targets: str | Iterable[str]) -> list[str]:
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise InvalidValueError(f"targets must be 'auto' or names or patterns, got {targets!r}")
    return patterns


def _refuse_converted(config: Any, patterns: list[str] | None, done: Mapping[str, Any]) -> None:
    same = [name for name, other in done.items() if type(other) is type(config)]
    if patterns is not None:
        same = [name for name in done if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if same:
        raise RunError(
            f"{same[0]!r} is already converted by {done[same[0]]!r} ({len(same)} such modules); "
            "mlkit.restore(model) first, or name other targets"
        )


def _select(
    model: nn.Module, known: list[Candidate], patterns: list[str], strict: bool
) -> list[Candidate]:
    aliases: dict[int, list[str]] = {}
    everything = dict(model.named_modules(remove_duplicate=False))
    for name, module in everything.items():
        aliases.setdefault(id(module), []).append(name)
    chosen: dict[str, Candidate] = {}
    unmatched: list[str] = []
    left_out: dict[str, Candidate] = {}
    for pattern in patterns:
        if pattern == "":
            raise InvalidValueError(
                "targets names the model itself, which cannot be replaced in place; wrap it "
                "(nn.Sequential(model)) or use the constructor of the new module"
            )
        hits = [
            c
            for c in known
            if any(fnmatch.fnmatchcase(n, pattern) for n in aliases[id(everything[c.name])])
        ]
        chosen |= {c.name: c for c in hits}
        if not hits:
            unmatched.append(pattern)
        elif all(c.left_out for c in hits):
            left_out[pattern] = hits[0]
    if unmatched and (strict or not chosen):
        raise InvalidValueError(_no_match(unmatched[0], everything, known))
    if left_out and (strict or all(c.left_out for c in chosen.values())):
        pattern, first = next(iter(left_out.items()))
        raise InvalidValueError(
            f"target {pattern!r} matches only what the config leaves out: {first.name} is "
            f"{first.left_out}"
        )
    return [c for c in known if c.name in chosen]


def _no_match(pattern: str, everything: Mapping[str, nn.Module], known: list[Candidate]) -> str:
    others = [name for name in everything if name and fnmatch.fnmatchcase(name, pattern)]
    if others:
        kind = type(everything[others[0]]).__name__
        return (
            f"target {pattern!r} matches {len(others)} modules, but none that this config can "
            f"convert (first: {others[0]!r}, a {kind}); {nearest(pattern, [c.name for c in known])}"
        )
    names = [c.name for c in known] or [name for name in everything if name]
    return f"target {pattern!r} matches no module; {nearest(pattern, names)}"


def _check_root(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    if "" in new:
        raise InvalidValueError(
            f"the model itself ({type(model).__name__}) would have to be replaced, which cannot be "
            "done in place; wrap it (nn.Sequential(model)) or use the constructor of the new module"
        )


def _put(model: nn.Module, new: Mapping[str, nn.Module], sites: set[str]) -> None:
    """Set new modules; a site is replaced wherever it occurs, a part of one only there."""
    shared = {id(model.get_submodule(n)): module for n, module in new.items() if n in sites}
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and id(child) in shared:
                module._modules[key] = shared[id(child)]
    for name, module in new.items():
        if name not in sites:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = module
