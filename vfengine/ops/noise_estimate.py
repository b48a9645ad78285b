"""noise_estimate: what a generator makes of its UNet's output, the noise ε of clips.

    ε_i = gain (d_i - signal x̂_i), x̂_i a blend     of patches; vfengine/ops/_generator_ops.py

Kernel: kernels/noise_estimate.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    register,
)
from vfengine.ops._generator_ops import WEIGHTS, check_clip, coefficients, patch_size

_NAME = "noise_estimate"
_KERNELS = ("triton",)


def noise_estimate(
    z: Tensor,
    rows: Tensor,
    coeffs: Tensor,
    step: Tensor,
    *,
    guidance_scale: float = 1.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The noise ε of clips, guided, from what a UNet predicts (Ho & Salimans 2022, eq. 6).

    z:      [B, N, C, H, W] fp32, fp16 or bf16, contiguous: what `model_input` was given
    rows:   fp32 [B*N, H/p, W/p, K p²], contiguous: the UNet's K output channels in patches of size
            p, as F.pixel_shuffle takes them. K is C where the UNet predicts ε or v, C + 1 for a
            blend of paint and frame, C + 3 for one of base frame, frame and paint
    coeffs: fp32 [S, N, 5], the columns of vfengine/ops/_generator_ops.py
    step:   int32 [1], the row of coeffs, read on the device
    guidance_scale: s of ε_u + s (ε_c - ε_u), where rows have 2*B*N images: ε_c's, then ε_u's
    out:    like z, memory that no argument shares; None: allocated
    backend: "auto", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out, computed in fp32 and rounded once. A step outside coeffs writes NaN, or raises
    ValueError on a CPU.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernel cannot take, and under autograd: the op has no derivative.
    """
    given = {"z": z, "rows": rows, "coeffs": coeffs, "step": step}
    given |= {} if out is None else {"out": out}
    plain = check_kinds(_NAME, given, guidance_scale=guidance_scale, backend=backend)
    guidance_scale, backend = plain
    out = torch.empty_like(z) if out is None else out
    _OP(z, rows, coeffs, step, guidance_scale, backend, out)
    return out


def noise_estimate_reference(
    z: Tensor, rows: Tensor, coeffs: Tensor, step: Tensor, *, guidance_scale: float = 1.0
) -> Tensor:
    """The formula of `noise_estimate` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    unit, _, shrink, signal, gain = coefficients(_NAME, coeffs, step, dtype)
    images = F.pixel_shuffle(rows.to(dtype).permute(0, 3, 1, 2), z.shape[-1] // rows.shape[2])
    m, channels = z.shape[1] // 2, z.shape[2]
    paint, weights = images.unflatten(0, (-1, *z.shape[:2])).tensor_split([channels], 3)
    difference = frames = z.to(dtype) * unit
    if weights.shape[3] == 0:
        eps = gain * difference + signal * paint
    elif weights.shape[3] == 1:
        clean = torch.lerp(paint, shrink * difference, weights.sigmoid())
        eps = gain * (difference - signal * clean)
    else:
        base = frames[:, m, None]
        difference = frames - base
        _, seen, painted = weights.softmax(3).split(1, dim=3)  # the first: base frame, no change
        change = seen * (shrink * difference) + painted * (paint - base)
        eps = gain * (difference - signal * change)
        eps[:, :, m] = 0.0
    if len(eps) == 1:
        return eps[0]
    conditional, unconditional = eps
    return torch.lerp(unconditional, conditional, guidance_scale)


def _run(z, rows, coeffs, step, guidance_scale, backend, out):
    _check(z, rows, coeffs, step, guidance_scale, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"z": z, "rows": rows, "coeffs": coeffs, "step": step})
    if choose_backend(_NAME, backend, z.device, _KERNELS) == "triton":
        from vfengine.kernels.noise_estimate import launch

        launch(z, rows, coeffs, step, guidance_scale, out)
    else:
        options = {"guidance_scale": guidance_scale}
        out.copy_(noise_estimate_reference(z, rows, coeffs, step, **options))


def _check(z, rows, coeffs, step, guidance_scale, backend, out):
    check_clip(_NAME, z, coeffs, step)
    folded = patch_size(_NAME, "rows", rows, z) ** 2
    check_tensor(_NAME, "rows", rows, rows.shape, torch.float32, z.device)
    expected = [(z.shape[2] + weights) * folded for weights in WEIGHTS]
    if rows.shape[-1] not in expected:
        raise ValueError(
            f"{_NAME}: rows must have one of {expected} channels, got {rows.shape[-1]}"
        )
    check_tensor(_NAME, "out", out, z.shape, z.dtype, z.device)
    check_no_grad(_NAME, z, rows, coeffs, out)


_OP = register(
    f"{_NAME}(Tensor z, Tensor rows, Tensor coeffs, Tensor step, float guidance_scale, "
    "str backend, Tensor(a!) out) -> ()",
    _run,
    _check,
)
