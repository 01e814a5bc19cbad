"""The DDP runner: results by rank, real communication, and no failure or process that gets lost."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ddp import WorkerError, run_ddp


def gather(rank, world_size, factor):
    values = torch.full((3,), float(factor * (rank + 1)))
    dist.all_reduce(values)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return rank, dist.get_world_size(), values, [os.environ[n] for n in names]


def fail_on_last(rank, world_size):
    if rank == world_size - 1:
        raise KeyError("the culprit")
    dist.barrier()


def die_on_first(rank, world_size):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_on_first(rank, world_size):
    if rank == 0:
        time.sleep(600)


def return_a_lambda(rank, world_size):
    return lambda: rank


def train_with_lightning(rank, world_size, folder):
    import lightning as L

    from mlkit.models import MLP
    from mlkit.models.lightning import Classifier

    L.seed_everything(0, verbose=False)
    model = Classifier(MLP([4], 3, hidden_sizes=[5]), lambda p: torch.optim.SGD(p, lr=0.1))
    examples = [{"input": torch.randn(4), "label": i % 3} for i in range(16)]
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp", max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(examples, batch_size=4))
    return trainer.global_rank, [p.detach().clone() for p in model.parameters()]


def assert_no_process_is_left():
    assert multiprocessing.active_children() == []


def test_results_come_in_the_order_of_the_ranks():
    results = run_ddp(gather, 2, 10)
    for rank, (own, world, values, environment) in enumerate(results):
        assert (own, world) == (rank, 2)
        assert values.tolist() == [30.0] * 3
        assert environment == [str(rank), str(rank), "2"]
    assert_no_process_is_left()
    assert "RANK" not in os.environ


def test_one_process_is_a_group_too():
    assert run_ddp(gather, 1, 2)[0][2].tolist() == [2.0] * 3


def test_traceback_of_the_culprit_comes_back():
    with pytest.raises(WorkerError, match=r"rank 1 failed:(?s:.*)fail_on_last(?s:.*)the culprit"):
        run_ddp(fail_on_last)
    assert_no_process_is_left()


def test_dead_worker_is_reported():
    with pytest.raises(WorkerError, match="rank (0 died with exit code -9|1 failed)"):
        run_ddp(die_on_first)
    assert_no_process_is_left()


def test_hanging_worker_is_killed_in_time():
    with pytest.raises(WorkerError, match=r"ranks \[0(, 1)?\] were not done after 3 s"):
        run_ddp(sleep_on_first, timeout=3)
    assert_no_process_is_left()


def test_result_that_does_not_pickle_is_an_error_and_no_hang():
    with pytest.raises(WorkerError, match=r"failed:(?s:.*)return_a_lambda"):
        run_ddp(return_a_lambda, 1)


def test_lightning_trainer_finds_its_place(tmp_path):
    first, second = run_ddp(train_with_lightning, 2, str(tmp_path))
    assert (first[0], second[0]) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
