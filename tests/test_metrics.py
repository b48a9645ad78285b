"""vfengine/metrics.py: closed forms, what does not depend on scale or order, and refusals."""

import math

import numpy as np
import pytest
import torch

from vfengine.metrics import frechet_distance, inception_score, kernel_distance


def normal(n, d, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


def whitened(n, d, seed=0):
    """[n, d] of mean 0 and covariance 1 exactly."""
    x = normal(n, d, seed)
    q, _ = np.linalg.qr(x - x.mean(0))
    return q * math.sqrt(n - 1)


def test_frechet_distance_of_normals_with_commuting_covariances():
    """|m|² + the sum of (s - t)² for standard deviations s and t along the same axes."""
    x, y = whitened(50, 4), whitened(60, 4, seed=1)
    s, t, m = np.array([1.0, 2, 3, 0.5]), np.array([2.0, 1, 3, 0.1]), np.array([0.3, -1, 0, 2])
    expected = (m**2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(x * s, y * t + m) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_any_covariances():
    """Against the root of Cx Cy from its eigenvalues, as the definition has it."""
    x, y = normal(40, 6) @ normal(6, 6, 1), normal(30, 6, 2) @ normal(6, 6, 3) + 0.2
    cx, cy = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(cx @ cy).real).sum()
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = mean + np.trace(cx) + np.trace(cy) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_fewer_samples_than_features():
    x = normal(5, 40)
    assert frechet_distance(x, x[::-1].copy()) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x + 1) == pytest.approx(40, rel=1e-10)


def test_kernel_distance_term_by_term():
    x, y = normal(5, 3), normal(4, 3, seed=1)

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_0_on_average():
    values = [kernel_distance(normal(40, 8, 2 * i), normal(40, 8, 2 * i + 1)) for i in range(50)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(50)
    assert min(values) < 0 < kernel_distance(normal(40, 8), normal(40, 8, 1) + 1)


def test_inception_score_of_certain_and_of_undecided_rows():
    """As many as there are classes where each is named equally often; 1 where none is."""
    certain = np.eye(4)[np.arange(80) % 4]
    assert inception_score(certain) == pytest.approx((4, 0), abs=1e-12)
    assert inception_score(np.full((80, 4), 0.25)) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_is_over_splits():
    certain = np.eye(2)[[0, 1, 0, 1, 0, 0, 1, 1]]
    assert inception_score(certain, splits=2) == pytest.approx((2, 0))
    assert inception_score(certain[[0, 2, 4, 5, 0, 1, 0, 1]], splits=2) == pytest.approx((1.5, 0.5))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_torch_and_numpy_of_any_float_dtype(distance):
    x, y = normal(20, 4, dtype=np.float32), normal(20, 4, 1, dtype=np.float32) + 1
    expected = distance(x.astype(np.float64), y.astype(np.float64))
    assert distance(x, y) == expected
    assert distance(torch.from_numpy(x), y) == expected
    assert distance(x.astype(np.float16), torch.from_numpy(y).bfloat16()) == pytest.approx(
        expected, rel=0.05
    )


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_reject_what_they_cannot_take(distance):
    name = distance.__name__
    with pytest.raises(TypeError, match=rf"{name}: expected a float dtype, got torch.int64"):
        distance(np.zeros((3, 2), np.int64), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=rf"{name}: expected \[n, D\], got \[3\]"):
        distance(np.zeros(3), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=rf"{name}: .* one width, got \[3, 2\] and \[3, 4\]"):
        distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match=rf"{name}: expected at least 2 of each, got 1 and 3"):
        distance(np.zeros((1, 2)), np.zeros((3, 2)))


def test_inception_score_rejects_what_it_cannot_take():
    with pytest.raises(ValueError, match="rows of probabilities"):
        inception_score(np.full((20, 4), 0.3))
    with pytest.raises(ValueError, match="1 to 4 splits, got 10"):
        inception_score(np.eye(4))
