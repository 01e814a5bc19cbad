"""The settings of the baselines are checked where they are written, without torch."""

import subprocess
import sys

import pytest

from mlkit.embeddings.baselines.config import (
    CAFEConfig,
    HashingConfig,
    MDEConfig,
    NarrowConfig,
    QRConfig,
)
from mlkit.errors import InvalidTypeError, InvalidValueError


@pytest.mark.parametrize(
    ("config", "more", "match"),
    [
        (HashingConfig, {"memory_budget": 1.5}, "memory_budget must be .* got 1.5"),
        (HashingConfig, {"optimizer": "adamm"}, "did you mean 'adam'"),
        (HashingConfig, {"min_rows": -1}, "min_rows must be at least 0, got -1"),
        (HashingConfig, {"seed": 1.0}, "seed must be an integer, got 1.0"),
        (QRConfig, {"operation": "concat"}, "operation must be 'mult' or 'add'"),
        (NarrowConfig, {"project": "yes"}, "project must be True or False, got 'yes'"),
        (MDEConfig, {"alpha": -0.5}, "alpha must be at least 0 and finite, got -0.5"),
        (MDEConfig, {"alpha": None}, "alpha must be a number, got None"),
        (CAFEConfig, {"hash_share": 1.0}, "hash_share must be in"),
        (CAFEConfig, {"threshold": -1}, "threshold must be above 0"),
        (CAFEConfig, {"decay": 0}, "decay must be in"),
        (CAFEConfig, {"decay_every": 0}, "decay_every must be at least 1, got 0"),
    ],
)
def test_ranges(config, more, match):
    with pytest.raises(InvalidValueError, match=match):
        config(**more)


def test_types():
    with pytest.raises(InvalidTypeError, match="memory_budget must be"):
        QRConfig(memory_budget=None)


def test_no_torch():
    code = (
        "import sys, mlkit.embeddings.baselines.config as c; c.CAFEConfig(memory_budget='2GiB');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
