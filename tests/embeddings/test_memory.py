"""The arithmetic of bytes, against the numbers of the house's note on headers and by hand."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlkit.embeddings.memory import (
    OPTIMIZER_STATE,
    MemoryReport,
    dense_bytes,
    optimizer_bytes,
    parse_budget,
)
from mlkit.errors import InvalidTypeError, InvalidValueError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        ("1.5KiB", 1536),
        ("512MB", 512_000_000),
        (" 3TB ", 3 * 10**12),
        ("0.0005KB", None),
    ],
)
def test_sizes(text, size):
    if size is None:
        with pytest.raises(InvalidValueError, match="at least one byte"):
            parse_budget(text, 10)
    else:
        assert parse_budget(text, 10) == size


@given(st.floats(0, 1, exclude_min=True), st.integers(0, 2**50))
def test_a_fraction_is_at_most_that(fraction, dense):
    assert 0 <= parse_budget(fraction, dense) <= fraction * dense
    assert parse_budget(1.0, dense) == dense


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, float("nan"), "12", "3 apples", "-1GiB", ""])
def test_bad_budgets(budget):
    with pytest.raises(InvalidValueError, match="memory_budget must be .*fraction"):
        parse_budget(budget, 100)


@pytest.mark.parametrize("budget", [None, True, [3]])
def test_bad_types(budget):
    with pytest.raises(InvalidTypeError, match="memory_budget must be"):
        parse_budget(budget, 100)


def test_optimizer_state_is_that_of_torch():
    """Counted from torch's own state after a step."""
    import torch

    from mlkit.embeddings.rowwise_adagrad import RowWiseAdagrad

    made = {
        "sgd": torch.optim.SGD,
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
    }
    assert set(made) == set(OPTIMIZER_STATE)
    for name, cls in made.items():
        weight = torch.nn.Parameter(torch.randn(7, 5))
        weight.grad = torch.randn(7, 5)
        optimizer = cls([weight], lr=0.1)
        optimizer.step()
        held = sum(
            value.numel() * value.element_size()
            for value in optimizer.state[weight].values()
            if torch.is_tensor(value) and value.dim()
        )
        assert held == optimizer_bytes(7, 5, name), name


def test_dense_bytes():
    assert dense_bytes(10, 16, "sgd") == 640
    assert dense_bytes(10, 16, "rowwise_adagrad") == 680
    assert dense_bytes(10, 16, "adagrad", element_size=2) == 320 + 640
    with pytest.raises(InvalidValueError, match="did you mean 'adagrad'"):
        dense_bytes(10, 16, "adagrat")


def test_report():
    one = MemoryReport(100, 10, 20, 5, 3, 680, 640)
    assert one.total_bytes == 138
    assert one.byte_fraction == 138 / 680
    assert one.weight_fraction == 100 / 640
    assert one + one == MemoryReport(200, 20, 40, 10, 6, 1360, 1280)
    lines = str(one).splitlines()
    assert len(lines) == 8
    assert lines[5].split() == ["total", "138", "B", "20.29", "%", "of", "dense"]
    assert lines[-1] == "weights alone: 15.62 % of the dense weights"


def test_no_torch():
    code = "import sys, mlkit.embeddings.memory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
