"""conv3x3: a 3x3 convolution with padding 1 and stride 1 in Winograd's form, and its gradients.

    out[o, y, x] = Σ_{c, i, j} weight[o, c, i, j] x[c, y + i - 1, x + j - 1] + bias[o]

F(2, 3) takes 16 products for 4 results, in place of 36 (Lavin and Gray 2016, arXiv 1509.09308): for
the results, and, transposed, for the gradients of pixels and of weights. In bf16 what is multiplied
is rounded once more than in a direct convolution.
Kernels: csrc/winograd.h, csrc/winograd_weights.h, csrc/conv3x3_weight_gradient.h, csrc/cpu/gemm/.
There are none for GPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    address,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_table,
    check_tensor,
    choose_backend,
    native,
    register,
    run_native,
)

_NAME, _GRADIENT = "conv3x3", "conv3x3_weight_gradient"
_KERNELS = ("cpu",)
_LEAST_CHANNELS = 32  # with fewer the transforms cost more than the products that they save


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The convolution of x with weight, plus bias, plus residual.

    x:       [B, C, H, W] in channels_last memory, fp32 or bf16; C is even in bf16
    weight:  [C', C, 3, 3] in any floating dtype; without copies in fp32 in channels_last memory
    bias:    fp32 [C'], or None for 0
    residual: [B, C', H, W], as x, or None for 0
    transposed: x are gradients of the results of a convolution, whose pixels' are the result: x has
             C' channels, which are even in bf16, the result and bias C
    out:     [B, C', H, W], as x, memory that no argument shares; None: allocated
    backend: "auto", "cpu" or "reference" (vfengine/ops/_dispatch.py)

    Returns out. Sums are in fp32, and their order depends on the shape alone.

    Raises TypeError for a dtype; ValueError for a shape, layout, device or shared memory that the
    kernel cannot take, for bf16 beside a matrix unit, and under autograd: `differentiable_conv3x3`
    has a derivative.
    """
    given = {"bias": bias, "residual": residual, "out": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    tensors = {"x": x, "weight": weight, **given}
    transposed, backend = check_kinds(_NAME, tensors, transposed=transposed, backend=backend)
    if out is None:
        _check_picture(_NAME, "x", x)
        _check_weight(weight)
        channels = weight.shape[1 if transposed else 0]
        out = torch.empty(
            (x.shape[0], channels, *x.shape[2:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
    _OP(x, weight, bias, residual, transposed, backend, out)
    return out


def conv3x3_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """The formula of `conv3x3` in plain PyTorch, in fp32, or in fp64 for fp64 pictures.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    out = convolve(x.to(dtype), weight.to(dtype), bias, padding=1)
    return out if residual is None else out + residual.to(dtype)


def conv3x3_weight_gradient(grad: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """The gradient of the weights of `conv3x3`, fp32 [C', C, 3, 3] in channels_last memory.

    grad:    [B, C', H, W], that of the results
    x:       [B, C, H, W]; both in channels_last memory, fp32 or bf16 alike
    backend: "auto", "cpu" or "reference"

    Raises what `conv3x3` raises.
    """
    (backend,) = check_kinds(_GRADIENT, {"grad": grad, "x": x}, backend=backend)
    for name, picture in (("grad", grad), ("x", x)):
        _check_picture(_GRADIENT, name, picture)
    out = torch.empty(
        (grad.shape[1], x.shape[1], 3, 3),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last,
    )
    _GRADIENT_OP(grad, x, backend, out)
    return out


def conv3x3_weight_gradient_reference(grad: Tensor, x: Tensor) -> Tensor:
    """The formula of `conv3x3_weight_gradient` in plain PyTorch, in fp32, or in fp64 for fp64.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[2:]
    padded, grad = F.pad(x.to(dtype), (1, 1, 1, 1)), grad.to(dtype)
    taps = [
        torch.einsum("nohw, nchw -> oc", grad, padded[..., i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(taps, -1).unflatten(-1, (3, 3))


def conv3x3_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels can take such a convolution, and are faster than PyTorch's own.

    A matrix unit multiplies bf16 faster in a direct convolution.
    """
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
        and (x.dtype is torch.float32 or not (weight.shape[0] % 2 or weight.shape[1] % 2))
        and not _in_tiles(x.dtype)
    )


def differentiable_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """`conv3x3` that autograd records; gradients come from the same kernels.

    Shapes and dtypes are those of `conv3x3`; the weight's gradient is computed in fp32.
    """
    return _Conv3x3.apply(x, weight, bias, residual)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.float()
        return conv3x3(x, weight, bias, residual=residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, of_residual = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        return (
            conv3x3(grad, weight, transposed=True) if of_x else None,
            conv3x3_weight_gradient(grad, x).to(weight.dtype) if of_weight else None,
            grad.sum((0, 2, 3), dtype=torch.float32) if of_bias else None,
            grad if of_residual else None,
        )


def _in_tiles(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 and native().cpu_has_tiles()


def _run(x, weight, bias, residual, transposed, backend, out):
    _check(x, weight, bias, residual, transposed, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"x": x, "weight": weight, "bias": bias, "residual": residual})
    if choose_backend(_NAME, backend, x.device, _KERNELS) == "reference":
        out.copy_(conv3x3_reference(x, weight, bias, residual=residual, transposed=transposed))
        return
    words = _transformed(weight, transposed, x.dtype)
    run_native(
        "winograd",
        "cpu",
        x,
        **_sizes(x, out.shape[1]),
        x=x.data_ptr(),
        weights=words.data_ptr(),
        transformed=True,
        bias=address(bias),
        residual=address(residual),
        out=out.data_ptr(),
        flat=False,
    )


def _transformed(weight: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """The weight as 16 products take it, int32 words."""
    weight = weight.detach().float().contiguous(memory_format=torch.channels_last)
    rows, channels = weight.shape[:2]
    columns, depth = (channels, rows) if transposed else (rows, channels)
    number = DTYPE_NUMBERS[dtype]
    words = 16 * native().packed_words(columns, depth, False, number)
    out = torch.empty(words, dtype=torch.int32, device="cpu")
    run_native(
        "winograd_weights",
        "cpu",
        weight,
        weights=weight.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        channels=channels,
        transposed=transposed,
        dtype=number,
    )
    return out


def _run_gradient(grad, x, backend, out):
    _check_gradient(grad, x, backend, out)
    if choose_backend(_GRADIENT, backend, x.device, _KERNELS) == "reference":
        out.copy_(conv3x3_weight_gradient_reference(grad, x))
        return
    run_native(
        _GRADIENT,
        "cpu",
        x,
        **_sizes(x, grad.shape[1]),
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        out=out.data_ptr(),
    )


def _sizes(x: Tensor, columns: int) -> dict[str, int]:
    items, channels, height, width = x.shape
    sizes = {"items": items, "height": height, "width": width, "channels": channels}
    return {**sizes, "columns": columns, "dtype": DTYPE_NUMBERS[x.dtype]}


def _check_picture(op: str, name: str, x: Tensor) -> None:
    """Raise unless x is a batch of pictures in channels_last memory that the kernels can read."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: {name} must be fp32 or bf16, got {x.dtype}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{op}: {name} must be [B, C, H, W] and not empty, got {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{op}: {name} must be in channels_last memory, got strides {x.stride()}")
    if x.device.type == "cpu" and _in_tiles(x.dtype):
        raise ValueError(f"{op}: {name} must be fp32 beside a matrix unit, got {x.dtype}")


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"{_NAME}: weight must be of floats, got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.numel() == 0:
        raise ValueError(f"{_NAME}: weight must be [C', C, 3, 3], got {list(weight.shape)}")


def _check(x, weight, bias, residual, transposed, backend, out):
    _check_picture(_NAME, "x", x)
    _check_weight(weight)
    made, taken = weight.shape[:2]
    if transposed:
        made, taken = taken, made
    batch, channels, height, width = x.shape
    if channels != taken:
        raise ValueError(
            f"{_NAME}: x must have the {taken} channels of weight {list(weight.shape)}, "
            f"got {channels}"
        )
    if x.dtype is torch.bfloat16 and channels % 2:
        raise ValueError(f"{_NAME}: x in bf16 must have an even number of channels, got {channels}")
    shape = [batch, made, height, width]
    pictures = {"out": out} if residual is None else {"out": out, "residual": residual}
    for name, picture in pictures.items():
        _check_picture(_NAME, name, picture)
        if list(picture.shape) != shape or picture.dtype is not x.dtype:
            raise ValueError(
                f"{_NAME}: {name} must be {x.dtype} {shape}, "
                f"got {picture.dtype} {list(picture.shape)}"
            )
    for name, tensor in {"weight": weight, **pictures}.items():
        if tensor.device != x.device:
            raise ValueError(f"{_NAME}: {name} must be on {x.device}, got {tensor.device}")
    check_table(_NAME, "bias", bias, (made,), x)
    check_no_grad(_NAME, x, weight, bias, residual, out)


def _check_gradient(grad, x, backend, out):
    for name, picture in (("grad", grad), ("x", x)):
        _check_picture(_GRADIENT, name, picture)
    if grad.dtype is not x.dtype or grad.device != x.device:
        raise ValueError(
            f"{_GRADIENT}: grad must be {x.dtype} on {x.device}, got {grad.dtype} on {grad.device}"
        )
    if (len(grad), grad.shape[2:]) != (len(x), x.shape[2:]):
        raise ValueError(
            f"{_GRADIENT}: grad must have the pictures of x {list(x.shape)}, got {list(grad.shape)}"
        )
    shape = (grad.shape[1], 3, 3, x.shape[1])
    check_tensor(_GRADIENT, "out", out.permute(0, 2, 3, 1), shape, torch.float32, x.device)
    check_no_grad(_GRADIENT, grad, x, out)


_OP = register(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool transposed, "
    "str backend, Tensor(a!) out) -> ()",
    _run,
    _check,
)
_GRADIENT_OP = register(
    f"{_GRADIENT}(Tensor grad, Tensor x, str backend, Tensor(a!) out) -> ()",
    _run_gradient,
    _check_gradient,
)
