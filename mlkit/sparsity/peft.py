"""LoRA on a model with LTE layers: the routers trained in full, the projections by adapters.

The paper (Zheng et al. 2024, arXiv 2402.06126) trains all weights and leaves this for later; the
combination is ours. Convert first, then add adapters: PEFT keeps a copy of each router to train
(`modules_to_save`), with the order of the neurons, mode and threshold in it, so that a saved
adapter holds all that LTE adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from mlkit.errors import InvalidValueError, MissingDependencyError
from mlkit.sparsity.module import lte_layers, site_of

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["lte_lora_config"]


def lte_lora_config(
    model: nn.Module, r: int = 8, *, also: Iterable[str] = (), **settings: Any
) -> LoraConfig:
    """Return a `LoraConfig` for the projections of all LTE layers and their routers.

    The projections are named in full, since names like `c_proj` and `output.dense` also occur in
    attention. The first half of an OPT or ALBERT layer is itself the LTE layer, which PEFT cannot
    adapt: there, the second half is.

    Args:
        model: Converted by `LTEConfig`.
        r: Rank of the adapters.
        also: Other modules to adapt, as in `LoraConfig.target_modules`: ("q_proj", "v_proj").
        settings: Further arguments of `LoraConfig`: lora_alpha, lora_dropout, task_type, ...

    Raises:
        RunError: If there is no LTE layer.
        InvalidValueError: If no projection can be adapted, or one is adapted already.
        MissingDependencyError: Without PEFT.

    Example:
        >>> from peft import get_peft_model  # doctest: +SKIP
        >>> model = get_peft_model(model, lte_lora_config(model, r=16))  # doctest: +SKIP
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingDependencyError(
            "lte_lora_config needs peft: pip install 'mlkit-torch[hf]'"
        ) from error
    if "target_modules" in settings:
        raise InvalidValueError(
            "target_modules is what lte_lora_config finds; name other modules by also=(...)"
        )
    targets: list[str] = []
    kinds: set[str] = set()
    for name, layer in lte_layers(model).items():
        site, layout = site_of(model, name, layer), layer.layout
        outer = name.removesuffix(layout.host).removesuffix(".") if layout.host else name
        for part in filter(None, (layout.gate_proj, layout.in_proj, layout.out_proj)):
            linear = site.get_submodule(part)
            if hasattr(linear, "base_layer"):
                raise InvalidValueError(f"{outer}.{part} has an adapter already")
            if linear is not layer:
                targets.append(f"{outer}.{part}" if outer else part)
                kinds.add(type(linear).__name__)
    if not targets:
        raise InvalidValueError("no projection of the LTE layers can be adapted")
    routers = ["router", *(settings.pop("modules_to_save", None) or ())]
    return LoraConfig(
        r=r,
        target_modules=[*targets, *also],
        modules_to_save=routers,
        fan_in_fan_out=settings.pop("fan_in_fan_out", kinds == {"Conv1D"}),
        **settings,
    )
