"""Gaussian noise as new tensors: base noise that all frames share, each frame's own, or both.

The numbers come from a counter and depend on their seed and place alone, bit for bit the same on
every device: vfengine/ops/decomposed_noise.py defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import as_int
from ..ops.decomposed_noise import check_place, check_seed, philox4x32_10
from ..ops.decomposed_noise import decomposed_noise as fill
from .decompose import Lam, combine

__all__ = [
    "DecomposedNoise",
    "NoisePlace",
    "base_noise",
    "check_seed",
    "decomposed_noise",
    "philox4x32_10",
    "residual_noise",
]

NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class NoisePlace:
    """Where the noise of clips is drawn from: the arguments of `ops.decomposed_noise`.

    seed:                        of the base stream, or of the residual stream
    sample_offset, frame_offset: index of the first sample and of the first frame, where the clips
                                 are part of a larger batch or of a longer clip
    """

    seed: int
    sample_offset: int = 0
    frame_offset: int = 0

    def __post_init__(self) -> None:
        """Keeps Python's ints; raises as `check_seed` and `check_place`."""
        object.__setattr__(self, "seed", check_seed(self.seed))
        offsets = {"sample_offset": self.sample_offset, "frame_offset": self.frame_offset}
        for name, number in check_place("noise", **offsets).items():
            object.__setattr__(self, name, number)


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
    offsets = {"step": step, "sample_offset": sample_offset}
    out = _empty("base_noise", shape, 4, dtype, device, **offsets)
    return fill(out, base_seed, **offsets, backend=backend).to(dtype)


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
    offsets = {"step": step, "sample_offset": sample_offset, "frame_offset": frame_offset}
    out = _empty("residual_noise", shape, 5, dtype, device, **offsets)
    return fill(out, residual_seed=residual_seed, **offsets, backend=backend).to(dtype)


class DecomposedNoise(NamedTuple):
    """Noise in its two parts: base [B, C, H, W], shared by the frames, residual [B, N, C, H, W]."""

    base: Tensor
    residual: Tensor

    def combine(self, lam: Lam) -> Tensor:
        """Eq. (1): the frames' noise ε_i, [B, N, C, H, W]."""
        return combine(self.base, self.residual, lam)


def decomposed_noise(
    shape: Sequence[int],
    base_seed: int,
    residual_seed: int,
    *,
    step: int = 0,
    sample_offset: int = 0,
    frame_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> DecomposedNoise:
    """b and r_i for a clip of shape [B, N, C, H, W], each N(0, I).

    A frame's noise depends on seed, stream, step, sample, frame and element only: never on B, N,
    chunking, thread count or device. Parts of a larger batch or of a longer clip are drawn with
    sample_offset and frame_offset.

    Raises TypeError for a seed that is no int, ValueError for a shape or place out of range.
    """
    if len(shape) != 5:
        raise ValueError(f"decomposed_noise: expected [B, N, C, H, W], got {tuple(shape)}")
    both = {"step": step, "sample_offset": sample_offset, "dtype": dtype, "device": device}
    return DecomposedNoise(
        base_noise((shape[0], *shape[2:]), base_seed, **both),
        residual_noise(shape, residual_seed, frame_offset=frame_offset, **both),
    )


def _empty(
    name: str,
    shape: Sequence[int],
    ndim: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    **offsets: int,
) -> Tensor:
    """An empty tensor to draw into: of dtype, but fp32 where dtype is float64."""
    sizes = [as_int(size) for size in shape]
    if len(sizes) != ndim or any(size is None or size < 1 for size in sizes):
        raise ValueError(f"{name}: expected {ndim} positive sizes, got {tuple(shape)}")
    if dtype not in NOISE_DTYPES:
        raise TypeError(f"{name}: dtype must be a floating point one, got {dtype}")
    check_place(name, **offsets)
    drawn = torch.float32 if dtype == torch.float64 else dtype
    return torch.empty(sizes, dtype=drawn, device=device)
