"""residual_step: one two-phase step of all frames in two reads and one write of the clip.

    u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i)

Kernels: csrc/residual_step.h, csrc/cpu/frames.h, csrc/cuda/frames.cuh, kernels/frames.py.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import register, unobserved
from vfengine.ops._frame_ops import FramesOp, guided, row_of, shares
from vfengine.ops.decomposed_noise import (
    check_place,
    check_seed,
    decomposed_noise_reference,
    signed_seed,
    unsigned_seed,
)

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
    xi: Tensor | None = None,
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
    r_uncond:       like r; r is then r_uncond + guidance_scale (r - r_uncond)
    seed:           residual seed of ξ where σ > 0, drawn in the kernel: the residual noise of
                    `decomposed_noise` at step + 1, in fp32
    sample_offset, frame_offset: place of the first sample and frame for that noise
    xi:             like u, ξ itself in place of a seed
    out:            like u; u itself, or memory that no argument shares
    backend:        "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns the tensor that was written. Sums are in fp32 and rounded once; every kernel returns the
    same bits, the CPU's on any number of threads.

    Raises TypeError for a dtype or a seed that is no int; ValueError for a shape, stride, device,
    overlap, number or backend it cannot take, for tensors that autograd records, for λ outside
    [0, 1], a step outside coeffs, and σ > 0 with neither seed nor xi. On CUDA these last three
    cannot be seen without waiting for the device: there such a step writes NaN.
    """
    out = u if out is None else out
    if xi is not None and (seed is not None or sample_offset or frame_offset):
        raise ValueError(f"{_NAME}: expected a seed and its offsets, or xi; got both")
    seeds = None if seed is None else (0, check_seed(seed))
    if unobserved(u) and _STEP.plain(
        backend, u, g, r, r_uncond, xi, lam, coeffs, step, out,
        guidance_scale, seeds, sample_offset, frame_offset, torch.get_num_threads(),
    ):  # fmt: skip
        increment_version(out)  # as torch's own ops do, so that autograd sees the write
        return out
    optional = {"r_uncond": r_uncond, "xi": xi, "guidance_scale": guidance_scale}
    _STEP.check_kinds(u, g, lam, coeffs, step, out, r, **optional)
    check_place(_NAME, sample_offset=sample_offset, frame_offset=frame_offset)
    rest = (r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, signed_seed(seed))
    rest += (sample_offset, frame_offset, backend)
    if out is u:
        _OP_IN_PLACE(u, *rest)
    else:
        _OP(u, *rest, out)
    return out


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
    xi: Tensor | None = None,
) -> Tensor:
    """The formula of `residual_step` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    c1, c2, sigma = row_of(_NAME, coeffs, step).to(dtype)
    shared, own = shares(_NAME, lam, dtype)
    residual = c2 * guided(r, r_uncond, guidance_scale, dtype)
    if sigma != 0:
        if seed is not None:
            place = {"sample_offset": sample_offset, "frame_offset": frame_offset}
            place |= {"step": int(step) + 1, "device": u.device}
            xi = decomposed_noise_reference(u.shape, residual_seed=seed, **place)
        if xi is None:
            raise ValueError(f"{_NAME}: sigma > 0 at this step needs the seed of its noise, or xi")
        residual = residual + sigma * xi.to(dtype)
    return c1 * u.to(dtype) + shared * g.to(dtype).unsqueeze(1) + own * residual


def _reference(u, g, lam, coeffs, step, *, r, seeds, **options):
    seed = None if seeds is None else seeds[1]
    return residual_step_reference(u, r, g, lam, coeffs, step, seed=seed, **options)


def _run(
    u, r, g, lam, coeffs, step, r_uncond, xi, guidance_scale, seed, sample_offset, frame_offset,
    backend, out=None,
):  # fmt: skip
    _STEP.run(
        *(u, g, lam, coeffs, step, u if out is None else out, backend, r, r_uncond, xi),
        guidance_scale,
        None if seed is None else (0, unsigned_seed(seed)),
        *(sample_offset, frame_offset),
    )


def _check(u, r, g, lam, coeffs, step, r_uncond, xi, *rest):
    out = rest[-1] if isinstance(rest[-1], Tensor) else u
    _STEP.check(u, g, lam, coeffs, step, out, r, r_uncond, xi)


_STEP = FramesOp(_NAME, ("u", "g", "coeffs"), 3, True, _reference)
_ARGUMENTS = (
    "Tensor r, Tensor g, Tensor lam, Tensor coeffs, Tensor step, Tensor? r_uncond, Tensor? xi, "
    "float guidance_scale, int? seed, int sample_offset, int frame_offset, str backend"
)
_OP = register(f"{_NAME}(Tensor u, {_ARGUMENTS}, Tensor(a!) out) -> ()", _run, _check)
_OP_IN_PLACE = register(f"{_NAME}_(Tensor(a!) u, {_ARGUMENTS}) -> ()", _run, _check)
