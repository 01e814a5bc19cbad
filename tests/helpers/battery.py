"""The tests that every converter passes, or fails in the way that it declares.

A converter's test file makes a class of them:

    class TestMine(ConverterBattery):
        cases = (BatteryCase("linear", build, inputs, MyConfig(), expect={...}),)

`expect` declares every row of `ROWS` as `passes` or `raises(error, match)`, so that nothing is
left undefined.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mlkit
from mlkit.convert import conversions, load_pretrained, save_pretrained
from tests.helpers.ddp import WorkerError, run_ddp

__all__ = ["ALL_PASS", "ROWS", "BatteryCase", "ConverterBattery", "passes", "raises"]


@dataclass(frozen=True)
class Expectation:
    """What a row does: pass, or raise an error whose message matches."""

    error: type[BaseException] | None = None
    match: str = ""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        if self.error is None:
            return contextlib.nullcontext()
        return pytest.raises(self.error, match=self.match)


passes = Expectation()


def raises(error: type[BaseException], match: str) -> Expectation:
    return Expectation(error, match)


def _call(model: nn.Module, *inputs: Any) -> Tensor:
    return model(*inputs)


@dataclass(frozen=True)
class BatteryCase:
    """One model to convert.

    Args:
        name: Shown in the test's id.
        build: Returns the stock model, the same at every call; at the top level of a module.
        inputs: Returns the positional arguments of `call`, the batch first; at the top level, too.
        config: What `mlkit.convert` gets.
        expect: Every row of `ROWS` to `passes` or `raises(...)`.
        targets: As in `mlkit.convert`.
        call: Maps (model, *inputs) to the tensor that is compared; at the top level, too.
        slow: Rows to run among the slow tests, where another case tells the same.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    config: Any
    expect: Mapping[str, Expectation] = field(default_factory=dict)
    targets: Any = "auto"
    call: Callable[..., Tensor] = _call
    slow: tuple[str, ...] = ()

    def converted(self) -> nn.Module:
        model = self.build()
        mlkit.convert(model, self.config, self.targets)
        return model

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        return self.call(model.eval(), *self.inputs())

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        model.train().zero_grad()
        self.call(model, *self.inputs()).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------ rows


def _same(case: BatteryCase, left: nn.Module, right: nn.Module) -> None:
    torch.testing.assert_close(case.output(left), case.output(right), rtol=0, atol=0)


def row_deepcopy(case: BatteryCase, tmp_path: Path) -> None:
    model = case.converted()
    copied = copy.deepcopy(model)
    _same(case, model, copied)
    own = {id(m) for m in model.modules()}
    assert not own & {id(m) for m in copied.modules()}
    before = case.output(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    torch.testing.assert_close(case.output(model), before, rtol=0, atol=0)
    assert mlkit.restore(copied) == list(conversions(model)), "the copy is converted on its own"


def row_pickle(case: BatteryCase, tmp_path: Path) -> None:
    model = case.converted()
    again = pickle.loads(pickle.dumps(model))
    _same(case, model, again)
    assert conversions(again) == conversions(model)
    mlkit.restore(again)


def row_state_dict(case: BatteryCase, tmp_path: Path) -> None:
    model = case.converted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = case.converted()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    _same(case, model, other)
    stock = case.build().state_dict()
    sites = tuple(f"{name}." for name in conversions(model))
    untouched = [key for key in stock if not key.startswith(sites)]
    assert [key for key in model.state_dict() if not key.startswith(sites)] == untouched


def row_stock_checkpoint(case: BatteryCase, tmp_path: Path) -> None:
    """Stock weights in a converted model: back out come exactly these weights."""
    trained = case.build()
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters()):
            parameter.mul_(1.0 + 0.1 * number)
    model = case.converted()
    model.load_state_dict(trained.state_dict(), strict=False)
    mlkit.restore(model)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def row_compile(case: BatteryCase, tmp_path: Path) -> None:
    model = case.converted()
    other = copy.deepcopy(model)  # training may change what a model holds
    expected, gradients = case.output(model), case.gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager")
    torch.testing.assert_close(case.output(compiled), expected, rtol=1e-4, atol=1e-5)
    found = {n.removeprefix("_orig_mod."): g for n, g in case.gradients(compiled).items()}
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)


def row_autocast(case: BatteryCase, tmp_path: Path) -> None:
    model = case.converted()
    expected = case.output(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.output(model).float()
        gradients = case.gradients(model)
    assert (found - expected).norm() <= 0.05 * expected.norm(), "bf16 has 8 bits of mantissa"
    assert gradients
    assert all(g.isfinite().all() for g in gradients.values())


def row_meta(case: BatteryCase, tmp_path: Path) -> None:
    real = case.converted()
    with torch.device("meta"):
        empty = case.build()
    mlkit.convert(empty, case.config, case.targets)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    # A model's own buffers that are in no checkpoint (rotary frequencies) are its own business.
    lost = {n: b for n, b in empty.named_buffers() if n not in empty.state_dict()}
    empty.load_state_dict(real.state_dict(), assign=True)
    for name in lost:
        owner, _, key = name.rpartition(".")
        empty.get_submodule(owner)._buffers[key] = real.get_buffer(name)
    _same(case, real, empty)


def row_tied(case: BatteryCase, tmp_path: Path) -> None:
    """A module under two names is converted once and stays one module."""
    twice = Twice(case.build())
    patterns = [case.targets] if isinstance(case.targets, str) else list(case.targets)
    targets = "auto" if case.targets == "auto" else [f"second.{p}" for p in patterns]
    report = mlkit.convert(twice, case.config, targets)
    assert report.replaced
    assert all(name.startswith("first.") for name in report.replaced)
    assert twice.first is twice.second
    alone = case.converted()
    alone.load_state_dict(twice.first.state_dict())
    _same(case, twice, alone)
    save_pretrained(twice, tmp_path)
    _same(case, twice, load_pretrained(Twice(case.build()), tmp_path))
    mlkit.restore(twice)
    assert twice.first is twice.second
    _same(case, twice, case.build())


def row_save(case: BatteryCase, tmp_path: Path) -> None:
    model = case.converted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    save_pretrained(model, tmp_path)
    fresh = load_pretrained(case.build(), tmp_path)
    _same(case, model, fresh)
    assert conversions(fresh) == conversions(model)
    _same(case, model, load_pretrained(case.converted(), tmp_path))


def row_restore(case: BatteryCase, tmp_path: Path) -> None:
    """What comes back is the stock model: classes, keys, every bit of the weights, outputs."""
    stock, model = case.build(), case.converted()
    mlkit.restore(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in stock.named_modules()
    ]
    assert list(model.state_dict()) == list(stock.state_dict())
    for key, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    _same(case, model, stock)
    assert not conversions(model)
    mlkit.convert(model, case.config, case.targets)
    _same(case, model, case.converted())


def row_ddp(case: BatteryCase, tmp_path: Path) -> None:
    try:
        results = run_ddp(_ddp_worker, 2, case)
    except WorkerError as error:
        raise AssertionError(str(error)) from error
    assert all(results)


def _ddp_worker(rank: int, world_size: int, case: BatteryCase) -> bool:
    model = nn.parallel.DistributedDataParallel(case.converted())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = case.inputs()
    for _ in range(2):
        optimizer.zero_grad()
        batch = inputs[0][rank::world_size]
        loss = case.call(model.train(), batch, *inputs[1:]).square().mean()
        loss.backward()
        optimizer.step()
    for parameter in model.parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, parameter)
    return bool(loss.isfinite())


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first = module
        self.second = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self.first(*args, **kwargs)
        self.second(*args, **kwargs)
        return first


ROWS: dict[str, Callable[[BatteryCase, Path], None]] = {
    "deepcopy": row_deepcopy,
    "pickle": row_pickle,
    "state_dict": row_state_dict,
    "stock_checkpoint": row_stock_checkpoint,
    "compile": row_compile,
    "autocast": row_autocast,
    "meta": row_meta,
    "tied": row_tied,
    "save": row_save,
    "restore": row_restore,
    "ddp": row_ddp,
}
"""Name of a row to its test."""

ALL_PASS = dict.fromkeys(ROWS, passes)
"""What a converter declares that does everything."""


class ConverterBattery:
    """Every row of `ROWS` for every case; subclass it, name it `Test...` and set `cases`."""

    cases: tuple[BatteryCase, ...] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"case", "row"} <= set(metafunc.fixturenames):
            pairs = [
                pytest.param(
                    case,
                    row,
                    marks=[pytest.mark.slow] if row in case.slow else [],
                    id=f"{case.name}-{row}",
                )
                for case in self.cases
                for row in ROWS
            ]
            metafunc.parametrize(("case", "row"), pairs)

    def test_row(self, case: BatteryCase, row: str, tmp_path: Path) -> None:
        assert set(case.expect) == set(ROWS), "declare every row: passes or raises(...)"
        with case.expect[row].context():
            ROWS[row](case, tmp_path)
