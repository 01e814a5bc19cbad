"""Run a test's function in several gloo processes of this machine; bring back the results."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["WorkerError", "run_ddp"]


class WorkerError(RuntimeError):
    """A worker failed; the message holds its rank and its traceback."""


def run_ddp(
    function: Callable[..., Any], world_size: int = 2, *args: Any, timeout: float = 120
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in every process of a gloo group.

    The environment is that of a launched job (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), so a Lightning Trainer with `devices=world_size` finds its place, too.

    Args:
        function: At the top level of a module, so that the processes can import it.
        world_size: Number of processes.
        args: Further arguments; they and the result must pickle.
        timeout: Seconds until the processes are killed.

    Returns:
        The results in the order of the ranks.

    Raises:
        WorkerError: If a worker raised, died or was not done in time. No process is left behind.
    """
    context = mp.get_context("spawn")
    deadline = time.monotonic() + timeout
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        workers: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(world_size):
                mine, theirs = context.Pipe(duplex=False)
                job = (rank, world_size, Path(folder) / "store", port, theirs, function, args)
                process = context.Process(target=_work, args=job, daemon=True)
                process.start()
                theirs.close()
                workers.append((process, mine))
            return _collect(workers, deadline, timeout)
        finally:
            for process, connection in workers:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()
                connection.close()


def _collect(
    workers: list[tuple[BaseProcess, Connection]], deadline: float, timeout: float
) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {connection: rank for rank, (_, connection) in enumerate(workers)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerError(f"ranks {sorted(pending.values())} were not done after {timeout} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                is_result, content = pickle.loads(connection.recv_bytes())
            except EOFError:
                workers[rank][0].join()
                raise WorkerError(
                    f"rank {rank} died with exit code {workers[rank][0].exitcode}"
                ) from None
            if not is_result:
                raise WorkerError(f"rank {rank} failed:\n{content}")
            results[rank] = content
    return [results[rank] for rank in range(len(workers))]


def _work(
    rank: int,
    world_size: int,
    store: Path,
    port: int,
    connection: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    try:
        dist.init_process_group(
            "gloo", init_method=store.as_uri(), rank=rank, world_size=world_size
        )
        dist.barrier()  # or a rank that is done at once would leave while another still joins
        content = pickle.dumps((True, function(rank, world_size, *args)))
    except BaseException:
        # Said before the group is left: the other ranks fail after this one, and because of it.
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from None
    connection.send_bytes(content)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
