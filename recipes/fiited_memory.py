"""Peak memory of training, each method in a process of its own.

    python -m recipes.fiited_memory < request.json > peaks.json

The process imports once and forks a child for each method. A child builds the network as a fit
does, trains a few steps, and touches every page of the tables and states, since a longer fit would
(the operating system counts only pages that were touched). It reports its own peak.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F

from mlkit.embeddings.settings import FIITEDSettings
from mlkit.errors import RunError
from mlkit.models import split_parameters
from recipes.fiited_networks import network, table_optimizers

__all__ = ["peak_memory"]


def peak_memory(
    model: Mapping[str, Any],
    sizes: Mapping[str, Any],
    settings: Mapping[str, Any],
    fraction: float,
    batch_size: int,
) -> dict[str, int]:
    """Return the peak resident bytes of each method's training process.

    Args:
        model: Configuration of the network.
        sizes: Its `table_sizes` and `num_dense`.
        settings: Arguments of `FIITEDSettings`.
        fraction: Bytes of the tables.
        batch_size: Examples of a step.

    Raises:
        RunError: If a process fails; the message ends with its last lines.
    """
    request = {
        "model": model, "sizes": sizes, "settings": settings, "fraction": fraction,
        "batch_size": batch_size, "num_threads": torch.get_num_threads(),
    }  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.fiited_memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RunError(f"the process that measures memory failed: {done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _train(request: Mapping[str, Any], settings: FIITEDSettings, method: str) -> None:
    net = network(request["model"], request["sizes"], settings, method, request["fraction"], 0)
    optimizers = table_optimizers(net, settings, method)
    optimizers.append(instantiate(request["model"]["dense_optimizer"])(split_parameters(net)[0]))
    batch = request["batch_size"]
    for _ in range(settings.memory_steps):
        ids = [torch.randint(rows, (batch, 1)) for rows in request["sizes"]["table_sizes"]]
        logits = net(torch.randn(batch, request["sizes"]["num_dense"]), torch.cat(ids, 1))
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, torch.rand(batch).round()).backward()
        for optimizer in optimizers:
            optimizer.step()
    _touch(net, optimizers)


@torch.no_grad()
def _touch(net: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    states = [v for o in optimizers for s in o.state.values() for v in s.values()]
    for tensor in (*net.parameters(), *net.buffers(), *states):
        if isinstance(tensor, torch.Tensor):
            tensor.add_(0)


def _child(request: Mapping[str, Any], method: str, answer: Connection) -> None:
    torch.manual_seed(0)
    _train(request, FIITEDSettings(**request["settings"]), method)
    scale = 1 if sys.platform == "darwin" else 1024
    answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)


def _measure(request: Mapping[str, Any], methods: Sequence[str]) -> dict[str, int]:
    context = multiprocessing.get_context("fork")  # nothing has trained in this process
    peaks = {}
    for method in methods:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(request, method, sender))
        process.start()
        sender.close()
        try:
            peaks[method] = int(receiver.recv())
        except EOFError:
            sys.exit(f"the process of method {method} ended without an answer")
        finally:
            process.join()
    return peaks


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["num_threads"])
    json.dump(_measure(asked, asked["settings"]["methods"]), sys.stdout)
