import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mlkit.errors import InvalidValueError
from mlkit.sparsity.grouping import (
    _disjoint,
    _first_centres,
    _regret_order,
    _swap_while_better,
    _to_centre,
    balanced_kmeans,
    expert_permutation,
)


def inertia(points, labels):
    points = torch.nn.functional.normalize(points, dim=1)
    means = torch.stack([points[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    return float((points - means[labels]).square().sum())


def clumped(neurons, clusters, features=12, seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, features, generator=generator)
    own = torch.randint(clusters, (neurons,), generator=generator)
    return centres[own] + spread * torch.randn(neurons, features, generator=generator)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.3, 1.0, 10.0])
def test_assignment_is_within_two_percent_of_the_optimum(seed, spread):
    distance = torch.cdist(clumped(192, 8, seed=seed, spread=spread), clumped(12, 4)).square()
    labels = _swap_while_better(distance, _regret_order(distance, 16), 16)
    rows, columns = linear_sum_assignment(np.repeat(distance.numpy(), 16, axis=1))
    optimum = distance.numpy()[rows, columns // 16].sum()
    found = float(distance.gather(1, labels[:, None]).sum())
    assert optimum * (1 - 1e-5) <= found <= 1.02 * optimum


def test_clustering_is_as_good_as_with_exact_assignment():
    # Rows of trained weights are nearer to noise than to clumps. In clumps two local searches end
    # in different valleys from the same start, so only the median says something.
    ratios = {"noise": [], "clumps": []}
    for seed in range(5):
        noise = torch.randn(256, 32, generator=torch.Generator().manual_seed(seed))
        for kind, points in (("noise", noise), ("clumps", clumped(256, 6, seed=seed))):
            greedy, exact = (
                inertia(points, balanced_kmeans(points, 16, seed=seed, assign=assign))
                for assign in ("greedy", "exact")
            )
            ratios[kind].append(greedy / exact)
    assert max(ratios["noise"]) <= 1.02
    assert np.median(ratios["clumps"]) <= 1.02


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_sizes_are_exact_and_the_permutation_a_bijection(clusters, size, features, seed, equal):
    points = torch.randn(clusters * size, features, generator=torch.Generator().manual_seed(seed))
    if equal:
        points = torch.ones_like(points)
    labels = balanced_kmeans(points, size, seed=seed)
    assert labels.bincount(minlength=clusters).tolist() == [size] * clusters
    order = expert_permutation(labels)
    assert sorted(order.tolist()) == list(range(clusters * size))
    assert (labels[order].view(clusters, size) == torch.arange(clusters)[:, None]).all()


def test_same_seed_same_groups_and_torchs_own_stream_stays_put():
    points, state = clumped(256, 6), torch.get_rng_state()
    first = balanced_kmeans(points, 16, seed=3)
    assert torch.equal(first, balanced_kmeans(points, 16, seed=3))
    assert not torch.equal(first, balanced_kmeans(points, 16, seed=4))
    assert torch.equal(state, torch.get_rng_state())


def test_it_finds_well_separated_groups_and_beats_random_grouping():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randperm(128, generator=generator) % 8
    points = torch.eye(8)[truth] + 0.05 * torch.randn(128, 8, generator=generator)
    labels = balanced_kmeans(points, 16)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 8
    noise = torch.randn(256, 16, generator=generator)
    chance = torch.arange(256)[torch.randperm(256, generator=generator)] % 16
    assert inertia(noise, balanced_kmeans(noise, 16)) < 0.9 * inertia(noise, chance)


def test_first_centres_are_drawn_by_distance_and_not_twice():
    """k-means++ by products: the masses are those of differences, and a centre has none."""
    points = clumped(60, 6, seed=3)
    norms = points.square().sum(1)
    for centre in (0, 17):
        expected = (points.double() - points[centre].double()).square().sum(1)
        found = _to_centre(points, norms, centre)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        assert found[centre] == 0
    for seed in range(5):
        assert len(_first_centres(points, 60, seed).unique(dim=0)) == 60, "one at a time, all"


def test_no_iteration_makes_it_worse():
    points = clumped(256, 6)
    values = [inertia(points, balanced_kmeans(points, 16, iterations=n)) for n in range(1, 8)]
    assert values == sorted(values, reverse=True)


def test_row_lengths_matter_only_without_normalisation():
    points = clumped(64, 4)
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    same = balanced_kmeans(points * scale, 8)
    assert torch.equal(same, balanced_kmeans(points, 8))
    assert not torch.equal(same, balanced_kmeans(points * scale, 8, normalize=False))


def test_disjoint_pairs_share_no_neuron_and_hold_the_best():
    change = torch.tensor([-3.0, -1.0, -2.0, 0.0])
    partner = torch.tensor([1, 2, 1, 0])
    assert _disjoint(change, partner).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_type_and_layout(dtype):
    points = clumped(64, 4).to(dtype)
    labels = balanced_kmeans(points.T.contiguous().T, 8)
    assert torch.equal(labels, balanced_kmeans(points, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_size": 48}, r"expert_size=48, neurons=64; sizes that fit 64 neurons: .*32, 64"),
        ({"expert_size": 0}, "expert_size must divide"),
        ({"expert_size": 8, "iterations": 0}, "iterations must be at least 1"),
        ({"expert_size": 8, "assign": "best"}, "assign must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        balanced_kmeans(torch.ones(64, 4), **arguments)


def test_too_many_neurons_for_the_exact_method_and_nan_weights():
    with pytest.raises(InvalidValueError, match=r"at most 4096 neurons, got 4128; use 'greedy'"):
        balanced_kmeans(torch.ones(4128, 1), 32, assign="exact")
    with pytest.raises(InvalidValueError, match="NaN or infinite"):
        balanced_kmeans(torch.full((64, 4), torch.nan), 8)
