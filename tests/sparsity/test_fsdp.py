"""FSDP2 on two gloo processes: the injected gradient is that of one process."""

import torch

import mlkit
from mlkit.sparsity import lte_stats, set_lte_weights
from tests.helpers.ddp import run_ddp
from tests.sparsity import tiny
from tests.sparsity.test_ddp import CONFIG


def work(rank, world_size):
    torch.manual_seed(0)
    model = tiny.OwnModel()
    mlkit.convert(model, CONFIG)
    set_lte_weights(model, eta=0.5, lam=0.25)
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    x = tiny.vectors(4, 6)[rank::world_size] if world_size > 1 else tiny.vectors(4, 6)
    (model.train()(x).square().sum() * world_size).backward()
    gradients = {
        n: (p.grad.full_tensor() if world_size > 1 else p.grad).clone()
        for n, p in model.named_parameters()
    }
    return gradients, lte_stats(model, sync=True).tokens


def test_world_two_equals_world_one():
    expected, count = work(0, 1)
    for gradients, counted in run_ddp(work, 2):
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        assert counted == count
