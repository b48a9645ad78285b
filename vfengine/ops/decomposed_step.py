"""decomposed_step: one interleaved step of all frames, in two reads and one write of the clip.

    z_i <- c1 z_i + c2 (√λ_i b + √(1-λ_i) r_i) + σ (√λ_i ξ_b + √(1-λ_i) ξ_i)

Kernels: csrc/decomposed_step.h, csrc/cpu/frames.h, csrc/cuda/frames.cuh, kernels/frames.py.
"""

import torch
from torch import Tensor

from vfengine.ops._frame_ops import FrameOp, row_of, shares
from vfengine.ops.decomposed_noise import decomposed_noise_reference

_NAME = "decomposed_step"


def decomposed_step(
    z: Tensor,
    b: Tensor,
    r: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    base_seed: int | None = None,
    residual_seed: int | None = None,
    sample_offset: int = 0,
    frame_offset: int = 0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """z_i <- c1 z_i + c2 ε̂_i + σ ξ_i for all frames (VideoFusion, Algorithm 2; with σ Algorithm 1).

    ε̂_i = √λ_i b̂ + √(1-λ_i) r̂_i combines the networks' estimates, ξ_i = √λ_i ξ_b + √(1-λ_i) ξʳ_i
    is decomposed like it. The base frame, λ_m = 1, goes along: ε̂_m = b̂.

    z:              [B, N, C, H, W], fp32, fp16 or bf16, contiguous; written unless `out` is given
    b:              [B, C, H, W], same dtype: the base network's estimate b̂
    r:              like z, the residual network's estimate r̂
    lam:            fp32 [N], λ_i in [0, 1]
    coeffs:         fp32 [T, 3], a row (c1, c2, σ) per step
    step:           int32 [1], the row; read on the device, so that a CUDA graph can replay it
    base_seed, residual_seed: of ξ where σ > 0, drawn in the kernel: the noise of
                    `decomposed_noise` at step + 1, in fp32; both or none
    sample_offset, frame_offset: place of the first sample and frame for that noise
    out:            like z; z itself, or memory that no argument shares
    backend:        "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns the tensor that was written. Sums are in fp32 and rounded once; every kernel returns the
    same bits, the CPU's on any number of threads. Errors as of `residual_step`.
    """
    if (base_seed is None) != (residual_seed is None):
        raise ValueError(f"{_NAME}: expected both base_seed and residual_seed, or none")
    noise = (base_seed, residual_seed, sample_offset, frame_offset)
    return _OP(z if out is None else out, backend, z, b, r, lam, coeffs, step, *noise)


def decomposed_step_reference(
    z: Tensor,
    b: Tensor,
    r: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    base_seed: int | None = None,
    residual_seed: int | None = None,
    sample_offset: int = 0,
    frame_offset: int = 0,
) -> Tensor:
    """The formula of `decomposed_step` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    c1, c2, sigma = row_of(_NAME, coeffs, step).to(dtype)
    shared, own = shares(_NAME, lam, dtype)
    z = c1 * z.to(dtype) + c2 * (shared * b.to(dtype).unsqueeze(1) + own * r.to(dtype))
    if sigma == 0:
        return z
    if base_seed is None:
        raise ValueError(f"{_NAME}: sigma > 0 at this step needs the seeds of its noise")
    place = {"step": int(step) + 1, "sample_offset": sample_offset, "device": z.device}
    xi_b = decomposed_noise_reference(z[:, 0].shape, base_seed, **place).to(dtype)
    place["frame_offset"] = frame_offset
    xi = decomposed_noise_reference(z.shape, residual_seed=residual_seed, **place).to(dtype)
    return z + sigma * (shared * xi_b.unsqueeze(1) + own * xi)


_OP = FrameOp(
    _NAME,
    arguments={
        "z": "x",
        "b": "g",
        "r": "r",
        "lam": "lam",
        "coeffs": "coeffs",
        "step": "step",
        "base_seed": "base_seed",
        "residual_seed": "residual_seed",
        "sample_offset": "sample_offset",
        "frame_offset": "frame_offset",
    },
    columns=3,
    reference=decomposed_step_reference,
)
