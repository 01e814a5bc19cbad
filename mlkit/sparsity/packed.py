"""`PackedExpertMLP`: an LTE layer for serving, which reads only what a token selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlkit.errors import RunError
from mlkit.sparsity.blocks import Piece
from mlkit.sparsity.config import MODES
from mlkit.sparsity.module import PACKED_LAYER, SparseExpertMLP
from mlkit.sparsity.router import router_scores
from mlkit_kernels.sparse_mlp import sparse_mlp

if TYPE_CHECKING:
    from mlkit.sparsity.usage import ExpertUsage

__all__ = ["PackedExpertMLP"]


class PackedExpertMLP(nn.Module):
    """What `pack_for_inference` puts in place of an LTE layer: the whole layer in hard mode.

    The layer for training is kept, without its weights, for `unpack`; threshold, statistics and
    router are still its own, so that `set_lte_threshold` and `lte_stats` work on either. The state
    dict is that of the layer for training: it can be loaded where the model is not packed.

    Args:
        layer: The layer for training; its weights are not changed here.
        pieces: Where its weights go.
        tensors: The packed weights: "gate_up", "down_t", perhaps "gate_up_bias".
        down_bias: Of the output projection.
        activation: Name of the kernel's activation.
        backend: Of the kernel.
    """

    router: nn.Module
    gate_up: Tensor
    down_t: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        layer: SparseExpertMLP,
        pieces: tuple[Piece, ...],
        tensors: dict[str, Tensor],
        down_bias: nn.Parameter | None,
        *,
        activation: str,
        backend: str,
    ) -> None:
        super().__init__()
        self.training = False
        self.__dict__[PACKED_LAYER] = layer  # not a child: it has no weights now
        self.pieces, self.activation, self.backend = pieces, activation, backend
        self.usage: ExpertUsage | None = None
        self.prices: Tensor | None = None  # of `measure_prices`; no buffer: it stays where it is
        self.router = layer.router
        self.register_state_dict_post_hook(_say_hard)
        for name in ("gate_up", "down_t", "gate_up_bias"):
            value = tensors.get(name)
            parameter = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, parameter)
        self.register_parameter("down_bias", down_bias)
        self.packed_dtype = self.gate_up.dtype
        self.routes_in_kernel = (
            layer.config.router == "sigmoid"
            and layer.config.min_experts == 0
            and not layer.config.debug
        )

    @property
    def layer(self) -> SparseExpertMLP:
        """The layer for training, whose weights are here."""
        layer: SparseExpertMLP = self.__dict__[PACKED_LAYER]
        return layer

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Return the output of the whole feed-forward layer."""
        in_kernel = self.routes_in_kernel and self.usage is None
        router: Any = self.router
        return sparse_mlp(
            x,
            router.weight if in_kernel else None,
            router.bias if in_kernel else None,
            self.gate_up,
            self.down_t,
            self.gate_up_bias,
            self.down_bias,
            mask=None if in_kernel else self._mask(x),
            threshold=self.layer.limit,
            activation=self.activation,
            backend=self.backend,
            prices=self.prices,
        )

    def _mask(self, x: Float[Tensor, "*tokens hidden"]) -> Bool[Tensor, "*tokens experts"]:
        """Return the choice of the layer for training; count it, if that was asked for."""
        layer = self.layer
        logits = self.router(x)
        if layer.config.debug and bool(logits.isnan().any()):
            raise RunError("a router gave NaN: its input or its weights are not finite")
        mask = layer.select(logits)
        if self.usage is not None:
            token_mask = layer.group.token_mask()
            valid = None if token_mask is None else token_mask.of(x, False)
            scores = router_scores(logits, layer.config.router)
            layer.counts.add(scores, mask, valid, layer.config.threshold, layer.config.sep_eps)
            self.usage.add(mask, valid)
        return mask

    def train(self, mode: bool = True) -> PackedExpertMLP:
        """Refuse to be trained; `eval()` is what it is."""
        if mode:
            raise RunError(
                "a packed LTE layer cannot be trained: mlkit.sparsity.unpack(model) first"
            )
        super().train(False)
        return self

    # ------------------------------------------------------------------ state

    def training_tensors(self) -> dict[str, Tensor]:
        """Return the weights in the layout for training, by the names of the parameters there.

        The names are relative to the module that holds the layer.
        """
        packed = dict(self._parameters)
        tensors = {}
        for piece in self.pieces:
            value = packed[piece.packed]
            assert value is not None
            tensors[piece.key] = piece.read(value.detach())
        return tensors

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        layer = self.layer
        host = layer.layout.host
        outer = prefix.removesuffix(f"{host}.") if host else prefix
        for key, value in self.training_tensors().items():
            destination[outer + key] = value
        if self.down_bias is not None:
            destination[f"{outer}{layer.layout.out_proj}.bias"] = self.down_bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        *_, errors = rest
        own = self.router.state_dict(prefix=f"{prefix}router.")
        state_dict.update(own)  # the refusal holds for the router, too
        errors.append(
            f"{prefix}* is packed: mlkit.sparsity.unpack(model), load, and pack_for_inference again"
        )

    def extra_repr(self) -> str:
        """Sizes and threshold, for `print(model)`."""
        layer = self.layer
        return (
            f"experts={layer.num_experts}x{layer.expert_size}, dtype={self.gate_up.dtype}, "
            f"backend={self.backend!r}, threshold={layer.threshold:.3g}"
        )


def _say_hard(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Put into a state dict the mode in which a packed layer runs, whatever it is when unpacked."""
    state_dict[f"{prefix}router._extra_state"][0] = MODES.index("hard")
