"""Hashing, quotient-remainder, narrow and mixed dimensions, against their formulas by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.embeddings.baselines.hashing import HashingEmbeddingBag
from mlkit.embeddings.baselines.mixed_dimensions import MDEEmbeddingBag, mixed_dimensions
from mlkit.embeddings.baselines.narrow import NarrowEmbeddingBag
from mlkit.embeddings.baselines.quotient_remainder import QREmbeddingBag
from mlkit.embeddings.id_hash import hash_ids
from mlkit.errors import InvalidValueError

MASK = (1 << 64) - 1


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20),
    st.integers(0, 2**64 - 1),
    st.integers(1, 2**40),
)
def test_hash_is_splitmix64(ids, seed, buckets):
    expected = [(splitmix64((i & MASK) ^ splitmix64(seed)) % 2**63) % buckets for i in ids]
    assert hash_ids(torch.tensor(ids), seed, buckets).tolist() == expected


def test_splitmix64_itself():
    """The first outputs of the published generator from state 0."""
    golden = 0x9E3779B97F4A7C15
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(i * golden & MASK) for i in range(3)] == known


def test_hash_spreads_consecutive_ids():
    counts = torch.bincount(hash_ids(torch.arange(100_000), 3, 100), minlength=100)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi2 < 170, "99 degrees of freedom: mean 99, standard deviation 14"
    other = hash_ids(torch.arange(100_000), 4, 100)
    same = (other == hash_ids(torch.arange(100_000), 3, 100)).float().mean()
    assert 0.005 < same < 0.02


def test_no_buckets():
    with pytest.raises(InvalidValueError, match="buckets must be at least 1, got 0"):
        hash_ids(torch.arange(3), 0, 0)


def test_hashing_reads_the_hashed_row():
    bag = HashingEmbeddingBag(1000, 8, memory_budget=0.05, seed=9)
    assert bag.weight.shape == (50, 8)
    for one in (0, 1, 17, 999):
        row = (splitmix64(one ^ splitmix64(9)) % 2**63) % 50
        assert torch.equal(bag(torch.tensor([[one]]))[0], bag.weight[row])


def test_hashing_with_room_for_all_has_no_collision():
    bag = HashingEmbeddingBag(97, 3, memory_budget=1.0)
    assert torch.equal(bag.to_dense().weight, bag.weight)


@given(st.integers(1, 500), st.integers(1, 600))
def test_qr_divisor_by_brute_force(rows, room):
    """The largest m with m + ceil(rows / m) within the room; it fails only if none fits."""
    fits = [m for m in range(1, rows + 1) if m + -(-rows // m) <= room]
    if not fits:
        with pytest.raises(InvalidValueError, match="minimum is"):
            QREmbeddingBag(rows, 1, memory_budget=4 * room, optimizer="sgd")
        return
    bag = QREmbeddingBag(rows, 1, memory_budget=4 * room, optimizer="sgd")
    assert bag.divisor == max(fits)
    assert len(bag.remainder) + len(bag.quotient) <= room


@pytest.mark.parametrize("operation", ["mult", "add"])
def test_qr_rows(operation):
    bag = QREmbeddingBag(103, 4, memory_budget=0.4, operation=operation)
    with torch.no_grad():
        bag.quotient.normal_()
        bag.remainder.normal_()
    pairs = {divmod(i, bag.divisor) for i in range(103)}
    assert len(pairs) == 103, "no two ids have the same pair"
    found = bag(torch.arange(103)[:, None])
    for i in range(103):
        q, r = bag.quotient[i // bag.divisor], bag.remainder[i % bag.divisor]
        assert torch.equal(found[i], q * r if operation == "mult" else q + r)


def test_qr_begins_as_a_dense_table_of_dlrm():
    bag = QREmbeddingBag(10_000, 8, memory_budget=0.3)
    rows = bag.to_dense().weight
    assert rows.abs().max() <= 0.01 * 1.01
    assert abs(rows.std() / (0.01 / 3**0.5) - 1) < 0.05


def test_qr_operation():
    with pytest.raises(InvalidValueError, match="operation must be 'mult' or 'add', got 'concat'"):
        QREmbeddingBag(10, 2, memory_budget=1.0, operation="concat")


def narrow_bytes(rows, d, dim, project, per_row, words):
    """Weights of 4 bytes and the state, of the table and its projection."""
    table = rows * (4 * d + per_row + 4 * words * d)
    return table + (dim * (4 * d + per_row + 4 * words * d) if project and d < dim else 0)


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.floats(0.05, 1),
    st.booleans(),
    st.sampled_from([("sgd", 0, 0), ("rowwise_adagrad", 4, 0), ("adagrad", 0, 1), ("adam", 0, 2)]),
)
def test_narrow_dimension_by_brute_force(rows, dim, fraction, project, optimizer):
    name, per_row, words = optimizer
    budget = int(fraction * narrow_bytes(rows, dim, dim, False, per_row, words))
    fits = [
        d
        for d in range(1, dim + 1)
        if narrow_bytes(rows, d, dim, project, per_row, words) <= budget
    ]
    make = {"memory_budget": fraction, "project": project, "optimizer": name}
    if not fits:
        with pytest.raises(InvalidValueError, match="minimum is"):
            NarrowEmbeddingBag(rows, dim, **make)
        return
    bag = NarrowEmbeddingBag(rows, dim, **make)
    assert bag.table_dim == max(fits)
    assert (bag.projection is None) == (not project or max(fits) == dim)


def test_narrow_rows():
    bag = NarrowEmbeddingBag(1000, 8, memory_budget=0.5, project=False)
    assert bag.table_dim == 3  # 18 bytes a row, 4 of them for the state
    out = bag(torch.tensor([[5]]))
    assert torch.equal(out[0, :3], bag.weight[5])
    assert not out[0, 3:].any()
    bag = NarrowEmbeddingBag(1000, 8, memory_budget=0.5)
    assert torch.allclose(bag(torch.tensor([[5]]))[0], bag.projection @ bag.weight[5])


def mde_bytes(rows, dims, full):
    return sum(narrow_bytes(n, d, full, True, 4, 0) for n, d in zip(rows, dims, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=6),
    st.integers(1, 24),
    st.floats(0.02, 1.2),
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
)
def test_mixed_dimensions(rows, dim, fraction, alpha):
    """Within the budget; popular tables get more; a finer search of lambda finds nothing larger."""
    budget = int(fraction * mde_bytes(rows, [dim] * len(rows), dim))

    def rule(base):
        return [max(1, min(dim, int(base * n**-alpha + 0.5))) for n in rows]

    largest = 2 * dim * max(rows) ** alpha
    bases = [largest * 0.97**i for i in range(700)]
    fits = [rule(b) for b in bases if mde_bytes(rows, rule(b), dim) <= budget]
    try:
        found = mixed_dimensions(rows, dim, budget, alpha=alpha)
    except InvalidValueError:
        assert not fits
        assert mde_bytes(rows, [1] * len(rows), dim) > budget
        return
    assert mde_bytes(rows, found, dim) <= budget
    assert all(1 <= d <= dim for d in found)
    for (n, d), (m, e) in itertools.permutations(zip(rows, found, strict=True), 2):
        assert n >= m or d >= e, "fewer rows, at least as many dimensions"
    if fits:
        assert all(ours >= other for ours, other in zip(found, fits[0], strict=True))


def test_mixed_dimensions_follow_the_power():
    found = mixed_dimensions([100, 10_000, 1_000_000], 64, 10**9, alpha=0.0)
    assert found == [64, 64, 64]
    a, b, c = mixed_dimensions([10**2, 10**4, 10**6], 1024, 80_000_000, alpha=0.3)
    assert b / c == pytest.approx(100**0.3, rel=0.05)
    assert a / b == pytest.approx(100**0.3, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "dim", "budget", "more", "match"),
    [
        ([], 4, 100, {}, "for each of one or more tables"),
        ([3, 0], 4, 100, {}, "at least 1"),
        ([3, 4], [4], 100, {}, "for each"),
        ([3], 4, 100, {"alpha": -0.1}, "alpha must be at least 0"),
        ([3], 4, 100, {"alpha": float("nan")}, "alpha must be at least 0"),
        ([10, 10], 4, 100, {}, "minimum is 224 bytes"),
    ],
)
def test_mixed_dimensions_refuse(rows, dim, budget, more, match):
    with pytest.raises(InvalidValueError, match=match):
        mixed_dimensions(rows, dim, budget, **more)


def test_mde_table():
    bag = MDEEmbeddingBag(10, 4, table_dim=4)
    assert bag.projection is None
    for wrong in (0, 5, 2.0):
        with pytest.raises(InvalidValueError, match="table_dim must be"):
            MDEEmbeddingBag(10, 4, table_dim=wrong)
