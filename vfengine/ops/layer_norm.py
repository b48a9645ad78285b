"""layer_norm: y = (x - μ) / √(σ² + ε) weight + bias of every row, with one read and one write.

Kernels: csrc/layer_norm.h, csrc/cpu/layer_norm.cpp, kernels/layer_norm.py.
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
    check_tensor,
    choose_backend,
    register,
    run_native,
)

_NAME = "layer_norm"
_KERNELS = ("triton", "cpu")


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(x - μ) / √(σ² + ε) weight + bias over the last dimension (Ba, Kiros and Hinton 2016).

    x:            [..., C] fp32, fp16 or bf16, contiguous
    weight, bias: fp32 [C], or None for 1 and 0
    out:          like x, memory that no argument shares; None: allocated
    backend:      "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out. Sums are in fp32, and of centred squares.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    given = {"weight": weight, "bias": bias, "out": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    eps, backend = check_kinds(_NAME, {"x": x, **given}, eps=eps, backend=backend)
    out = torch.empty_like(x) if out is None else out
    _OP(x, weight, bias, eps, backend, out)
    return out


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """The formula of `layer_norm` in plain PyTorch, in fp32, or in fp64 for fp64 rows.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(dtype) - x.to(dtype).mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _run(x, weight, bias, eps, backend, out):
    _check(x, weight, bias, eps, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"x": x, "weight": weight, "bias": bias})
    backend = choose_backend(_NAME, backend, x.device, _KERNELS)
    if backend == "cpu":
        channels = x.shape[-1]
        run_native(
            _NAME,
            backend,
            x,
            x=x.data_ptr(),
            weight=address(weight),
            bias=address(bias),
            out=out.data_ptr(),
            rows=x.numel() // channels,
            channels=channels,
            eps=eps,
            dtype=DTYPE_NUMBERS[x.dtype],
        )
    elif backend == "triton":
        from vfengine.kernels.layer_norm import launch

        launch(x, weight, bias, eps, out)
    else:
        out.copy_(layer_norm_reference(x, weight, bias, eps=eps))


def _check(x, weight, bias, eps, backend, out):
    check_dtype(_NAME, "x", x)
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{_NAME}: x must be [..., C] and not empty, got {list(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps must not be negative, got {eps}")
    for name, tensor in (("x", x), ("out", out)):
        check_tensor(_NAME, name, tensor, x.shape, x.dtype, x.device)
    check_table(_NAME, "weight", weight, x.shape[-1:], x)
    check_table(_NAME, "bias", bias, x.shape[-1:], x)
    check_no_grad(_NAME, x, weight, bias, out)


_OP = register(
    f"{_NAME}(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend, Tensor(a!) out) "
    "-> ()",
    _run,
    _check,
)
