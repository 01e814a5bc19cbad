"""Recording scores while training: its share of a step, its memory, DeepCore's bookkeeping."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mlkit.coresets import DynamicsRecorder, ScoreTable, TopK
from mlkit.models import resnet_cifar
from scripts.benchmarks._harness import Bench, Row, alternate, calling

__all__ = ["PlainForgetting", "rows"]

_SCORES = ("aum", "forgetting", "el2n")
_OVERHEAD = 1.0
"""Target: per cent of a training step."""
_BYTES = 25.0
"""Target: state per example."""


def rows(bench: Bench) -> Iterator[Row]:
    """Time and memory of recording."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        yield from _overhead(bench, device)
        yield from _update_alone(bench, device)
    yield from _state(bench)
    yield from _deepcore(bench)


# ------------------------------------------------------------------------------------- overhead


def _overhead(bench: Bench, device: str) -> Iterator[Row]:
    """An update right after each step of a ResNet-18 with the CIFAR stem, as in training."""
    batch, num_samples = bench.size(256 if device == "cuda" else 32, 2), 50_000
    torch.manual_seed(0)
    model = resnet_cifar(10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    side = bench.size(32, 8)
    inputs = torch.randn(batch, 3, side, side, device=device)
    targets = torch.randint(10, (batch,), device=device)
    batches = itertools.cycle(torch.randperm(num_samples, device=device).split(batch)[:-1])
    recorder = DynamicsRecorder(num_samples, _SCORES)
    logits = torch.zeros(batch, 10, device=device)

    def step() -> None:
        nonlocal logits
        output = model(inputs)
        loss = functional.cross_entropy(output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logits = output.detach()

    def update() -> None:
        recorder.update(next(batches), logits, targets)

    seconds = alternate(
        {"step": step, "update": update}, bench.size(12, 2), warmup=bench.size(2, 1)
    )
    share = 100 * statistics.median(seconds["update"]) / statistics.median(seconds["step"])
    case = f"recorder beside ResNet-18 on {device}, batch {batch}, C=10"
    yield Row.of(case, "update / training step", share, "%", limit=_OVERHEAD)
    yield from bench.times(case, {"mlkit": seconds["update"]}, metric="update", unit="ms")
    yield from bench.times(case, {"mlkit": seconds["step"]}, metric="training step", unit="ms")


def _update_alone(bench: Bench, device: str) -> Iterator[Row]:
    """Updates in a row; the limit is the softmax of the same logits, which every score needs."""
    batch, num_samples = 256, bench.size(1_281_167, 5_000)
    for num_classes in (10, 1000):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(batch, num_classes, generator=generator).to(device)
        targets = torch.randint(num_classes, (batch,), generator=generator).to(device)
        order = torch.randperm(num_samples, generator=generator).to(device)
        batches = itertools.cycle(order.split(batch)[:-1])
        recorder = DynamicsRecorder(num_samples, _SCORES)

        def update(
            recorder: DynamicsRecorder = recorder,
            batches: Iterator[Tensor] = batches,
            logits: Tensor = logits,
            targets: Tensor = targets,
        ) -> None:
            recorder.update(next(batches), logits, targets)

        seconds = alternate(
            {"mlkit": update, "softmax alone": calling(logits.softmax, -1)},
            bench.size(100, 3),
            warmup=3,
        )
        floor = statistics.median(seconds.pop("softmax alone")) * 1e3
        case = f"recorder alone on {device}, batch {batch}, C={num_classes}"
        yield from bench.times(case, seconds, metric="update", unit="ms", limit=floor)


def _state(bench: Bench) -> Iterator[Row]:
    """State per example against a log of every softmax in half precision (calculated)."""
    for name, num_samples, num_classes, epochs in (
        ("CIFAR10", 50_000, 10, 200),
        ("ImageNet", bench.size(1_281_167, 5_000), 1000, 60),
    ):
        recorder = DynamicsRecorder(num_samples, _SCORES)
        recorder.update(torch.arange(2), torch.zeros(2, num_classes), torch.zeros(2).long())
        yield Row.of(
            f"recorder state, {name}: C={num_classes}, {epochs} epochs",
            "memory per example",
            recorder.bytes_per_example,
            "B",
            peer="log of every softmax (calculated)",
            peer_value=num_classes * 2.0 * epochs,
            limit=_BYTES,
        )


# ------------------------------------------------------------------------------------- DeepCore


class PlainForgetting:
    """Forgetting events as DeepCore keeps them: two vectors, a few operations per batch.

    DeepCore's code (`deepcore/methods/forgetting.py`) raises the counts of a copy, because it
    indexes twice, so that no event is ever counted; here the increment arrives.

    Args:
        num_samples: Size of the data set.
    """

    def __init__(self, num_samples: int) -> None:
        self.events = torch.zeros(num_samples)
        self.was_right = torch.zeros(num_samples)

    @torch.no_grad()
    def update(
        self,
        indices: Int[Tensor, " batch"],
        logits: Float[Tensor, "batch classes"],
        targets: Int[Tensor, " batch"],
    ) -> None:
        """Count the examples of a batch that were right at their last visit and are not now."""
        is_right = (logits.argmax(1) == targets).float()
        self.events[indices] += (self.was_right[indices] > is_right).float()
        self.was_right[indices] = is_right

    def select(self, targets: Int[np.ndarray, " n"], rate: float) -> Int[np.ndarray, " m"]:
        """The most forgotten examples of each class."""
        events = self.events.numpy()
        chosen = []
        for label in np.unique(targets):
            members = np.flatnonzero(targets == label)
            ranked = members[np.argsort(events[members])[::-1]]
            chosen.append(ranked[: round((1 - rate) * len(members))])
        return np.concatenate(chosen)


@dataclass(frozen=True)
class _Trace:
    """Logits of a made-up run: a signal for the label that grows, under noise."""

    visits: Sequence[tuple[Tensor, Tensor, Tensor]]
    num_samples: int
    epochs: int
    targets: Tensor

    @classmethod
    def make(cls, num_samples: int, epochs: int, num_classes: int = 10, batch: int = 128) -> _Trace:
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(num_samples) % num_classes
        signal = functional.one_hot(targets, num_classes).float()
        visits = []
        for epoch in range(epochs):
            noise = torch.randn(num_samples, num_classes, generator=generator)
            logits = noise + (epoch + 1) / epochs * 2 * signal
            order = torch.randperm(num_samples, generator=generator)
            visits += [(rows, logits[rows], targets[rows]) for rows in order.split(batch)]
        return cls(visits, num_samples, epochs, targets)

    def record(self, scores: Sequence[str]) -> ScoreTable:
        """Play the run to a recorder."""
        recorder = DynamicsRecorder(self.num_samples, scores, never_learned="zero")
        per_epoch = len(self.visits) // self.epochs
        for number, (rows, logits, targets) in enumerate(self.visits, start=1):
            recorder.update(rows, logits, targets)
            if number % per_epoch == 0:
                recorder.end_epoch()
        return recorder.compute()

    def record_plainly(self) -> PlainForgetting:
        """Play the run to the peer."""
        plain = PlainForgetting(self.num_samples)
        for rows, logits, targets in self.visits:
            plain.update(rows, logits, targets)
        return plain


def _deepcore(bench: Bench) -> Iterator[Row]:
    """Forgetting recorded from the same logits, then the most forgotten of each class."""
    trace = _Trace.make(bench.size(50_000, 1_000), epochs=bench.size(5, 3))
    table, plain = trace.record(["forgetting"]), trace.record_plainly()
    forgotten = table["forgetting"].values
    bench.check(bool((forgotten == plain.events.numpy()).all()), "forgetting events")
    bench.check(bool(forgotten.any()), "no forgetting event in the trace")

    peer = "DeepCore's bookkeeping (forgetting only)"
    case = f"forgetting, {trace.epochs} epochs of {trace.num_samples:,}, C=10"
    repeats = bench.size(5, 2)
    for scores in (("forgetting",), _SCORES):
        seconds = alternate(
            {"mlkit": calling(trace.record, scores), peer: calling(trace.record_plainly)}, repeats
        )
        yield from bench.times(case, seconds, metric=f"recording {' + '.join(scores)}")

    targets, rule = trace.targets.numpy(), TopK(prune_rate=0.7, class_balanced=True)
    mine = rule.select(table["forgetting"], labels=targets).indices
    theirs = plain.select(targets, 0.7)
    bench.check(
        len(mine) == len(theirs) and forgotten[mine].sum() == forgotten[theirs].sum(),
        "events in the most forgotten of each class",
    )
    seconds = alternate(
        {
            "mlkit": calling(rule.select, table["forgetting"], labels=targets),
            "DeepCore's argsort per class": calling(plain.select, targets, 0.7),
        },
        bench.size(21, 2),
    )
    case = f"most forgotten of each class, {trace.num_samples:,} examples"
    yield from bench.times(case, seconds, metric="selection", unit="ms")
