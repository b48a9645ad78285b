"""geglu: y = x₁ gelu(x₂) of the halves of every row, with one read and one write.

Kernels: csrc/geglu.h, csrc/cpu/geglu.cpp, kernels/geglu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
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

_NAME = "geglu"
_KERNELS = ("triton", "cpu")


def geglu(x: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """x[..., :K] gelu(x[..., K:]) with the exact gelu(v) = v/2 (1 + erf(v/√2)) (Shazeer 2020).

    x:       [..., 2K] fp32, fp16 or bf16, contiguous
    out:     [..., K], same dtype, contiguous memory that x does not share; None: allocated
    backend: "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out, computed in fp32 and rounded once.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    check_kinds(_NAME, {"x": x} if out is None else {"x": x, "out": out}, backend=backend)
    if out is None:
        out = x.new_empty(_out_shape(x))
    _OP(x, backend, out)
    return out


def geglu_reference(x: Tensor) -> Tensor:
    """The formula of `geglu` in plain PyTorch, in fp32, or in fp64 for fp64 rows.

    Returns a new tensor in the dtype it was computed in.
    """
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return value * (0.5 * gate * (1 + torch.erf(gate * 0.5**0.5)))


def _out_shape(x: Tensor) -> tuple[int, ...]:
    if x.ndim == 0 or x.numel() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{_NAME}: x must be [..., 2K] and not empty, got {list(x.shape)}")
    return (*x.shape[:-1], x.shape[-1] // 2)


def _run(x, backend, out):
    _check(x, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"x": x})
    backend = choose_backend(_NAME, backend, x.device, _KERNELS)
    if backend == "cpu":
        width = out.shape[-1]
        run_native(
            _NAME,
            backend,
            x,
            x=x.data_ptr(),
            out=out.data_ptr(),
            rows=out.numel() // width,
            width=width,
            dtype=DTYPE_NUMBERS[x.dtype],
        )
    elif backend == "triton":
        from vfengine.kernels.geglu import launch

        launch(x, out)
    else:
        out.copy_(geglu_reference(x))


def _check(x, backend, out):
    check_dtype(_NAME, "x", x)
    for name, tensor, shape in (("x", x, x.shape), ("out", out, _out_shape(x))):
        check_tensor(_NAME, name, tensor, shape, x.dtype, x.device)
    check_no_grad(_NAME, x, out)


_OP = register(f"{_NAME}(Tensor x, str backend, Tensor(a!) out) -> ()", _run, _check)
