"""geglu_backward: the gradient of geglu, and geglu with that derivative.

Kernels: csrc/geglu_backward.h, csrc/cpu/geglu_backward.cpp, kernels/geglu_backward.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    register,
    run_native,
)
from vfengine.ops.geglu import geglu

_NAME = "geglu_backward"
_KERNELS = ("triton", "cpu")


def geglu_backward(
    grad: Tensor, x: Tensor, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The gradient of a loss by x, from that by geglu(x) = a gelu(b) with [a | b] = x.

    Its halves are grad gelu(b) and grad a gelu'(b), where gelu'(b) = Φ(b) + b φ(b), of the normal
    distribution's function and density (Shazeer 2020).

    grad:    [..., K] fp32, fp16 or bf16, contiguous
    x:       [..., 2K], same dtype, contiguous
    out:     like x, memory that no argument shares; None: allocated
    backend: "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out, computed in fp32 and rounded once.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    given = {} if out is None else {"out": out}
    check_kinds(_NAME, {"grad": grad, "x": x, **given}, backend=backend)
    out = torch.empty_like(x) if out is None else out
    _OP(grad, x, backend, out)
    return out


def geglu_backward_reference(grad: Tensor, x: Tensor) -> Tensor:
    """The formula of `geglu_backward` in plain PyTorch, in fp32, or in fp64 for fp64 rows.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    value, gate = x.to(dtype).chunk(2, -1)
    cdf = 0.5 * (1 + torch.erf(gate * 0.5**0.5))
    density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
    grad = grad.to(dtype)
    return torch.cat([grad * (gate * cdf), grad * value * (cdf + gate * density)], -1)


def differentiable_geglu(x: Tensor) -> Tensor:
    """`geglu` of x, recorded by autograd; its derivative, `geglu_backward`, has none itself.

    Raises what `geglu` raises; RuntimeError where it is to be differentiated twice.
    """
    return _Geglu.apply(x)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return geglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return geglu_backward(grad.contiguous(), *ctx.saved_tensors)


def _run(grad, x, backend, out):
    _check(grad, x, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"grad": grad, "x": x})
    backend = choose_backend(_NAME, backend, x.device, _KERNELS)
    if backend == "cpu":
        width = grad.shape[-1]
        run_native(
            _NAME,
            backend,
            x,
            grad=grad.data_ptr(),
            x=x.data_ptr(),
            out=out.data_ptr(),
            rows=grad.numel() // width,
            width=width,
            dtype=DTYPE_NUMBERS[x.dtype],
        )
    elif backend == "triton":
        from vfengine.kernels.geglu_backward import launch

        launch(grad, x, out)
    else:
        out.copy_(geglu_backward_reference(grad, x))


def _check(grad, x, backend, out):
    check_dtype(_NAME, "x", x)
    if x.ndim == 0 or x.numel() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{_NAME}: x must be [..., 2K] and not empty, got {list(x.shape)}")
    width = x.shape[-1] // 2
    for name, tensor, shape in (
        ("x", x, x.shape),
        ("grad", grad, (*x.shape[:-1], width)),
        ("out", out, x.shape),
    ):
        check_tensor(_NAME, name, tensor, shape, x.dtype, x.device)
    check_no_grad(_NAME, grad, x, out)


_OP = register(f"{_NAME}(Tensor grad, Tensor x, str backend, Tensor(a!) out) -> ()", _run, _check)
