"""Counter-based Gaussian noise: Philox4x32-10 and Box-Muller, the same on every device.

One number depends on its seed and on where it sits, and on nothing else:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (e div 4, frame, sample, stream * 2^24 + step)        e = index within [C, H, W]
    words   = philox4x32_10(counter, key)                           4 words, for e = 4k … 4k+3

    u = ((w >> 8) + 1) / 2^24 in (0, 1]      v = (w >> 8) / 2^24 in [0, 1)      exact in fp32
    n_0 = √(-2 ln u(w_0)) cos 2π v(w_1)      n_1 = √(-2 ln u(w_0)) sin 2π v(w_1)
    n_2 = √(-2 ln u(w_2)) cos 2π v(w_3)      n_3 = √(-2 ln u(w_2)) sin 2π v(w_3)

Stream 0 is base noise (frame 0 always: all frames share it), stream 1 residual noise. Step 0 is
the initial noise, step k+1 the noise a stochastic solver adds in its k-th step (k = 0, 1 …).
The words are exact on every device. Here the normals are evaluated in float64 and rounded once to
fp32, so two libraries' logarithms and cosines hardly ever show in the last bit; a kernel that stays
in fp32 agrees to a few units in the last place, because u and v carry no rounding at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BASE_STREAM = 0
RESIDUAL_STREAM = 1
STEP_BITS = 24

_MASK = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
_WEYL = (0x9E3779B9, 0xBB67AE85)
_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_seed(seed: int, name: str = "seed") -> int:
    """seed itself; TypeError when not an int, ValueError outside [0, 2^64)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be in [0, 2^64), got {seed}")
    return seed


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Ten Philox rounds (Salmon et al. 2011; bit-equal to Random123's philox4x32).

    counter: int64 [..., 4], key: int64 [..., 2], broadcastable, every value a word in [0, 2^32)
    returns: int64 [..., 4], words in [0, 2^32)
    """
    if counter.dtype != torch.int64 or key.dtype != torch.int64:
        raise TypeError(f"philox4x32_10: expected int64, got {counter.dtype} and {key.dtype}")
    if counter.shape[-1:] != (4,) or key.shape[-1:] != (2,):
        raise ValueError(
            f"philox4x32_10: expected counter [..., 4] and key [..., 2], "
            f"got {list(counter.shape)} and {list(key.shape)}"
        )
    return torch.stack(torch.broadcast_tensors(*_rounds(counter.unbind(-1), key.unbind(-1))), -1)


def _rounds(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64; masking after the shift makes it a logical one.
        p0, p1 = c0 * _MUL[0], c2 * _MUL[1]
        c0, c2 = (p1 >> 32 & _MASK) ^ c1 ^ k0, (p0 >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(words: Sequence[Tensor]) -> Tensor:
    """Four words per counter -> fp32 normals [..., 4], by the formula at the top of this file."""
    normals = []
    for radius_word, angle_word in (words[0:2], words[2:4]):
        u = ((radius_word >> 8) + 1).double() * 2.0**-24
        v = (angle_word >> 8).double() * 2.0**-24
        radius, angle = (-2.0 * u.log()).sqrt(), (2.0 * math.pi) * v
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, -1).float()


def _normals(frames: Tensor, sample: int, size: int, seed: int, stream: int, step: int) -> Tensor:
    """fp32 [N, size]: the noise of the named frames (int64 [N]) of one sample."""
    group = torch.arange((size + 3) // 4, device=frames.device)
    frame = frames[:, None]
    constant = torch.zeros_like(group)
    counter = (group, frame, constant + sample, constant + (stream << STEP_BITS | step))
    words = _rounds(counter, (seed & _MASK, seed >> 32))
    return _box_muller(torch.broadcast_tensors(*words)).flatten(1)[:, :size]


def _check_place(name: str, shape: Sequence[int], ndim: int, dtype: torch.dtype, **place: int):
    if len(shape) != ndim or any(int(n) < 1 for n in shape):
        raise ValueError(f"{name}: expected {ndim} positive sizes, got {tuple(shape)}")
    if dtype not in _FLOAT_DTYPES:
        raise TypeError(f"{name}: dtype must be a floating point one, got {dtype}")
    for key, value in place.items():
        limit = 1 << (STEP_BITS if key == "step" else 31)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"{name}: {key} must be an int in [0, {limit}), got {value!r}")


def base_noise(
    shape: Sequence[int],
    base_seed: int,
    *,
    step: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """b, the noise all frames share: [B, C, H, W] ~ N(0, I), drawn in fp32 and cast to dtype.

    step:          0 for the initial noise, k+1 for what step k of a stochastic solver adds
    sample_offset: index of the first sample, for batches that are parts of a larger one

    Raises TypeError for a seed that is no int or a dtype, ValueError for anything out of range.
    """
    check_seed(base_seed, "base_seed")
    _check_place("base_noise", shape, 4, dtype, step=step, sample_offset=sample_offset)
    frame = torch.zeros(1, dtype=torch.int64, device=device)
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    for b in range(shape[0]):  # one sample at a time: the words of a sample fit in cache
        noise = _normals(frame, sample_offset + b, out[b].numel(), base_seed, BASE_STREAM, step)
        out[b].copy_(noise.view(out.shape[1:]))
    return out


def residual_noise(
    shape: Sequence[int],
    residual_seed: int,
    *,
    step: int = 0,
    sample_offset: int = 0,
    frame_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """r_i, each frame's own noise: [B, N, C, H, W] ~ N(0, I), drawn in fp32 and cast to dtype.

    step, sample_offset: as in `base_noise`
    frame_offset:        index of the first frame, for chunks of a longer clip

    Raises TypeError for a seed that is no int or a dtype, ValueError for anything out of range.
    """
    check_seed(residual_seed, "residual_seed")
    _check_place(
        "residual_noise",
        shape,
        5,
        dtype,
        step=step,
        sample_offset=sample_offset,
        frame_offset=frame_offset,
    )
    frames = torch.arange(frame_offset, frame_offset + shape[1], device=device)
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    size = out[0, 0].numel()
    for b in range(shape[0]):
        noise = _normals(frames, sample_offset + b, size, residual_seed, RESIDUAL_STREAM, step)
        out[b].copy_(noise.view(out.shape[1:]))
    return out
