"""`SparseExpertMLP`: a feed-forward layer that runs, for each token, some blocks of its neurons.

Zheng et al. 2024, "Learn To be Efficient: Build Structured Sparsity in Large Language Models"
(arXiv 2402.06126), equations 1-3. All modes compute the whole layer and mask the intermediate
values: this is the form for training; serving reads only the selected blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlkit.errors import InvalidValueError, RunError, nearest
from mlkit.sparsity.config import ACTIVATIONS, MODES, LTEConfig
from mlkit.sparsity.context import LTEGroup, is_recomputation
from mlkit.sparsity.counts import LayerCounts
from mlkit.sparsity.layout import (
    FFNLayout,
    FFNShape,
    inspect_layout,
    reading_rows,
    resize_neurons,
)
from mlkit.sparsity.losses import (
    efficiency_terms,
    inject_aux_loss,
    mean_tokens_per_rank,
    separability_terms,
    token_mean,
)
from mlkit.sparsity.router import Router, router_scores, select_experts, threshold_logit
from mlkit.sparsity.stock import permute_stock_state
from mlkit.sparsity.width import why_not_divisible, why_not_padded
from mlkit_kernels.sparse_mlp import ACTIVATIONS as FUNCTIONS

__all__ = ["SparseExpertMLP", "lte_layers", "site_of"]

PACKED_LAYER = "_lte_layer"
"""Where a `PackedExpertMLP` keeps the layer for training."""


class SparseExpertMLP(nn.Module):
    """A feed-forward layer of N = I / S experts, each a block of S neurons, and their router.

    With E_i(x) the contribution of a block and G = sigmoid(router(x)),

    - dense: sum_i E_i(x) + b_down, the stock layer;
    - soft (stage 1): sum_i G_i(x) E_i(x) + b_down, with the auxiliary losses in the gradient;
    - hard (stage 2, inference): sum_i 1[G_i(x) > tau] E_i(x) + b_down.

    The constructor makes a new layer (gate_proj, up_proj, down_proj); `mlkit.convert` wraps one of
    a model and keeps the names of its parameters. New in the state dict is `router`: its weights,
    `neuron_perm` (position to stock neuron) and the mode with the threshold (`_extra_state`, a
    tensor). A stock checkpoint is reordered on its way in; load it with strict=False, since it has
    no router.

    With `config.pad_to_multiple` the layer may have more neurons than the stock one. Those compute
    act(0) = 0 (times 0 with a gate), and the forward pass multiplies them by zero besides, so that
    neither their own weights nor what reads them has a gradient: they stay zero under any optimizer
    that leaves a zero with zero gradient alone, weight decay included, and adapters on the
    projections cannot wake them. The stock neurons compute what they did.

    Args:
        hidden_size: H.
        intermediate_size: I; a multiple of `config.expert_size`, or padded to one.
        config: See `LTEConfig`.
        activation: "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", ...
        gated: Whether there is a gate: down(act(gate(x)) * up(x)), else down(act(up(x))).
        bias: Whether the linear layers have one.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        InvalidValueError: If a size or a name does not fit.

    Shape:
        [..., H] to [..., H].

    Example:
        >>> layer = SparseExpertMLP(16, 64, LTEConfig(expert_size=8))
        >>> layer.num_experts, layer(torch.zeros(2, 5, 16)).shape
        (8, torch.Size([2, 5, 16]))
    """

    is_packed = False  # by pack_for_inference, which holds the weights meanwhile
    router: nn.Module
    weight: Tensor  # of a host that is itself the linear layer
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        config: LTEConfig | None = None,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InvalidValueError(
                f"activation {activation!r} is unknown; {nearest(activation, ACTIVATIONS)}"
            )
        new = partial(nn.Linear, bias=bias, device=device, dtype=dtype)
        if gated:
            self.gate_proj = new(hidden_size, intermediate_size)
        self.up_proj = new(hidden_size, intermediate_size)
        self.down_proj = new(intermediate_size, hidden_size)
        layout = FFNLayout(
            "up_proj", "down_proj", "gate_proj" if gated else None, activation=activation
        )
        shape = inspect_layout(self, layout)
        assert isinstance(shape, FFNShape)
        self._set_up(layout, shape, config or LTEConfig())
        if reason := why_not_padded(shape, layout, self.config, None):
            raise InvalidValueError(reason)
        resize_neurons(self, shape.tensors, self.intermediate_size)
        self.reset_router(self)

    @classmethod
    def wrap(
        cls,
        stock: nn.Module,
        layout: FFNLayout,
        shape: FFNShape,
        config: LTEConfig,
        *,
        seed: int = 0,
        act: nn.Module | None = None,
        structure_only: bool = False,
    ) -> SparseExpertMLP:
        """Make a layer around the parts of a stock one, which is not changed.

        Args:
            stock: The layer, or its part `layout.host`.
            layout: Names relative to the module that holds the layer.
            shape: What `inspect_layout` said.
            config: See `LTEConfig`.
            seed: Keys the router's initial values, together with `config.seed`.
            act: The activation, if it is outside of `stock`.
            structure_only: Draw no initial values.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._modules.update(stock._modules)
        self._parameters.update(stock._parameters)
        self._buffers.update(stock._buffers)
        self._non_persistent_buffers_set |= stock._non_persistent_buffers_set
        if act is not None:
            self._modules["act"] = act
        self.training = stock.training
        self.__dict__["_stock"] = stock  # not a child: its parts are ours
        self._set_up(layout, shape, config, seed, structure_only, has_outer_act=act is not None)
        return self

    def _set_up(
        self,
        layout: FFNLayout,
        shape: FFNShape,
        config: LTEConfig,
        seed: int = 0,
        structure_only: bool = False,
        has_outer_act: bool = False,
    ) -> None:
        if reason := why_not_divisible(shape, config):
            raise InvalidValueError(reason)
        self.layout, self.shape, self.config = layout, shape, config
        self.expert_size = config.expert_size
        self.num_experts = -(-shape.intermediate_size // config.expert_size)
        self.hidden_size, self.intermediate_size = (
            shape.hidden_size,
            self.num_experts * config.expert_size,
        )
        self.top_p = config.top_p
        self.loss_weight = 1.0
        self.group = LTEGroup(config.eta, config.lambda_at(0.0))
        self.counts = LayerCounts()
        self._tokens_seen: Tensor | None = None
        self.has_outer_act = has_outer_act
        self._act = "act" if has_outer_act else self._local(layout.act)
        self._in, self._gate = self._local(layout.in_proj), self._local(layout.gate_proj)
        self._out = None if layout.host else layout.out_proj
        like = next(self.parameters())
        generator = None
        if not (structure_only or like.is_meta):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + seed)
        self.router = Router(
            self.hidden_size,
            self.num_experts,
            self.intermediate_size,
            config.router_bias,
            generator,
            like.device,
            like.dtype,
        )
        self.set_mode(config.mode)
        self.set_threshold(config.threshold)
        if not layout.host:
            self.register_load_state_dict_pre_hook(permute_stock_state)

    @torch.no_grad()
    def reset_router(self, site: nn.Module) -> None:
        """Let the router's rows point where the experts' mean neurons do, if the config says so.

        A neuron answers to tokens along its row; the mean of an expert's rows is what the grouping
        calls the centre of a cluster. MoEfication (Zhang et al. 2022) selects by the similarity to
        it; here it is where training starts.

        Args:
            site: The module that the names in `layout` are relative to; its neurons are grouped.
        """
        weight = self.router.get_parameter("weight")
        if self.config.router_init == "random" or weight.is_meta:
            return
        tensors, neurons = self.shape.tensors, self.intermediate_size
        rows = reading_rows(site, self.layout, tensors, neurons).float()
        centres = rows.unflatten(0, (self.num_experts, self.expert_size)).mean(1)
        weight.copy_(F.normalize(centres, dim=1) * self.config.router_scale)

    def _local(self, name: str | None) -> str | None:
        host = self.layout.host
        if name is None or not host:
            return name
        return "" if name == host else name.removeprefix(host + ".")

    @property
    def routing(self) -> Router:
        """The router, or the copy of it that an adapter has put in its place."""
        wrapper: Any = self.router
        active: Router = wrapper.active
        return active

    def routers(self) -> list[Router]:
        """Return the router and its copies for adapters, the router of the conversion first."""
        return [module for module in self.router.modules() if isinstance(module, Router)]

    @property
    def neuron_perm(self) -> Int[Tensor, " neurons"]:
        """Position to stock neuron."""
        return self.routing.neuron_perm

    @property
    def mode(self) -> str:
        """One of "dense", "soft" or "hard"."""
        return self.routing.mode

    def set_mode(self, mode: str) -> None:
        """Choose "dense", "soft" or "hard"."""
        if mode not in MODES:
            raise InvalidValueError(f"mode must be one of {MODES}, got {mode!r}")
        if self.is_packed and mode != "hard":
            raise RunError(
                f"a packed LTE layer runs in hard mode, got mode={mode!r}: unpack(model) first "
                "(set_lte_threshold(model, 0.0) runs every expert of a sigmoid router)"
            )
        self.routing.mode = mode

    def set_threshold(self, threshold: float) -> None:
        """Set tau of the hard mode: 0 runs every expert, 1 none; the knob at serving time."""
        if not 0 <= threshold <= 1:
            raise InvalidValueError(f"threshold must be in [0, 1], got {threshold}")
        self.set_limit(threshold_logit(threshold))

    def set_limit(self, limit: float) -> None:
        """Set the logit of tau, which has more room near 0 and 1."""
        self.routing.set_limit(limit)

    @property
    def limit(self) -> float:
        """The logit of tau."""
        return self.routing.limit_number

    @property
    def threshold(self) -> float:
        """Tau of the hard mode."""
        return float(self.routing.limit.sigmoid())

    # ---------------------------------------------------------------- forward

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens out"]:
        """Return the layer's output; a layer with a host returns the masked intermediate values."""
        weights = None if self.mode == "dense" else self._weights(x)
        h = self._hidden(x)
        if weights is not None:
            blocks = h.unflatten(-1, (self.num_experts, self.expert_size))
            h = (blocks * weights.unsqueeze(-1).to(h.dtype)).flatten(-2)
        if self.padding:
            h = h * (self.neuron_perm < self.shape.intermediate_size)
        if self._out is None:
            return h
        y = _child(self, self._out)(h)
        if self.layout.dropout is not None:
            y = _child(self, self.layout.dropout)(y)
        return y

    def _hidden(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens inner"]:
        if self._in == "":
            value = F.linear(x, self.weight, self.bias)
        else:
            assert self._in is not None
            value = _child(self, self._in)(x)
        if self.layout.fused:
            gate, value = value.chunk(2, dim=-1)
            return self._activate(gate) * value
        if self._gate is not None:
            return self._activate(_child(self, self._gate)(x)) * value
        return self._activate(value)

    def _activate(self, x: Tensor) -> Tensor:
        if self._act is not None:
            y: Tensor = _child(self, self._act)(x)
            return y
        assert self.layout.activation is not None
        return FUNCTIONS[self.layout.activation](x)

    def _weights(self, x: Float[Tensor, "*tokens hidden"]) -> Tensor:
        """Return what each block is multiplied by: G, or 1 and 0."""
        config = self.config
        logits = self.router(x)
        if config.debug and bool(logits.isnan().any()):
            raise RunError(
                "a router gave NaN: its input or its weights are not finite (lower the learning "
                "rate, clip gradients, or raise sep_eps)"
            )
        scores = router_scores(logits, config.router)
        selected = self.select(logits)
        token_mask = self.group.token_mask()
        valid = None if token_mask is None else token_mask.of(x, self.training)
        is_penalised = self.mode == "soft" and self.training and torch.is_grad_enabled()
        losses = None
        if is_penalised:
            eff = efficiency_terms(scores)
            sep = separability_terms(scores, config.threshold, config.sep_eps)
            losses = eff, sep
            tokens = self._tokens(x) if token_mask is None else token_mask.tokens(x.device)
            aux = token_mean(self.group.eta * eff + self.group.lam * sep, valid, tokens)
            scores = inject_aux_loss(scores, aux * self.loss_weight)
        if not is_recomputation():
            eps = config.sep_eps
            self.counts.add(scores, selected, valid, config.threshold, eps, losses)
        return scores if self.mode == "soft" else selected

    def select(self, logits: Float[Tensor, "*tokens experts"]) -> Bool[Tensor, "*tokens experts"]:
        """Say which experts run for these logits of the router."""
        config = self.config
        limit = self.routing.limit.to(logits.dtype)
        return select_experts(logits, config.router, limit, self.top_p, config.min_experts)

    def _tokens(self, x: Tensor) -> Tensor | float:
        """Tokens of this batch, as a mean over ranks; recomputation does not ask again."""
        count = x.shape[:-1].numel()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return float(count)
        if self._tokens_seen is None or not is_recomputation():
            self._tokens_seen = mean_tokens_per_rank(torch.tensor(count, device=x.device))
        return self._tokens_seen

    def stock(self) -> nn.Module:
        """Return the stock module that was wrapped, with the present parameters."""
        stock: nn.Module = self.__dict__["_stock"]
        for key in stock._modules:
            stock._modules[key] = self._modules[key]
        for key in stock._parameters:
            stock._parameters[key] = self._parameters[key]
        for key in stock._buffers:
            stock._buffers[key] = self._buffers[key]
        stock.training = self.training
        return stock

    # ------------------------------------------------------------- accounting

    def stock_order(self) -> Int[Tensor, " neurons"]:
        """Return the inverse of `neuron_perm`: stock neuron to position."""
        return self.neuron_perm.argsort()

    @property
    def padding(self) -> int:
        """Number of neurons that the stock layer does not have."""
        return self.intermediate_size - self.shape.intermediate_size

    @property
    def dense_flops(self) -> int:
        """FLOPs per token of the stock layer, 2 per multiply-add."""
        return self._flops(self.shape.intermediate_size)

    @property
    def expert_flops(self) -> int:
        """FLOPs per token of all experts: those of the stock layer, and of the padding."""
        return self._flops(self.intermediate_size)

    def _flops(self, neurons: int) -> int:
        reads = 2 if self.layout.is_gated else 1
        return 2 * neurons * (reads * self.hidden_size + self.shape.out_size)

    @property
    def router_flops(self) -> int:
        """FLOPs per token of the router."""
        return 2 * self.hidden_size * self.num_experts

    def extra_repr(self) -> str:
        """Sizes and mode, for `print(model)`."""
        return (
            f"experts={self.num_experts}x{self.expert_size}, mode={self.mode!r}, "
            f"threshold={self.threshold:.3g}"
        )


def lte_layers(model: nn.Module) -> dict[str, SparseExpertMLP]:
    """Return the LTE layers of a model by name.

    Raises:
        RunError: If there is none.
    """
    found = {}
    for name, module in model.named_modules():
        layer = module.__dict__.get(PACKED_LAYER, module)
        if isinstance(layer, SparseExpertMLP):
            found[name] = layer
    if not found:
        raise RunError(
            f"{type(model).__name__} has no LTE layer: mlkit.convert(model, LTEConfig(...)) first"
        )
    return found


def site_of(model: nn.Module, name: str, layer: SparseExpertMLP) -> nn.Module:
    """Return the module that the names in a layer's layout are relative to.

    Args:
        model: Holds the layer.
        name: Of the layer in the model.
        layer: The layer.
    """
    host = layer.layout.host
    return model.get_submodule(name.removesuffix(host).removesuffix(".")) if host else layer


def _child(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
