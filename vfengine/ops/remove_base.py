"""remove_base: the residual network's input, in one read and one write of the clip.

    z'_i <- z_i - √λ_i √(1-ᾱ_t) b

Kernels: csrc/remove_base.h, csrc/cpu/frames.h, csrc/cuda/frames.cuh, kernels/frames.py.
"""

import torch
from torch import Tensor

from vfengine.ops._frame_ops import FrameOp, row_of, shares

_NAME = "remove_base"


def remove_base(
    z: Tensor,
    b: Tensor,
    lam: Tensor,
    noise_levels: Tensor,
    step: Tensor,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """z'_i <- z_i - √λ_i √(1-ᾱ_t) b̂ for all frames (VideoFusion, Algorithm 2).

    z:            [B, N, C, H, W], fp32, fp16 or bf16, contiguous; written unless `out` is given
    b:            [B, C, H, W], same dtype: the base network's estimate b̂, or the noise itself
    lam:          fp32 [N], λ_i in [0, 1]
    noise_levels: fp32 [T], √(1-ᾱ_t) of every step
    step:         int32 [1], the entry; read on the device, so that a CUDA graph can replay it
    out:          like z; z itself, or memory that no argument shares
    backend:      "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns the tensor that was written. Sums are in fp32 and rounded once; every kernel returns the
    same bits, the CPU's on any number of threads. Errors as of `residual_step`.
    """
    return _OP(z if out is None else out, backend, z, b, lam, noise_levels, step)


def remove_base_reference(
    z: Tensor, b: Tensor, lam: Tensor, noise_levels: Tensor, step: Tensor
) -> Tensor:
    """The formula of `remove_base` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    level = row_of(_NAME, noise_levels, step).to(dtype)
    shared, _ = shares(_NAME, lam, dtype)
    return z.to(dtype) - shared * level * b.to(dtype).unsqueeze(1)


_OP = FrameOp(
    _NAME,
    arguments={"z": "x", "b": "g", "lam": "lam", "noise_levels": "coeffs", "step": "step"},
    columns=1,
    reference=remove_base_reference,
)
