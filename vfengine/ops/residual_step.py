"""residual_step: one two-phase step of all frames in two reads and one write of the clip.

    u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i)

Kernels: csrc/residual_step.h, csrc/cpu/frames.h, csrc/cuda/frames.cuh, kernels/frames.py.
"""

import torch
from torch import Tensor

from vfengine.ops._frame_ops import FrameOp, guided, row_of, shares
from vfengine.ops.decomposed_noise import decomposed_noise_reference

_NAME = "residual_step"


def residual_step(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    r_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    seed: int | None = None,
    sample_offset: int = 0,
    frame_offset: int = 0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i) for all frames (VideoFusion, Algorithm 2).

    u is the clip less its base noise, u_i = z_i - √λ_i √(1-ᾱ_t) b̂. This is the solver's step from
    t to p with the removal of p's base noise in one; the last step leaves the finished clip.

    u:              [B, N, C, H, W], fp32, fp16 or bf16, contiguous; written unless `out` is given
    r:              like u, the residual network's estimate r̂
    g:              [B, C, H, W], same dtype: d_p - c1 d_t of the base path
    lam:            fp32 [N], λ_i in [0, 1]
    coeffs:         fp32 [T, 3], a row (c1, c2, σ) per step
    step:           int32 [1], the row; read on the device, so that a CUDA graph can replay it
    r_uncond:       like r; r is then r_uncond + guidance_scale (r - r_uncond), guidance in the same
                    pass: for samplers of one's own, vfengine's guides before the step
    seed:           residual seed of ξ where σ > 0, drawn in the kernel: the residual noise of
                    `decomposed_noise` at step + 1, in fp32
    sample_offset, frame_offset: place of the first sample and frame for that noise
    out:            like u; u itself, or memory that no argument shares
    backend:        "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns the tensor that was written. Sums are in fp32 and rounded once; every kernel returns the
    same bits, the CPU's on any number of threads.

    Raises TypeError for a dtype or a seed that is no int; ValueError for a shape, stride, device,
    overlap, number or backend it cannot take, for tensors that autograd records, for λ outside
    [0, 1], a step outside coeffs, and σ > 0 without a seed. On CUDA these last three cannot be seen
    without waiting for the device: there such a step writes NaN.
    """
    return _OP(
        u if out is None else out,
        backend,
        u,
        r,
        g,
        lam,
        coeffs,
        step,
        r_uncond,
        guidance_scale,
        seed,
        sample_offset,
        frame_offset,
    )


def residual_step_reference(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    r_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    seed: int | None = None,
    sample_offset: int = 0,
    frame_offset: int = 0,
) -> Tensor:
    """The formula of `residual_step` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    c1, c2, sigma = row_of(_NAME, coeffs, step).to(dtype)
    shared, own = shares(_NAME, lam, dtype)
    residual = c2 * guided(r, r_uncond, guidance_scale, dtype)
    if sigma != 0:
        if seed is None:
            raise ValueError(f"{_NAME}: sigma > 0 at this step needs the seed of its noise")
        place = {"sample_offset": sample_offset, "frame_offset": frame_offset}
        place |= {"step": int(step) + 1, "device": u.device}
        xi = decomposed_noise_reference(u.shape, residual_seed=seed, **place)
        residual = residual + sigma * xi.to(dtype)
    return c1 * u.to(dtype) + shared * g.to(dtype).unsqueeze(1) + own * residual


_OP = FrameOp(
    _NAME,
    arguments={
        "u": "x",
        "r": "r",
        "g": "g",
        "lam": "lam",
        "coeffs": "coeffs",
        "step": "step",
        "r_uncond": "r_uncond",
        "guidance_scale": "guidance_scale",
        "seed": "residual_seed",
        "sample_offset": "sample_offset",
        "frame_offset": "frame_offset",
    },
    columns=3,
    reference=residual_step_reference,
)
