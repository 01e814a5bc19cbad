"""Neurons to experts: k-means with clusters of equal size, on the rows that read the input.

LTE (Zheng et al. 2024, arXiv 2402.06126, section 4.1) groups the neurons of a feed-forward layer by
the balanced k-means of Malinen & Franti (2014), as MoEfication (Zhang et al. 2022, arXiv
2110.01786) did. The assignment step is ours: the exact one is a linear assignment of I neurons to I
places (I^3 operations), so neurons go in the order of their regret to the nearest cluster with
room, and then pairs of neurons change places while that helps. The best partner of every neuron
costs I * N operations for N clusters, because only the best member of each cluster matters.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlkit.errors import InvalidValueError

__all__ = ["balanced_kmeans", "expert_permutation", "nearest_valid_sizes"]

MAX_EXACT = 4096
"""Most neurons for `assign="exact"`; above, the Hungarian method takes minutes and gigabytes."""

FRESH_STARTS = 4
"""Iterations that also try the regret order anew; later ones only improve on the last."""


def balanced_kmeans(
    features: Float[Tensor, "neurons features"],
    expert_size: int,
    *,
    seed: int = 0,
    iterations: int = 20,
    assign: Literal["greedy", "exact"] = "greedy",
    normalize: bool = True,
    tolerance: float = 1e-4,
) -> Int[Tensor, " neurons"]:
    """Cluster neurons into experts of exactly `expert_size` members.

    Minimises sum_j ||f_j - c_{a(j)}||^2 over assignments a with `expert_size` neurons per cluster,
    c the mean of a cluster. With "greedy" no iteration makes it worse.

    Args:
        features: A row per neuron: of the gate projection if there is one (paper, footnote 2),
            else of the input projection.
        expert_size: S; must divide the number of neurons. 32 in the paper.
        seed: Keys the first centres (k-means++).
        iterations: Most alternations of assignment and means; ours.
        assign: "greedy" as above, or "exact" (linear assignment, up to 4096 neurons).
        normalize: Divide rows by their L2 norm first, as MoEfication does; the paper is silent.
        tolerance: Stop when the relative gain of an iteration is below this; ours.

    Returns:
        The expert of each neuron.

    Raises:
        InvalidValueError: If a size does not fit.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 0.8]])
        >>> expert = balanced_kmeans(rows, 2)
        >>> bool(expert[0] == expert[2]), bool(expert[1] == expert[3]), expert.bincount().tolist()
        (True, True, [2, 2])
    """
    neurons = features.shape[0]
    if expert_size < 1 or neurons % expert_size:
        raise InvalidValueError(
            f"expert_size must divide the number of neurons, got expert_size={expert_size}, "
            f"neurons={neurons}; {nearest_valid_sizes(neurons, expert_size)}"
        )
    if iterations < 1:
        raise InvalidValueError(f"iterations must be at least 1, got {iterations}")
    if assign not in ("greedy", "exact"):
        raise InvalidValueError(f"assign must be 'greedy' or 'exact', got {assign!r}")
    if assign == "exact" and neurons > MAX_EXACT:
        raise InvalidValueError(
            f"assign='exact' takes at most {MAX_EXACT} neurons, got {neurons}; use 'greedy'"
        )
    points = features.detach().float()
    if not bool(points.isfinite().all()):
        raise InvalidValueError("the weights to group hold NaN or infinite values")
    if normalize:
        points = torch.nn.functional.normalize(points, dim=1)
    num_clusters = neurons // expert_size
    centres = _first_centres(points, num_clusters, seed)
    best, best_inertia = torch.arange(neurons, device=points.device) // expert_size, float("inf")
    for number in range(iterations):
        distance = _squared_distances(points, centres)
        if assign == "exact":
            labels = _exact(distance, expert_size)
        else:
            fresh = [_regret_order(distance, expert_size)] if number < FRESH_STARTS else []
            starts = [*fresh, *([best] if number else [])]
            ends = [_swap_while_better(distance, start, expert_size) for start in starts]
            labels = min(ends, key=lambda end: float(distance.gather(1, end[:, None]).sum()))
        centres = points[labels.argsort(stable=True)].view(num_clusters, expert_size, -1).mean(1)
        inertia = float((points - centres[labels]).square().sum())
        if inertia >= best_inertia:
            break
        gain = best_inertia - inertia
        best, best_inertia = labels, inertia
        if gain < tolerance * inertia:
            break
    return best


def expert_permutation(expert: Int[Tensor, " neurons"]) -> Int[Tensor, " neurons"]:
    """Return the order of neurons in which each expert is a contiguous block, stable inside."""
    return expert.argsort(stable=True)


def nearest_valid_sizes(neurons: int, expert_size: int) -> str:
    """Return a hint: the sizes nearest to `expert_size` that divide the number of neurons."""
    divisors = [d for d in range(1, neurons + 1) if neurons % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(d - expert_size))[:3])
    return f"sizes that fit {neurons} neurons: {', '.join(map(str, near))}"


def _first_centres(
    points: Float[Tensor, "neurons features"], count: int, seed: int
) -> Float[Tensor, "clusters features"]:
    """Draw centres by k-means++: each with probability proportional to its squared distance.

    Distances come from one product with a vector per centre; differences of all points would be
    written and read again each time.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * len(points))]
    norms = points.square().sum(1)
    nearest = _to_centre(points, norms, chosen[0])
    for draw in draws[1:]:
        mass = nearest.double().cumsum(0)
        where = int(torch.searchsorted(mass, draw * mass[-1]))
        chosen.append(min(where, len(points) - 1))
        nearest = torch.minimum(nearest, _to_centre(points, norms, chosen[-1]))
    return points[chosen]


def _to_centre(
    points: Float[Tensor, "neurons features"], norms: Float[Tensor, " neurons"], centre: int
) -> Float[Tensor, " neurons"]:
    """Return squared distances to a point, which is at 0 from itself in spite of rounding."""
    distance = norms + norms[centre] - 2 * torch.mv(points, points[centre])
    distance[centre] = 0.0
    return distance.clamp(min=0.0)


def _squared_distances(
    points: Float[Tensor, "neurons features"], centres: Float[Tensor, "clusters features"]
) -> Float[Tensor, "neurons clusters"]:
    norms = points.square().sum(1, keepdim=True) + centres.square().sum(1)
    return torch.addmm(norms, points, centres.T, alpha=-2)


def _exact(
    distance: Float[Tensor, "neurons clusters"], expert_size: int
) -> Int[Tensor, " neurons"]:
    from scipy.optimize import linear_sum_assignment

    places = np.repeat(distance.cpu().numpy(), expert_size, axis=1)
    _, columns = linear_sum_assignment(places)
    return torch.from_numpy(columns // expert_size).to(distance.device)


def _regret_order(
    distance: Float[Tensor, "neurons clusters"], expert_size: int
) -> Int[Tensor, " neurons"]:
    """Give every neuron its nearest cluster with room, the one that would lose most first."""
    if distance.shape[1] == 1:
        return torch.zeros(len(distance), dtype=torch.int64, device=distance.device)
    two = distance.topk(2, dim=1, largest=False).values
    order = (two[:, 0] - two[:, 1]).argsort(stable=True).tolist()
    preference = distance.argsort(dim=1, stable=True).cpu().numpy()
    room = [expert_size] * distance.shape[1]
    labels = np.empty(len(distance), dtype=np.int64)
    for neuron in order:
        for cluster in preference[neuron]:
            if room[cluster]:
                room[cluster] -= 1
                labels[neuron] = cluster
                break
    return torch.from_numpy(labels).to(distance.device)


def _swap_while_better(
    distance: Float[Tensor, "neurons clusters"], labels: Int[Tensor, " neurons"], expert_size: int
) -> Int[Tensor, " neurons"]:
    """Exchange pairs of neurons while the sum of distances falls.

    With M[i, c] = D[i, c] - D[i, a(i)], exchanging i and j changes the sum by
    M[i, a(j)] + M[j, a(i)]; pairs that share no neuron are independent, so many go at once.
    """
    neurons, clusters = distance.shape
    labels = labels.clone()
    rows = torch.arange(neurons, device=distance.device)
    for _ in range(neurons):
        change = distance - distance.gather(1, labels[:, None])
        members = labels.argsort(stable=True)
        by_cluster = change[members].view(clusters, expert_size, clusters)
        cheapest, place = by_cluster.min(dim=1)  # [c, c']: of the members of c, to move to c'
        total = change + cheapest.T[labels]
        total.scatter_(1, labels[:, None], 0.0)
        best, cluster = total.min(dim=1)
        partner = members[cluster * expert_size + place[cluster, labels]]
        first = _disjoint(best, partner)
        first &= best < -1e-6
        if not bool(first.any()):
            break
        left, right = rows[first], partner[first]
        labels[left], labels[right] = labels[right], labels[left]
    return labels


def _disjoint(
    change: Float[Tensor, " neurons"], partner: Int[Tensor, " neurons"]
) -> Bool[Tensor, " neurons"]:
    """Mark the pairs (i, partner[i]) that are better than every other pair with i or partner[i]."""
    neurons = len(change)
    rank = torch.empty_like(partner)
    rank[change.argsort(stable=True)] = torch.arange(neurons, device=change.device)
    lowest = rank.scatter_reduce(0, partner, rank, reduce="amin")
    return (lowest == rank) & (lowest[partner] == rank)
