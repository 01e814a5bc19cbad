"""The search of a density by accuracy: its path, its end, its state."""

import math

import pytest

from mlkit.embeddings import AutoDensity


def path(auto, metrics, density=1.0):
    found = []
    for metric in metrics:
        density = auto.update(metric, density)
        found.append(round(density, 6))
    return found


def test_density_falls_until_the_metric_does_and_takes_the_last_step_back():
    auto = AutoDensity(0.8, 0.001, step=0.2)
    assert path(auto, [0.8, 0.81, 0.7995, 0.7989, 0.9, 0.1]) == [0.8, 0.6, 0.4, 0.6, 0.6, 0.6]
    assert auto.is_settled
    assert auto.accepted == pytest.approx(0.6)


def test_loss_is_better_when_it_is_lower():
    auto = AutoDensity(0.5, 0.01, step=0.25, mode="min")
    assert path(auto, [0.505, 0.3, 0.52]) == [0.75, 0.5, 0.75]


def test_model_that_still_learns_keeps_its_density():
    auto = AutoDensity(0.8, step=0.1)
    assert path(auto, [0.5, 0.7, 0.7995], 0.5) == [0.5, 0.5, 0.4]
    assert not auto.is_settled


def test_lowest_density_is_reached_and_kept():
    auto = AutoDensity(0.8, step=0.3, lowest=0.25)
    assert path(auto, [0.8, 0.8, 0.8, 0.8]) == [0.7, 0.4, 0.25, 0.25]
    assert auto.is_settled
    last = AutoDensity(0.8, step=0.3, lowest=0.25)
    assert path(last, [0.8, 0.8, 0.8, 0.7]) == [0.7, 0.4, 0.25, 0.4]


def test_nan_is_never_good_enough():
    assert path(AutoDensity(0.8, step=0.5), [0.8, math.nan]) == [0.5, 1.0]
    assert path(AutoDensity(0.8, step=0.5), [math.nan]) == [1.0]


def test_state_goes_on():
    metrics = [0.8, 0.8, 0.7, 0.8]
    whole = path(AutoDensity(0.8, step=0.1), metrics)
    first, second = AutoDensity(0.8, step=0.1), AutoDensity(0.8, step=0.1)
    begun = path(first, metrics[:2])
    second.load_state_dict(first.state_dict())
    assert begun + path(second, metrics[2:], first.accepted - 0.1) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": math.inf}, "reference must be a finite number, got inf"),
        ({"reference": 1.0, "max_drop": -1}, "max_drop must be a number of at least 0, got -1"),
        ({"reference": 1.0, "step": 1.0}, r"step must be in \(0, 1\), got 1.0"),
        ({"reference": 1.0, "lowest": 0}, r"lowest must be in \(0, 1\], got 0"),
        ({"reference": 1.0, "mode": "up"}, "mode must be 'max' or 'min', got 'up'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoDensity(**arguments)
