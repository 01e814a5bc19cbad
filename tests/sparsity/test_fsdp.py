"""FSDP2 on two gloo processes: gradients, both stages and weights are those of one process."""

import dataclasses

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import mlkit
from mlkit.sparsity import (
    SparsityControl,
    TwoStageSchedule,
    lte_context,
    lte_layers,
    lte_stats,
    set_lte_weights,
)
from tests.helpers.ddp import run_ddp
from tests.sparsity import tiny
from tests.sparsity.test_ddp import CONFIG, Checkpointed

NO_BIAS = dataclasses.replace(CONFIG, router_bias=None)  # nor its shift by a quantile of the batch


def build(world_size, cls=tiny.OwnModel, config=CONFIG):
    torch.manual_seed(0)
    model = cls()
    mlkit.convert(model, config)
    if world_size > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model.train()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(rank, world_size, cls, is_masked):
    model = build(world_size, cls)
    set_lte_weights(model, eta=0.5, lam=0.25)
    x, mask = tiny.vectors(4, 6), torch.ones(4, 6)
    mask[0, 4:] = mask[3, 1:] = 0
    rows = slice(rank, None, world_size)
    with lte_context(mask[rows] if is_masked else None):
        (model(x[rows]).square().sum() * world_size).backward()
    found = {n: whole(p.grad) for n, p in model.named_parameters()}
    return found, lte_stats(model, sync=True).tokens


@pytest.mark.parametrize(
    ("cls", "is_masked"),
    [(tiny.OwnModel, False), (Checkpointed, True)],
    ids=["plain", "masked-checkpointed"],
)
def test_gradients_of_world_two_are_those_of_world_one(cls, is_masked):
    expected, count = gradients(0, 1, cls, is_masked)
    for found, counted in run_ddp(gradients, 2, cls, is_masked):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert counted == count == (17 if is_masked else 24)


def both_stages(rank, world_size):
    model = build(world_size, config=NO_BIAS)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule, control = TwoStageSchedule(8, 0.5), SparsityControl(0.5, interval=2)
    rows = slice(rank, None, world_size)
    for number in range(8):
        schedule.apply(model, number, [optimizer])
        optimizer.zero_grad()
        (model(tiny.vectors(4, 6, seed=number)[rows]).square().sum() * world_size).backward()
        optimizer.step()
        control.step(model)
        if number == 4:
            frozen = [whole(m.router.weight) for m in lte_layers(model).values()]
    assert all(
        torch.equal(whole(m.router.weight), before)
        for m, before in zip(lte_layers(model).values(), frozen, strict=True)
    )
    state = {k: whole(v) for k, v in model.state_dict().items()}
    return state, lte_stats(model, sync=True).sparsity, control.threshold.limit


def test_both_stages_with_a_controller_and_the_whole_state():
    expected, sparsity, limit = both_stages(0, 1)
    assert limit != 0
    for state, found, tau in run_ddp(both_stages, 2):
        assert tau == limit
        assert found == pytest.approx(sparsity)
        assert list(state) == list(expected)
        torch.testing.assert_close(state, expected, rtol=1e-3, atol=1e-4)
    restored = tiny.OwnModel()
    mlkit.convert(restored, NO_BIAS)
    restored.load_state_dict(state)
    assert {m.mode for m in lte_layers(restored).values()} == {"hard"}
