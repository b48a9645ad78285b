"""group_norm_silu_backward: the gradients of group_norm_silu, with x and grad read once for sums.

    du = grad SiLU'(u)      u = (x̂ weight + bias) (1 + scale) + shift, x̂ = (x - μ) / √(σ² + ε)
    ∂x = (w du - ⟨w du⟩ - x̂ ⟨w du x̂⟩) / √(σ² + ε)      w = weight (1 + scale)

⟨·⟩: means over a group, as μ and σ² are. Σ du and Σ du x̂ of each image and channel are what the
gradients of weight, bias, scale and shift are made of.
Kernels: csrc/group_norm_silu_backward.h, csrc/cpu/group_norm_silu_backward.cpp,
kernels/group_norm_silu_backward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    address,
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_table,
    check_tensor,
    choose_backend,
    register,
    run_native,
)
from vfengine.ops.group_norm_silu import group_norm_silu

_NAME = "group_norm_silu_backward"
_KERNELS = ("triton", "cpu")


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    num_frames: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the sums that those of the tables are made of.

    grad, x:      [B, C, H, W] in channels_last memory, fp32, fp16 or bf16 alike
    num_groups:   divides C
    weight, bias: fp32 [C], or None for 1 and 0
    num_frames:   images that share their statistics, one after another; divides B
    scale, shift: contiguous fp32 [B, C], both or neither
    silu:         False: the op had no SiLU
    out:          as x, memory that no argument shares; None: allocated
    backend:      "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns (out, sums): sums fp32 [2, B, C], over an image's pixels, of du and of du x̂. With
    (a, b) = sums, ∂shift = a, ∂scale = b weight + a bias, ∂weight = Σ_B (1 + scale) b and
    ∂bias = Σ_B (1 + scale) a. Sums are in fp32, in an order that depends on the shape alone.

    Raises TypeError for a dtype, ValueError for a shape, layout, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    others = {"num_groups": num_groups, "eps": eps, "num_frames": num_frames, "silu": silu}
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "out": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    plain = check_kinds(_NAME, {"grad": grad, "x": x, **given}, **others, backend=backend)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else None)
    sums = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    *numbers, backend = plain
    _OP(grad, x, weight, bias, scale, shift, *numbers, backend, out, sums)
    return out, sums


def group_norm_silu_backward_reference(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    num_frames: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The formulas of `group_norm_silu_backward` in plain PyTorch, in fp32, or fp64 for fp64.

    Returns new tensors in the dtype they were computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, channels = x.shape[:2]
    one = torch.ones((1, channels, 1, 1), dtype=dtype, device=x.device)
    weight, bias = (
        None if table is None else table.to(dtype).view(1, -1, 1, 1) for table in (weight, bias)
    )
    scale, shift = (
        None if table is None else table.to(dtype)[..., None, None] for table in (scale, shift)
    )

    def grouped(values: Tensor) -> Tensor:
        return values.reshape(batch // num_frames, num_frames, num_groups, -1)

    def mean(values: Tensor) -> Tensor:
        return grouped(values).mean((1, 3), keepdim=True)

    centred = grouped(x.to(dtype)) - mean(x.to(dtype))
    inverse = (centred.square().mean((1, 3), keepdim=True) + eps).rsqrt()
    normed = (centred * inverse).reshape(x.shape)
    gain = one if weight is None else weight
    u = normed * gain if bias is None else normed * gain + bias
    if scale is not None:
        gain, u = gain * (1 + scale), u * (1 + scale) + shift
    du = grad.to(dtype)
    if silu:
        s = u.sigmoid()
        du = du * s * (1 + u * (1 - s))
    pulled = gain * du
    out = grouped(pulled) - mean(pulled) - grouped(normed) * mean(pulled * normed)
    sums = torch.stack([du.sum((2, 3)), (du * normed).sum((2, 3))])
    return (out * inverse).reshape(x.shape), sums


def differentiable_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`group_norm_silu` that autograd records; gradients come from `group_norm_silu_backward`.

    x [B, C, H, W] fp32, fp16 or bf16; weight, bias fp32 [C]; scale, shift [B, C] in any floating
    dtype, both or neither. Returns a tensor in x's dtype, in channels_last memory.
    """
    return _GroupNormSilu.apply(x, num_groups, weight, bias, eps, scale, shift, silu)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, scale, shift, silu):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.dtypes = None if scale is None else (scale.dtype, shift.dtype)
        if scale is not None:
            scale, shift = scale.float().contiguous(), shift.float().contiguous()
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.numbers = num_groups, eps, silu
        return group_norm_silu(
            x, num_groups, weight, bias, eps=eps, scale=scale, shift=shift, silu=silu
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, scale, shift = ctx.saved_tensors
        num_groups, eps, silu = ctx.numbers
        grad = grad.contiguous(memory_format=torch.channels_last)
        tables = {"scale": scale, "shift": shift}
        of_x, (plain, normed) = group_norm_silu_backward(
            grad, x, num_groups, weight, bias, eps=eps, silu=silu, **tables
        )
        of_scale = of_shift = None
        gained = plain, normed
        if scale is not None:
            of_scale = (normed * weight + plain * bias).to(ctx.dtypes[0])
            of_shift = plain.to(ctx.dtypes[1])
            gained = (1 + scale) * plain, (1 + scale) * normed
        of_bias, of_weight = (values.sum(0) for values in gained)
        return of_x, None, of_weight, of_bias, None, of_scale, of_shift, None


def _run(
    grad,
    x,
    weight,
    bias,
    scale,
    shift,
    num_groups,
    eps,
    num_frames,
    silu,
    backend,
    out,
    sums,
):
    tables, numbers = (weight, bias, scale, shift), (num_groups, eps, num_frames, silu)
    _check(grad, x, *tables, *numbers, backend, out, sums)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    named = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    check_overlap(_NAME, out, {"grad": grad, "x": x, **named})
    backend = choose_backend(_NAME, backend, x.device, _KERNELS)
    if backend == "reference":
        options = {"eps": eps, "num_frames": num_frames, "silu": silu}
        result = group_norm_silu_backward_reference(grad, x, num_groups, **named, **options)
        out.copy_(result[0])
        sums.copy_(result[1])
    elif backend == "triton":
        from vfengine.kernels.group_norm_silu_backward import launch

        launch(grad, x, *tables, *numbers, out, sums)
    else:
        images, channels, height, width = x.shape
        run_native(
            _NAME,
            backend,
            x,
            grad=grad.data_ptr(),
            x=x.data_ptr(),
            **{name: address(table) for name, table in named.items()},
            out=out.data_ptr(),
            sums=sums.data_ptr(),
            images=images,
            rows=height * width,
            channels=channels,
            groups=num_groups,
            num_frames=num_frames,
            eps=eps,
            silu=silu,
            dtype=DTYPE_NUMBERS[x.dtype],
        )


def _check(
    grad,
    x,
    weight,
    bias,
    scale,
    shift,
    num_groups,
    eps,
    num_frames,
    silu,
    backend,
    out,
    sums,
):
    check_dtype(_NAME, "x", x)
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{_NAME}: x must be [B, C, H, W] and not empty, got {list(x.shape)}")
    images, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{_NAME}: num_groups must divide {channels} channels, got {num_groups}")
    if num_frames < 1 or images % num_frames:
        raise ValueError(f"{_NAME}: num_frames must divide {images} images, got {num_frames}")
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps must not be negative, got {eps}")
    for name, tensor in (("grad", grad), ("x", x), ("out", out)):
        if tensor.dtype is not x.dtype:
            raise TypeError(f"{_NAME}: {name} must be {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device or tensor.shape != x.shape:
            raise ValueError(
                f"{_NAME}: {name} must be {list(x.shape)} on {x.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{_NAME}: {name} must be in channels_last memory, got strides {tensor.stride()}"
            )
    check_table(_NAME, "weight", weight, (channels,), x)
    check_table(_NAME, "bias", bias, (channels,), x)
    if (scale is None) != (shift is None):
        raise ValueError(f"{_NAME}: expected scale and shift, or neither")
    check_table(_NAME, "scale", scale, (images, channels), x)
    check_table(_NAME, "shift", shift, (images, channels), x)
    check_tensor(_NAME, "sums", sums, (2, images, channels), torch.float32, x.device)
    check_no_grad(_NAME, grad, x, weight, bias, scale, shift, out)


_OP = register(
    f"{_NAME}(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "int num_groups, float eps, int num_frames, bool silu, str backend, Tensor(a!) out, "
    "Tensor(b!) sums) -> ()",
    _run,
    _check,
)
