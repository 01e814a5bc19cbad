"""Coverage against scikit-learn's NearestNeighbors, and its properties."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from mlkit.coresets.coverage import coverage_auc, coverage_curve, min_distances
from mlkit.coresets.simple import RandomSelector
from mlkit.errors import InvalidValueError


def data(n, dim=8, seed=0, offset=0.0, dtype=np.float32):
    return (np.random.default_rng(seed).normal(size=(n, dim)) + offset).astype(dtype)


def reference(features, selected, eval_features=None, metric="l2"):
    metric = {"l2": "euclidean", "cosine": "cosine"}[metric]
    chosen = features[selected].astype(np.float64)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute", metric=metric).fit(chosen)
    targets = features if eval_features is None else eval_features
    return search.kneighbors(targets.astype(np.float64))[0][:, 0]


# The anchor found is within a relative 1e-4 of the nearest in squared distance wherever two are
# that close; otherwise only the float32 difference rounds.
RTOL = 5e-5


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.parametrize("held_out", [False, True])
def test_against_sklearn(metric, dim, held_out):
    features = data(700, dim) + (1 if dim == 1 else 0)
    other = data(301, dim, seed=1) if held_out else None
    selected = np.arange(0, 700, 7)
    ours = min_distances(features, selected, eval_features=other, metric=metric)
    expected = reference(features, selected, other, metric)
    # scikit-learn puts a copy at up to some 1e-7, not at 0.
    np.testing.assert_allclose(ours, expected, rtol=RTOL, atol=1e-6)
    auc = coverage_auc(features, selected, eval_features=other, metric=metric)
    assert auc == pytest.approx(expected.mean(), rel=RTOL, abs=1e-6)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_far_from_the_origin_and_near_copies(offset):
    rng = np.random.default_rng(0)
    base = data(200, 16, offset=offset, dtype=np.float64)
    near = base + 1e-5 * rng.normal(size=base.shape)
    ours = min_distances(np.concatenate([base, near]), np.arange(200))
    expected = np.linalg.norm(base - near, axis=1)
    np.testing.assert_allclose(ours[200:], expected, rtol=1e-6)


def test_copies_are_at_exactly_zero():
    features = np.repeat(data(100, 32, offset=5.0), 3, axis=0)
    assert min_distances(features, np.arange(0, 300, 3)).max() == 0
    assert min_distances(features, np.arange(300), eval_features=features.copy()).max() == 0
    assert min_distances(features, np.arange(0, 300, 3), metric="cosine").max() == 0


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 20])
def test_chunks_and_tiles_do_not_change_the_result(monkeypatch, chunk_bytes):
    features, selected = data(150), np.arange(0, 150, 4)
    whole = min_distances(features, selected)
    monkeypatch.setattr("mlkit.coresets.nearest._TILE", 7)
    np.testing.assert_allclose(
        min_distances(features, selected, chunk_bytes=chunk_bytes), whole, rtol=RTOL
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32]
)
def test_tensors(dtype):
    features = (torch.from_numpy(data(120)) * 4).to(dtype).requires_grad_(dtype.is_floating_point)
    selected = torch.arange(0, 120, 5)
    ours = min_distances(features, selected)
    assert isinstance(ours, np.ndarray)
    expected = reference(features.detach().double().numpy(), selected.numpy())
    np.testing.assert_allclose(ours, expected, rtol=RTOL, atol=1e-6)


def test_products_in_reduced_precision_do_no_harm(monkeypatch):
    from mlkit.coresets import nearest

    exact = nearest._nearest

    def like_tf32(x, anchors, squares):
        if x.dtype == torch.float32:
            x, anchors = (t.bfloat16().float() for t in (x, anchors))
        return exact(x, anchors, squares)

    monkeypatch.setattr(nearest, "_nearest", like_tf32)
    features, selected = data(3000, 64), np.arange(0, 3000, 10)
    ours = min_distances(features, selected)
    np.testing.assert_allclose(ours, reference(features, selected), rtol=RTOL, atol=1e-6)


@pytest.mark.gpu
def test_on_the_gpu():
    features = torch.from_numpy(data(3000, 64))
    selected = np.arange(0, 3000, 10)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        ours = min_distances(features.cuda(), selected)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(ours, reference(features.numpy(), selected), rtol=RTOL, atol=1e-6)


def test_read_only_and_strided_arrays():
    features = data(80)
    expected = min_distances(features, [0, 5])
    frozen = features.copy()
    frozen.setflags(write=False)
    assert min_distances(frozen, [0, 5]).tolist() == expected.tolist()
    wide = np.repeat(features, 2, axis=0)[::2]
    assert min_distances(wide, [0, 5]).tolist() == expected.tolist()


def test_selection_and_indices_are_the_same():
    features = data(50)
    selection = RandomSelector(prune_rate=0.8).select(features=features)
    assert coverage_auc(features, selection) == coverage_auc(features, selection.indices.tolist())


@given(n=st.integers(1, 60), dim=st.integers(1, 5), seed=st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_a_superset_never_has_a_larger_auc(n, dim, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, dim)).astype(np.float32)
    order = rng.permutation(n)
    small, large = sorted(rng.integers(1, n + 1, 2))
    few, many = (coverage_auc(features, order[:k]) for k in (small, large))
    # Among anchors that are equally near to float32, either may be found.
    assert many <= few * (1 + RTOL)
    assert coverage_auc(features, order) == 0


def test_curve_is_the_sorted_distances_and_its_mean_the_auc():
    features, selected = data(90), np.arange(0, 90, 9)
    p, r = coverage_curve(features, selected)
    assert p[0] == 1 / 90
    assert p[-1] == 1
    assert np.all(np.diff(r) >= 0)
    assert r.mean(dtype=np.float64) == coverage_auc(features, selected)
    distances = min_distances(features, selected)
    for k in (9, 44, 89):
        assert (distances <= r[k]).mean() >= p[k]


def test_per_class_covers_a_class_by_its_own():
    features, labels = data(120), np.arange(120) % 3
    selected = np.array([0, 3, 1, 4, 9])
    result = coverage_auc(features, selected, labels=labels, per_class=True)
    assert set(result) == {0, 1, 2}
    assert result[2] == float("inf")
    for c, chosen in ((0, [0, 3, 9]), (1, [1, 4])):
        nearest = NearestNeighbors(n_neighbors=1).fit(features[chosen].astype(np.float64))
        expected = nearest.kneighbors(features[labels == c].astype(np.float64))[0].mean()
        assert result[c] == pytest.approx(expected, rel=RTOL)


def test_per_class_on_held_out_examples():
    features, labels = data(60), np.arange(60) % 2
    other, asked = data(31, seed=3), np.ones(31, int)
    result = coverage_auc(
        features,
        np.arange(10),
        eval_features=other,
        labels=torch.from_numpy(labels),
        eval_labels=asked,
        per_class=True,
    )
    expected = reference(features, np.arange(1, 10, 2), other).mean()
    assert result == {1: pytest.approx(expected, rel=RTOL)}


def test_hardest_first_covers_worse_than_random():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 8)).astype(np.float32)
    hardest = np.argsort(features[:, 0])[-200:]  # One corner of the data.
    assert coverage_auc(features, hardest) > 1.2 * coverage_auc(
        features, rng.permutation(2000)[:200]
    )


def test_importing_the_room_does_not_import_torch():
    code = "import sys, mlkit.coresets.coverage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected": []}, "nothing is selected"),
        ({"selected": [0, 10]}, r"selected must lie in \[0, 10\), got 0 to 10"),
        ({"selected": [-1, 2]}, r"selected must lie in \[0, 10\), got -1 to 2"),
        ({"selected": np.ones(10, bool)}, "integer positions, got shape"),
        ({"metric": "l1"}, "metric must be 'l2' or 'cosine', got 'l1'"),
        ({"chunk_bytes": 0}, "chunk_bytes must be at least 1, got 0"),
        ({"features": np.ones(4)}, "features must be 2-dimensional real numbers"),
        ({"eval_features": np.ones((4, 3))}, "features have 2 columns and eval_features 3"),
        ({"eval_features": np.full((4, 2), np.nan)}, "features of 4 examples are NaN or infinite"),
        ({"eval_features": np.ones((0, 2))}, "eval_features is empty"),
        ({"per_class": True}, "per_class=True needs labels"),
        ({"per_class": True, "labels": np.zeros(9, int)}, "labels must be 10 integers"),
        (
            {"per_class": True, "labels": np.zeros(10, int), "eval_features": np.ones((4, 2))},
            "per_class=True needs eval_labels",
        ),
    ],
)
def test_bad_input(change, message):
    call = {"features": data(10, 2), "selected": [0, 3], **change}
    with pytest.raises(InvalidValueError, match=message):
        coverage_auc(call.pop("features"), call.pop("selected"), **call)
