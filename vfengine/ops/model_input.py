"""model_input: what a UNet sees of noisy clips, as rows of its own dtype, for a generator.

    x_i = input d_i, of residuals followed by 2 f_m      in patches; vfengine/ops/_generator_ops.py

Kernel: kernels/model_input.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    register,
)
from vfengine.ops._generator_ops import check_clip, coefficients, patch_size

_NAME = "model_input"
_KERNELS = ("triton",)


def model_input(
    z: Tensor,
    coeffs: Tensor,
    step: Tensor,
    out: Tensor,
    *,
    conditioned: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Noisy clips scaled to unit variance, in patches (Karras et al. 2022, c_in).

    z:           [B, N, C, H, W] fp32, fp16 or bf16, contiguous
    coeffs:      fp32 [S, N, 5], the columns of vfengine/ops/_generator_ops.py
    step:        int32 [1], the row of coeffs, read on the device
    out:         [B*N, H/p, W/p, K] fp32, fp16 or bf16, contiguous: the input channels of a UNet of
                 patch size p, as F.pixel_unshuffle orders them, then zeros; twice for 2*B*N images
    conditioned: whether each frame is a difference from the base frame m = N // 2, followed by that
                 frame times 2; out then has 2 C input channels, else C
    backend:     "auto", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out, computed in fp32 and rounded once. A step outside coeffs writes NaN, or raises
    ValueError on a CPU.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernel cannot take, and under autograd: the op has no derivative.
    """
    tensors = {"z": z, "coeffs": coeffs, "step": step, "out": out}
    conditioned, backend = check_kinds(_NAME, tensors, conditioned=conditioned, backend=backend)
    _OP(z, coeffs, step, conditioned, backend, out)
    return out


def model_input_reference(
    z: Tensor, coeffs: Tensor, step: Tensor, *, patch_size: int = 1, conditioned: bool = False
) -> Tensor:
    """The formula of `model_input` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns [B*N, H/p, W/p, C p² or 2 C p²], new, in the dtype it was computed in.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    unit, scale, *_ = coefficients(_NAME, coeffs, step, dtype)
    frames = z.to(dtype) * unit
    x = frames * scale
    if conditioned:
        base = frames[:, z.shape[1] // 2, None]
        x = torch.cat([(frames - base) * scale, (2 * base).expand_as(frames)], 2)
    return F.pixel_unshuffle(x.flatten(0, 1), patch_size).permute(0, 2, 3, 1).contiguous()


def _run(z, coeffs, step, conditioned, backend, out):
    _check(z, coeffs, step, conditioned, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"z": z, "coeffs": coeffs, "step": step})
    if choose_backend(_NAME, backend, z.device, _KERNELS) == "triton":
        from vfengine.kernels.model_input import launch

        launch(z, coeffs, step, conditioned, out)
        return
    options = {"patch_size": patch_size(_NAME, "out", out, z), "conditioned": conditioned}
    rows = model_input_reference(z, coeffs, step, **options)
    out.zero_()[..., : rows.shape[-1]] = rows.repeat(out.shape[0] // len(rows), 1, 1, 1)


def _check(z, coeffs, step, conditioned, backend, out):
    check_clip(_NAME, z, coeffs, step)
    check_dtype(_NAME, "out", out)
    patch = patch_size(_NAME, "out", out, z)
    check_tensor(_NAME, "out", out, out.shape, out.dtype, z.device)
    channels = z.shape[2] * patch**2 * (2 if conditioned else 1)
    if out.shape[-1] < channels:
        raise ValueError(f"{_NAME}: out must have {channels} channels or more, got {out.shape[-1]}")
    check_no_grad(_NAME, z, coeffs, out)


_OP = register(
    f"{_NAME}(Tensor z, Tensor coeffs, Tensor step, bool conditioned, str backend, Tensor(a!) out) "
    "-> ()",
    _run,
    _check,
)
