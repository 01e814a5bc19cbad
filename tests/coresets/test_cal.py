"""CAL scores against loops and scipy's relative entropy."""

import numpy as np
import pytest
from scipy.stats import entropy

from mlkit.coresets.cal import cal_scores
from mlkit.errors import InvalidValueError


def data(n, num_classes=4, dim=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(num_classes), n), rng.normal(size=(n, dim))


def naive(probs, features, k):
    result = []
    for i in range(len(probs)):
        distances = np.linalg.norm(features - features[i], axis=1)
        distances[i] = np.inf
        result.append(np.mean([entropy(probs[j], probs[i]) for j in np.argsort(distances)[:k]]))
    return result


@pytest.mark.parametrize("k", [1, 5, 10])
def test_against_loops(k, monkeypatch):
    probs, features = data(60)
    score = cal_scores(probs, features, num_neighbors=k)
    assert (score.name, score.hard) == ("cal", "high")
    np.testing.assert_allclose(score.values, naive(probs, features, k), rtol=1e-9)
    monkeypatch.setattr("mlkit.coresets.cal._CHUNK_BYTES", 1000)
    assert cal_scores(probs, features, num_neighbors=k).values.tolist() == score.values.tolist()


def test_the_one_that_disagrees_is_hardest():
    features = np.random.default_rng(0).normal(size=(30, 2)) * 0.01
    probs = np.tile([0.95, 0.05], (30, 1))
    probs[17] = [0.05, 0.95]
    assert cal_scores(probs, features, num_neighbors=29).values.argmax() == 17


def test_zero_probabilities_and_few_examples():
    probs = np.eye(3, dtype=np.float32)
    values = cal_scores(probs, np.arange(3.0)[:, None]).values
    assert np.isfinite(values).all()
    assert values.min() > 10
    assert cal_scores(probs[:1], np.zeros((1, 2))).values.tolist() == [0.0]


def test_bad_input():
    probs, features = data(10)
    with pytest.raises(InvalidValueError, match="one row per example"):
        cal_scores(probs, features[:5])
    with pytest.raises(InvalidValueError, match="num_neighbors must be at least 1, got 0"):
        cal_scores(probs, features, num_neighbors=0)
    with pytest.raises(InvalidValueError, match="pass softmax outputs"):
        cal_scores(-probs, features)
    features[0] = np.nan
    with pytest.raises(InvalidValueError, match="features hold NaN"):
        cal_scores(probs, features)
