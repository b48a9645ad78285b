"""group_norm_silu_backward: the gradients of `group_norm_silu`, from its arguments and that of y.

    y = SiLU(z), z = x̂ w + b, x̂ = (x - μ) / √(σ² + ε), w = weight (1 + scale), b likewise + shift
    ∂x = (∂z w - mean(∂z w) - x̂ mean(∂z w x̂)) / √(σ² + ε), means over a group

Kernel: csrc/group_norm_silu_backward.h, csrc/cpu/group_norm_silu_backward.cpp. For CPUs alone: on a
GPU PyTorch's own ops are used in training.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    address,
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_table,
    choose_backend,
    native,
    register,
    run_native,
)
from vfengine.ops.group_norm_silu import check_modulation, check_picture, group_norm_silu

_NAME = "group_norm_silu_backward"
_KERNELS = ("cpu",)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(∂x, sums): ∂x as x, and fp32 [B, 2, C], the sums of ∂z and of ∂z x̂ over an image's pixels.

    grad:    ∂y, as x
    backend: "auto", "cpu" or "reference" (vfengine/ops/_dispatch.py)

    Everything else as in `group_norm_silu`, each image with statistics of its own.

    Of the sums all other gradients are made, with m = 1 + scale: ∂weight = Σ_B m sums₁,
    ∂bias = Σ_B m sums₀, ∂scale = weight sums₁ + bias sums₀, ∂shift = sums₀.

    Raises TypeError for a dtype, ValueError for a shape, layout or device that the kernel cannot
    take, and under autograd: there is no second derivative.
    """
    check_kinds(_NAME, {"grad": grad, "x": x}, num_groups=num_groups, eps=eps)
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    check_kinds(_NAME, {name: t for name, t in given.items() if t is not None})
    grad_x = torch.empty_like(x)
    sums = x.new_empty((*x.shape[:1], 2, *x.shape[1:2]), dtype=torch.float32)
    _OP(grad, x, *given.values(), num_groups, eps, silu, backend, grad_x, sums)
    return grad_x, sums


def group_norm_silu_backward_reference(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The formula of `group_norm_silu_backward` in plain PyTorch, in fp32, or in fp64 for fp64.

    Returns new tensors in the dtype they were computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)

    def of_images(table: Tensor) -> Tensor:
        return table.to(dtype).repeat_interleave(len(x) // len(table), 0)[..., None, None]

    def group_mean(y: Tensor) -> Tensor:
        mean = y.unflatten(1, (num_groups, -1)).mean((2, 3, 4))
        return mean.repeat_interleave(y.shape[1] // num_groups, 1)[..., None, None]

    m = 1 if scale is None else 1 + of_images(scale)
    w = m * (1 if weight is None else weight.to(dtype).view(-1, 1, 1))
    b = m * (0 if bias is None else bias.to(dtype).view(-1, 1, 1))
    b = b if shift is None else b + of_images(shift)

    centred = x.to(dtype) - group_mean(x.to(dtype))
    deviation = (group_mean(centred.square()) + eps).sqrt()
    normed = centred / deviation
    z = normed * w + b
    s = z.sigmoid()
    grad_z = grad.to(dtype) * (s * (1 + z * (1 - s)) if silu else 1)
    grad_n = grad_z * w
    grad_x = (grad_n - group_mean(grad_n) - normed * group_mean(grad_n * normed)) / deviation
    sums = torch.stack([grad_z.sum((2, 3)), (grad_z * normed).sum((2, 3))], 1)
    return grad_x, sums


class GroupNormSilu(torch.autograd.Function):
    """`group_norm_silu` with its derivative, for CPU tensors.

    apply(x, weight, bias, scale, shift, num_groups, eps, silu), the four tables as there, scale and
    shift [B, C] or None. What is kept for the way back is x alone.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, num_groups, eps, silu):
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.numbers = {"eps": eps, "silu": silu}
        ctx.num_groups = num_groups
        return group_norm_silu(x, num_groups, weight, bias, scale=scale, shift=shift, **ctx.numbers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, scale, shift = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, sums = group_norm_silu_backward(
            grad, x, ctx.num_groups, weight, bias, scale=scale, shift=shift, **ctx.numbers
        )
        of_offset, of_factor = sums.unbind(1)
        if scale is None:
            grads = of_factor.sum(0), of_offset.sum(0), None, None
        else:
            factor = 1 + scale
            grads = (
                (factor * of_factor).sum(0),
                (factor * of_offset).sum(0),
                weight * of_factor + bias * of_offset,
                of_offset,
            )
        return grad_x, *grads, None, None, None


def _run(grad, x, weight, bias, scale, shift, num_groups, eps, silu, backend, grad_x, sums):
    tables = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    _check(grad, x, *tables.values(), num_groups, eps, silu, backend, grad_x, sums)
    for out in (grad_x, sums):
        increment_version(out)  # as torch's own ops do, so that autograd sees the write
        check_overlap(_NAME, out, {"grad": grad, "x": x, **tables})
    if choose_backend(_NAME, backend, x.device, _KERNELS) == "reference":
        for out, value in zip(
            (grad_x, sums),
            group_norm_silu_backward_reference(grad, x, num_groups, **tables, eps=eps, silu=silu),
            strict=True,
        ):
            out.copy_(value)
        return
    images, channels, height, width = x.shape
    forward = native().args["group_norm_silu"](
        x=x.data_ptr(),
        **{name: address(table) for name, table in tables.items()},
        modulation_stride=0 if scale is None else scale.stride(0),
        modulation_images=1 if scale is None else images // len(scale),
        images=images,
        rows=height * width,
        channels=channels,
        groups=num_groups,
        num_frames=1,
        eps=eps,
        silu=silu,
        dtype=DTYPE_NUMBERS[x.dtype],
    )
    out = {"dy": grad.data_ptr(), "dx": grad_x.data_ptr(), "sums": sums.data_ptr()}
    run_native(_NAME, "cpu", x, forward=forward, **out)


def _check(grad, x, weight, bias, scale, shift, num_groups, eps, silu, backend, grad_x, sums):
    check_dtype(_NAME, "x", x)
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{_NAME}: x must be [B, C, H, W] and not empty, got {list(x.shape)}")
    images, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{_NAME}: num_groups must divide {channels} channels, got {num_groups}")
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps must not be negative, got {eps}")
    for name, tensor in {"x": x, "grad": grad, "grad_x": grad_x}.items():
        check_picture(_NAME, name, tensor, channels, x)
    check_table(_NAME, "weight", weight, (channels,), x)
    check_table(_NAME, "bias", bias, (channels,), x)
    check_table(_NAME, "sums", sums, (images, 2, channels), x)
    if (scale is None) != (shift is None):
        raise ValueError(f"{_NAME}: expected scale and shift, or neither")
    if scale is not None:
        check_modulation(_NAME, scale, shift, x)
    check_no_grad(_NAME, grad, x, weight, bias, scale, shift, grad_x, sums)


_OP = register(
    f"{_NAME}(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "int num_groups, float eps, bool silu, str backend, Tensor(a!) grad_x, Tensor(b!) sums) -> ()",
    _run,
    _check,
)
