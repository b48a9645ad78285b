"""How far two sets of clips are from one another, by features that some network read in them.

Features are [n, D] of any float dtype, NumPy's or torch's; all sums are in float64. These are the
distances of FID, FVD, KID and KVD: which of them depends on the features alone.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["frechet_distance", "inception_score", "kernel_distance"]

Features: TypeAlias = Tensor | np.ndarray


def frechet_distance(x: Features, y: Features) -> float:
    """The Fréchet distance of two normal distributions with the sets' means and covariances.

    |mean x - mean y|² + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), covariances over n - 1: M. Heusel et al.,
    "GANs Trained by a Two Time-Scale Update Rule" (FID).

    x, y: features [n, D] and [m, D], n and m >= 2

    Raises TypeError for features of no float dtype, ValueError for shapes that do not fit.
    """
    first, second = _both("frechet_distance", x, y)
    difference = first.mean(0) - second.mean(0)
    # With C = R'R, tr (Cx Cy)^(1/2) is the sum of the singular values of Rx Ry': no root of a
    # matrix that few samples leave singular has to be taken.
    rx, ry = (_covariance_factor(values) for values in (first, second))
    root = torch.linalg.svdvals(rx @ ry.T).sum()
    distance = difference.square().sum() + rx.square().sum() + ry.square().sum() - 2 * root
    return float(distance)


def kernel_distance(x: Features, y: Features) -> float:
    """The squared maximum mean discrepancy with the kernel (x·y / D + 1)³, its unbiased estimate.

    M. Binkowski et al., "Demystifying MMD GANs" (KID). Two samples of one distribution are at 0 on
    average, and may come out below it.

    x, y: features [n, D] and [m, D], n and m >= 2

    Raises TypeError for features of no float dtype, ValueError for shapes that do not fit.
    """
    first, second = _both("kernel_distance", x, y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def inception_score(p: Features, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation, over `splits` parts, of exp(mean KL(p(y|x) || p(y))).

    T. Salimans et al., "Improved Techniques for Training GANs".

    p: probabilities [n, K], each row of sum 1, n >= splits

    Raises TypeError for no float dtype, ValueError for another shape, rows that are no
    probabilities, or more splits than rows.
    """
    rows = _features("inception_score", p)
    if (rows < 0).any() or (rows.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("inception_score: expected rows of probabilities, each of sum 1")
    if not 1 <= splits <= len(rows):
        raise ValueError(f"inception_score: expected 1 to {len(rows)} splits, got {splits}")
    parts = []
    for part in rows.tensor_split(splits):
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        parts.append(divergence.sum(1).mean().exp())
    scores = torch.stack(parts)
    return float(scores.mean()), float(scores.std(correction=0))


def _covariance_factor(x: Tensor) -> Tensor:
    """R [min(n, D), D] with R'R the covariance of x [n, D]."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _both(name: str, x: Features, y: Features) -> tuple[Tensor, Tensor]:
    first, second = _features(name, x), _features(name, y)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{name}: expected features of one width, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise ValueError(f"{name}: expected at least 2 of each, got {n} and {m}")
    return first, second


def _features(name: str, x: Features) -> Tensor:
    """float64 [n, D]."""
    tensor: Tensor = torch.as_tensor(x, device=getattr(x, "device", "cpu"))
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {tensor.dtype}")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name}: expected [n, D], got {list(tensor.shape)}")
    return tensor.detach().double()
