"""Two processes on halves of a batch have the gradient of one process on the whole."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import mlkit
from mlkit.sparsity import LTEConfig, lte_context, lte_stats, set_lte_weights
from tests.helpers.ddp import run_ddp
from tests.sparsity import tiny

CONFIG = LTEConfig(expert_size=8, projections=("w1", "w3", "w2"), activation="silu")


class Checkpointed(tiny.OwnModel):
    def forward(self, x, attention_mask=None):
        x = self.embed(x)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


def work(rank, world_size, is_masked, is_checkpointed):
    torch.manual_seed(0)
    model = (Checkpointed if is_checkpointed else tiny.OwnModel)().double()
    mlkit.convert(model, CONFIG)
    set_lte_weights(model, eta=0.5, lam=0.25)
    model.train()
    x = tiny.vectors(5, 6).double()
    mask = torch.ones(5, 6)
    mask[0, 4:] = 0
    mask[3, 1:] = 0
    # Ranks hold 2 and 3 rows; the task loss is a sum over rows, scaled so that averaging over
    # ranks gives the same.
    rows = slice(None) if world_size == 1 else (slice(0, 2), slice(2, 5))[rank]
    module = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    for _ in range(2):
        model.zero_grad()
        if is_masked == "argument":
            output = module(x[rows], attention_mask=mask[rows])
            (output.square().sum() * world_size).backward()
        else:
            with lte_context(mask[rows] if is_masked else None):
                (module(x[rows]).square().sum() * world_size).backward()
    stats = lte_stats(model, sync=True)
    return {n: p.grad.clone() for n, p in model.named_parameters()}, (stats.tokens, stats.sparsity)


def alone(*arguments):
    assert not dist.is_initialized()
    return work(0, 1, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [(True, True), (False, False), ("argument", True)],
    ids=["context", "plain", "argument"],
)
def test_world_two_equals_world_one_on_the_joined_batch(arguments):
    expected, count = alone(*arguments)
    for gradients, counted in run_ddp(work, 2, *arguments):
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
        assert counted == pytest.approx(count)
