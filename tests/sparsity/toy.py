"""A small classification problem whose feed-forward layers matter, and both stages of LTE on it."""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlkit
from mlkit.sparsity import LTEConfig, LTEStats, lte_stats, reset_lte_stats
from mlkit.sparsity.control import SparsityControl
from mlkit.sparsity.schedule import TwoStageSchedule


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 128), nn.Linear(32, 128)
        self.down_proj, self.act_fn = nn.Linear(128, 32), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(20, 32), nn.Linear(32, 10)
        self.layers = nn.ModuleList([Gated(), Gated()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (32,)))
        return self.head(F.layer_norm(x, (32,)))


@cache
def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    first = torch.randn(20, 40, generator=generator) / 4.5
    second = torch.randn(40, 10, generator=generator)
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return x, (F.relu(x @ first) @ second).argmax(-1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    x, y = data(8192, 1)
    rows = torch.randint(8192, (128,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x[rows]), y[rows]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@cache
def _dense() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        step(model, optimizer, generator)
    return model


def lte(
    config: LTEConfig, steps: int = 500, train_routers: bool = True
) -> tuple[nn.Module, LTEStats, float]:
    """Run both stages on the trained dense model; return it with its statistics and accuracy."""
    model = copy.deepcopy(_dense())
    mlkit.convert(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    schedule = TwoStageSchedule(steps, 0.5)
    control = SparsityControl(config.target_sparsity) if config.target_sparsity else None
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        schedule.apply(model, number if train_routers else steps, [optimizer])
        step(model, optimizer, generator)
        if control is not None:
            control.step(model)
    reset_lte_stats(model)
    x, y = data(4096, 2)
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(-1) == y).float().mean().item()
    return model, lte_stats(model), accuracy
