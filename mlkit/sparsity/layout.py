"""Where the parts of a feed-forward layer are, and which slices of its weights a neuron owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = [
    "FFNLayout",
    "FFNShape",
    "NeuronTensor",
    "inspect_layout",
    "permute_neurons",
    "reading_rows",
    "resize_neurons",
]

_ADAPTER_CHILD = "base_layer"


@dataclass(frozen=True)
class FFNLayout:
    """The parts of a feed-forward layer, as names relative to the module that holds them.

    It computes out(act(in(x))), or out(act(gate(x)) * in(x)) with a gate.

    Args:
        in_proj: Linear layer (or `Conv1D`) from hidden to intermediate size.
        out_proj: The one back.
        gate_proj: The one whose output goes through the activation, if there are three.
        act: Module that is the activation; None if `activation` names a function.
        activation: Name of a function ("silu", "gelu", ...).
        fused: `in_proj` yields gate and input side by side: chunk(2).
        dropout: Module applied to the result.
        host: Part that is replaced and then yields the masked intermediate values, if the module
            does more than the feed-forward computation; `out_proj` is then outside of it.
            "" replaces the module itself.
    """

    in_proj: str
    out_proj: str
    gate_proj: str | None = None
    act: str | None = None
    activation: str | None = None
    fused: bool = False
    dropout: str | None = None
    host: str = ""

    @property
    def is_gated(self) -> bool:
        """Whether a neuron has a gate."""
        return self.fused or self.gate_proj is not None


@dataclass(frozen=True)
class NeuronTensor:
    """A parameter with an axis of neurons.

    Args:
        key: Its name, relative to the module that holds the layer.
        dim: The axis.
        copies: How often the neurons follow one another on it: 2 if gate and input are fused.
    """

    key: str
    dim: int
    copies: int = 1

    def reorder(self, tensor: Tensor, order: Int[Tensor, " neurons"]) -> Tensor:
        """Return the tensor with its neurons in another order."""
        count = tensor.shape[self.dim] // self.copies
        index = torch.cat([order + i * count for i in range(self.copies)])
        return tensor.index_select(self.dim, index.to(tensor.device))

    def resize(self, tensor: Tensor, neurons: int) -> Tensor:
        """Return the tensor with zero neurons added at the end, or with the last ones taken off."""
        parts = []
        for part in tensor.chunk(self.copies, self.dim):
            kept = part.narrow(self.dim, 0, min(neurons, part.shape[self.dim]))
            shape = list(part.shape)
            shape[self.dim] = neurons - kept.shape[self.dim]
            parts += [kept, part.new_zeros(shape)]
        return torch.cat(parts, self.dim)


@dataclass(frozen=True)
class FFNShape:
    """Sizes of a stock feed-forward layer, and the tensors that its neurons own."""

    hidden_size: int
    intermediate_size: int
    out_size: int
    tensors: tuple[NeuronTensor, ...]


def inspect_layout(site: nn.Module, layout: FFNLayout) -> FFNShape | str:
    """Return the sizes of a layer, or the reason why it cannot be converted."""
    sizes: dict[str, tuple[int, int]] = {}
    tensors: list[NeuronTensor] = []
    for role in ("gate_proj", "in_proj", "out_proj"):
        name = getattr(layout, role)
        if name is None:
            continue
        try:
            module = site.get_submodule(name)
        except AttributeError:
            children = ", ".join(n for n, _ in site.named_children())
            return f"{type(site).__name__} has no {name!r}; its children: {children}"
        if reason := _why_not_linear(name, module):
            return reason
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        is_transposed = _is_transposed(module)
        rows, columns = weight.shape[::-1] if is_transposed else weight.shape
        sizes[role] = (columns, rows)
        neuron_rows = role != "out_proj"
        copies = 2 if layout.fused and role == "in_proj" else 1
        tensors.append(NeuronTensor(f"{name}.weight", int(neuron_rows is is_transposed), copies))
        if neuron_rows and bias is not None:
            tensors.append(NeuronTensor(f"{name}.bias", 0, copies))
    hidden, intermediate = sizes["in_proj"]
    if layout.fused:
        intermediate //= 2
    width, out_size = sizes["out_proj"]
    if width != intermediate or sizes.get("gate_proj", (hidden, intermediate)) != (
        hidden,
        intermediate,
    ):
        return f"its projections do not fit one another: {sizes}"
    return FFNShape(hidden, intermediate, out_size, tuple(tensors))


def permute_neurons(
    site: nn.Module, tensors: tuple[NeuronTensor, ...], order: Int[Tensor, " neurons"]
) -> None:
    """Reorder the neurons of a layer in place; the parameters stay the same objects."""
    with torch.no_grad():
        for tensor in tensors:
            parameter = site.get_parameter(tensor.key)
            parameter.copy_(tensor.reorder(parameter, order))


def reading_rows(
    site: nn.Module, layout: FFNLayout, tensors: tuple[NeuronTensor, ...], neurons: int
) -> Float[Tensor, "neurons hidden"]:
    """Return the weights by which each neuron decides: of the gate if there is one, else its input.

    The paper groups neurons by them (footnote 2).
    """
    owner = layout.gate_proj or layout.in_proj
    tensor = next(t for t in tensors if t.key == f"{owner}.weight")
    rows = site.get_parameter(tensor.key).detach()
    return (rows if tensor.dim == 0 else rows.T)[:neurons]


def resize_neurons(site: nn.Module, tensors: tuple[NeuronTensor, ...], neurons: int) -> None:
    """Give a layer another number of neurons; the parameters stay the same objects.

    The weights of new neurons are zero; gradients of the old shape are dropped.
    """
    with torch.no_grad():
        for tensor in tensors:
            parameter = site.get_parameter(tensor.key)
            parameter.data = tensor.resize(parameter.data, neurons)
            parameter.grad = None
            owner, _, kind = tensor.key.rpartition(".")
            linear = site.get_submodule(owner)
            linear = linear.__dict__.get("_stock", linear)  # of a host that is the linear layer
            if kind == "weight":
                sizes = ("nx", "nf") if _is_transposed(linear) else ("out_features", "in_features")
                setattr(linear, sizes[tensor.dim], parameter.shape[tensor.dim])


def _is_transposed(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D"


def _why_not_linear(name: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if hasattr(module, _ADAPTER_CHILD):
        return (
            f"{name!r} is a {kind}, a linear layer with an adapter: convert first, then add "
            "adapters (get_peft_model(..., modules_to_save=['router']))"
        )
    is_linear = isinstance(module, nn.Linear) or kind == "Conv1D"
    is_plain = isinstance(weight, Tensor) and type(weight) in (nn.Parameter, Tensor)
    if not is_plain or not isinstance(weight, Tensor) or not weight.is_floating_point():
        held = type(weight).__name__
        if isinstance(weight, Tensor):
            held += f" of {weight.dtype}"
        return (
            f"{name!r} is a {kind} with weight {held}: quantised or packed weights have no neurons "
            "to move and cannot be trained; convert and fine-tune the model in float or bfloat16, "
            "then quantise"
        )
    if not is_linear or weight.ndim != 2:
        return f"{name!r} is a {kind}, not a linear layer"
    return None
