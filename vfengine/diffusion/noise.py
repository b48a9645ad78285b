"""Gaussian noise as new tensors: base noise that all frames share, and each frame's own.

The numbers come from a counter and depend on their seed and place alone, bit for bit the same on
every device: vfengine/ops/decomposed_noise.py defines them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.decomposed_noise import check_place, check_seed, philox4x32_10
from ..ops.decomposed_noise import decomposed_noise as fill

__all__ = ["base_noise", "check_seed", "philox4x32_10", "residual_noise"]

NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def base_noise(
    shape: Sequence[int],
    base_seed: int,
    *,
    step: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """b, the noise all frames share: [B, C, H, W] ~ N(0, I), drawn in fp32 and cast to dtype.

    step:          0 for the initial noise, k+1 for what step k of a stochastic solver adds
    sample_offset: index of the first sample, for batches that are parts of a larger one
    backend:       of the op, see `ops.decomposed_noise`

    Raises TypeError for a seed that is no int or a dtype, ValueError for anything out of range.
    """
    check_seed(base_seed, "base_seed")
    place = {"step": step, "sample_offset": sample_offset}
    out = _empty("base_noise", shape, 4, dtype, device, **place)
    return fill(out, base_seed, **place, backend=backend).to(dtype)


def residual_noise(
    shape: Sequence[int],
    residual_seed: int,
    *,
    step: int = 0,
    sample_offset: int = 0,
    frame_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """r_i, each frame's own noise: [B, N, C, H, W] ~ N(0, I), drawn in fp32 and cast to dtype.

    step, sample_offset, backend: as in `base_noise`
    frame_offset:                 index of the first frame, for chunks of a longer clip

    Raises TypeError for a seed that is no int or a dtype, ValueError for anything out of range.
    """
    check_seed(residual_seed, "residual_seed")
    place = {"step": step, "sample_offset": sample_offset, "frame_offset": frame_offset}
    out = _empty("residual_noise", shape, 5, dtype, device, **place)
    return fill(out, residual_seed=residual_seed, **place, backend=backend).to(dtype)


def _empty(name, shape, ndim, dtype, device, **place: int) -> Tensor:
    """What the noise is drawn into: of dtype, or fp32 on its way to fp64."""
    if len(shape) != ndim or any(int(n) < 1 for n in shape):
        raise ValueError(f"{name}: expected {ndim} positive sizes, got {tuple(shape)}")
    if dtype not in NOISE_DTYPES:
        raise TypeError(f"{name}: dtype must be a floating point one, got {dtype}")
    check_place(name, **place)
    drawn = torch.float32 if dtype == torch.float64 else dtype
    return torch.empty(tuple(shape), dtype=drawn, device=device)
