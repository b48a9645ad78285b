"""layer_norm_backward: the gradients of layer_norm, and layer_norm with that derivative.

Kernels: csrc/layer_norm_backward.h, csrc/cpu/layer_norm_backward.cpp,
kernels/layer_norm_backward.py.
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
from vfengine.ops.layer_norm import layer_norm

_NAME = "layer_norm_backward"
_KERNELS = ("triton", "cpu")


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a loss by x, weight and bias, from that by layer_norm(x, weight, bias).

    With x̂ = (x - μ) / √(σ² + ε), w = grad · weight and means over the last dimension, that is
    (w - mean(w) - x̂ mean(w x̂)) / √(σ² + ε), Σ grad x̂ and Σ grad (Ba, Kiros and Hinton 2016).

    grad, x: [..., C] fp32, fp16 or bf16 alike, contiguous
    weight:  fp32 [C], or None for 1
    out:     like x, memory that no argument shares; None: allocated
    backend: "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out, and the gradients of weight and of bias, fp32 [C]. All in fp32; x̂ is recomputed.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    given = {"weight": weight, "out": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    tensors = {"grad": grad, "x": x, **given}
    eps, backend = check_kinds(_NAME, tensors, eps=eps, backend=backend)
    out = torch.empty_like(x) if out is None else out
    tables = torch.empty((2, *x.shape[-1:]), dtype=torch.float32, device=x.device)
    _OP(grad, x, weight, eps, backend, out, tables)
    return out, *tables.unbind(0)


def layer_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `layer_norm_backward` in plain PyTorch, in fp32, or in fp64 for fp64 rows.

    Returns new tensors in the dtype they were computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, x = grad.to(dtype), x.to(dtype)
    mean = lambda t: t.mean(-1, keepdim=True)  # noqa: E731
    centred = x - mean(x)
    deviation = (mean(centred.square()) + eps).sqrt()
    normalised = centred / deviation
    weighted = grad if weight is None else grad * weight.to(dtype)
    grad_x = (weighted - mean(weighted) - normalised * mean(weighted * normalised)) / deviation
    over_rows = lambda t: t.reshape(-1, x.shape[-1]).sum(0)  # noqa: E731
    return grad_x, over_rows(grad * normalised), over_rows(grad)


def layer_norm_pays(x: Tensor) -> bool:
    """Whether these kernels are faster than PyTorch's own where autograd records.

    On a CPU they are not: rows of a few hundred numbers take less time than autograd.Function.
    """
    return x.is_cuda


def differentiable_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`layer_norm` of the same arguments, recorded by autograd; `layer_norm_backward` is its
    derivative, which has none itself.

    Raises what `layer_norm` raises; RuntimeError where it is to be differentiated twice.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return layer_norm(x, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grads = layer_norm_backward(grad.contiguous(), x, weight, eps=ctx.eps)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if needed else None for g, needed in wanted), None


def _run(grad, x, weight, eps, backend, out, tables):
    _check(grad, x, weight, eps, backend, out, tables)
    for written in (out, tables):  # as torch's own ops do, so that autograd sees the write
        increment_version(written)
        check_overlap(_NAME, written, {"grad": grad, "x": x, "weight": weight})
    backend = choose_backend(_NAME, backend, x.device, _KERNELS)
    if backend == "cpu":
        channels = x.shape[-1]
        run_native(
            _NAME,
            backend,
            x,
            grad=grad.data_ptr(),
            x=x.data_ptr(),
            weight=address(weight),
            out=out.data_ptr(),
            tables=tables.data_ptr(),
            rows=x.numel() // channels,
            channels=channels,
            eps=eps,
            dtype=DTYPE_NUMBERS[x.dtype],
        )
    elif backend == "triton":
        from vfengine.kernels.layer_norm_backward import launch

        launch(grad, x, weight, eps, out, tables)
    else:
        grads = layer_norm_backward_reference(grad, x, weight, eps=eps)
        for written, result in zip((out, *tables.unbind(0)), grads, strict=True):
            written.copy_(result)


def _check(grad, x, weight, eps, backend, out, tables):
    check_dtype(_NAME, "x", x)
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{_NAME}: x must be [..., C] and not empty, got {list(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps must not be negative, got {eps}")
    for name, tensor in (("x", x), ("grad", grad), ("out", out)):
        check_tensor(_NAME, name, tensor, x.shape, x.dtype, x.device)
    check_table(_NAME, "weight", weight, x.shape[-1:], x)
    check_table(_NAME, "tables", tables, (2, *x.shape[-1:]), x)
    check_no_grad(_NAME, grad, x, weight, out, tables)


_OP = register(
    f"{_NAME}(Tensor grad, Tensor x, Tensor? weight, float eps, str backend, Tensor(a!) out, "
    "Tensor(b!) tables) -> ()",
    _run,
    _check,
)
