"""The packed layout of a feed-forward layer, and where in it each tensor for training lies.

N experts of S neurons: `gate_up` [N, 2 S, H] holds the rows of an expert's gate, then those of its
input projection ([N, S, H] where there is no gate); `down_t` [N, S, H] holds the output projection
transposed, so that a neuron is one row in each. An expert is then contiguous: what is not selected
is never read. The layout of `gate_up` is that of the experts in Hugging Face's transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlkit.sparsity.layout import FFNLayout

__all__ = ["Piece", "pack_pieces", "pieces_of"]


@dataclass(frozen=True)
class Piece:
    """A tensor of the training layout with an axis of neurons, and where its values are packed.

    Args:
        key: Its name, relative to the module that holds the layer.
        packed: "gate_up", "down_t" or "gate_up_bias".
        half: Which half of each expert's rows it is: 0 or 1; None for all rows.
        is_transposed: The axis of neurons is the second one.
        is_fused: It holds both halves, one after the other.
        dtype: Its type in the training layout.
    """

    key: str
    packed: str
    half: int | None
    is_transposed: bool
    is_fused: bool
    dtype: torch.dtype

    def _view(self, packed: Tensor) -> Tensor:
        """Return the part of a packed tensor that this one is: neurons, then channels."""
        blocks = packed.unsqueeze(-1) if packed.ndim == 2 else packed
        if self.is_fused:
            return blocks.unflatten(1, (2, -1)).transpose(0, 1)
        return blocks if self.half is None else blocks.unflatten(1, (2, -1))[:, self.half]

    def write(self, packed: Tensor, value: Tensor) -> None:
        """Put a value in the training layout into the packed tensor."""
        view = self._view(packed)
        rows = value.t() if self.is_transposed else value.reshape(len(value), -1)
        view.copy_(rows.unflatten(0, view.shape[:-1]))

    def read(self, packed: Tensor) -> Tensor:
        """Return the value in the training layout; a copy, unless it lies there as it is."""
        view = self._view(packed)
        rows = view.reshape(-1, view.shape[-1])
        if packed.ndim == 2:
            return rows.squeeze(-1)
        return (rows.t() if self.is_transposed else rows).contiguous()


def pieces_of(site: nn.Module, layout: FFNLayout) -> tuple[Piece, ...]:
    """Return the tensors of a layer that are packed.

    Args:
        site: The module that holds the layer.
        layout: Names relative to it.
    """
    pieces = []
    for role in ("gate_proj", "in_proj", "out_proj"):
        name = getattr(layout, role)
        if name is None:
            continue
        is_out = role == "out_proj"
        half = None
        if layout.gate_proj is not None and not is_out:
            half = 0 if role == "gate_proj" else 1
        module = site.get_submodule(name)
        is_fused = layout.fused and not is_out
        for key, parameter in module.named_parameters(recurse=False):
            if key == "bias" and is_out:
                continue  # no neurons
            packed = "down_t" if is_out else "gate_up"
            is_transposed = key == "weight" and is_out is not (type(module).__name__ == "Conv1D")
            packed = packed + "_bias" if key == "bias" else packed
            pieces.append(
                Piece(f"{name}.{key}", packed, half, is_transposed, is_fused, parameter.dtype)
            )
    return tuple(pieces)


def pack_pieces(
    site: nn.Module, pieces: tuple[Piece, ...], experts: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the packed tensors of a layer by name; a bias only if one of its parts has it.

    Args:
        site: The module that holds the layer.
        pieces: Its tensors.
        experts: N.
        dtype: Of the packed tensors.
    """
    is_gated = any(piece.half is not None or piece.is_fused for piece in pieces)
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for piece in pieces:
            value = site.get_parameter(piece.key)
            if piece.packed not in made:
                rows = value.t() if piece.is_transposed else value
                neurons = len(rows) // 2 if piece.is_fused else len(rows)
                count = neurons // experts
                if is_gated and piece.packed != "down_t":
                    count *= 2
                shape = (experts, count, *rows.shape[1:])
                made[piece.packed] = torch.zeros(shape, dtype=dtype, device=value.device)
            piece.write(made[piece.packed], value)
    return made
