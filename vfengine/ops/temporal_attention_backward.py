"""temporal_attention_backward: the gradients of temporal_attention, and it with that derivative.

    dv = Pᵀ dy    S = P ∘ (dy vᵀ - Σ_m P ∘ dy vᵀ)    dq = S k / √D    dk = Sᵀ q / √D    dbias = Σ S

Kernels: csrc/temporal_attention_backward.h, csrc/cpu/temporal_attention_backward.cpp,
kernels/temporal_attention_backward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    MAX_HEAD_DIM,
    address,
    check_dtype,
    check_head_dim,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_table,
    check_tensor,
    choose_backend,
    register,
    run_native,
)
from vfengine.ops.temporal_attention import MAX_FRAMES, temporal_attention

_NAME = "temporal_attention_backward"
_KERNELS = ("triton", "cpu")


def temporal_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a loss by qkv and bias, from that by temporal_attention(qkv, H, bias).

    The backward pass of attention (Dao et al. 2022, appendix B.2) over the frames of every pixel.

    grad:      [B, N, P, H*D] fp32, fp16 or bf16, contiguous
    qkv:       [B, N, P, 3*H*D], same dtype, contiguous: q, k and v of P pixels, in that order, the
               heads contiguous inside; 1 to 128 frames, D a multiple of 8 up to 256
    num_heads: H
    bias:      fp32 [H, N, N], which was added to the logits, or None
    out:       like qkv, memory that no argument shares; None: allocated
    backend:   "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out, and the gradient of bias, fp32 [H, N, N], None where there is no bias.
    Probabilities are recomputed; logits, softmax and sums are in fp32; nothing is permuted.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    given = {"bias": bias, "out": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    tensors = {"grad": grad, "qkv": qkv, **given}
    num_heads, backend = check_kinds(_NAME, tensors, num_heads=num_heads, backend=backend)
    out = torch.empty_like(qkv) if out is None else out
    grad_bias = None if bias is None else torch.empty_like(bias)
    _OP(grad, qkv, bias, num_heads, backend, out, grad_bias)
    return out, grad_bias


def temporal_attention_backward_reference(
    grad: Tensor, qkv: Tensor, num_heads: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The formula of `temporal_attention_backward` in plain PyTorch, in fp32, or in fp64.

    Returns new tensors in the dtype they were computed in, that of qkv but fp32 at least.
    """
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(dtype).unflatten(-1, (3, num_heads, -1)).unbind(-3)  # [B, N, P, H, D]
    grad = grad.to(dtype).unflatten(-1, (num_heads, -1))
    scale = q.shape[-1] ** -0.5
    logits = torch.einsum("bnphd, bmphd -> bphnm", q, k) * scale
    p = (logits if bias is None else logits + bias.to(dtype)).softmax(-1)
    s = p * torch.einsum("bnphd, bmphd -> bphnm", grad, v)
    s = s - p * s.sum(-1, keepdim=True)
    grads = (
        torch.einsum("bphnm, bmphd -> bnphd", s, k) * scale,
        torch.einsum("bphnm, bnphd -> bmphd", s, q) * scale,
        torch.einsum("bphnm, bnphd -> bmphd", p, grad),
    )
    return torch.stack(grads, -3).flatten(-3), None if bias is None else s.sum((0, 1))


def temporal_attention_takes(num_frames: int, head_dim: int) -> bool:
    """Whether there are kernels for so many frames and heads of this dimension."""
    return num_frames <= MAX_FRAMES and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def differentiable_temporal_attention(
    qkv: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """`temporal_attention` of the same arguments, recorded by autograd.

    `temporal_attention_backward` is its derivative, which has none itself. Raises what
    `temporal_attention` raises; RuntimeError where it is to be differentiated twice.
    """
    return _TemporalAttention.apply(qkv, num_heads, bias)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, bias):
        ctx.save_for_backward(qkv, bias)
        ctx.num_heads = num_heads
        return temporal_attention(qkv, num_heads, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, bias = ctx.saved_tensors
        grads = temporal_attention_backward(grad.contiguous(), qkv, ctx.num_heads, bias)
        return grads[0], None, grads[1]


def _run(grad, qkv, bias, num_heads, backend, out, grad_bias):
    _check(grad, qkv, bias, num_heads, backend, out, grad_bias)
    for written in (out, grad_bias):
        if written is not None:
            increment_version(written)  # as torch's own ops do, so that autograd sees the write
            check_overlap(_NAME, written, {"grad": grad, "qkv": qkv, "bias": bias})
    backend = choose_backend(_NAME, backend, qkv.device, _KERNELS)
    if backend == "cpu":
        batch, frames, pixels, width = grad.shape
        run_native(
            _NAME,
            backend,
            qkv,
            grad=grad.data_ptr(),
            qkv=qkv.data_ptr(),
            bias=address(bias),
            out=out.data_ptr(),
            grad_bias=address(grad_bias),
            batch=batch,
            frames=frames,
            pixels=pixels,
            heads=num_heads,
            head_dim=width // num_heads,
            dtype=DTYPE_NUMBERS[qkv.dtype],
        )
    elif backend == "triton":
        from vfengine.kernels.temporal_attention_backward import launch

        launch(grad, qkv, bias, num_heads, out, grad_bias)
    else:
        grads = temporal_attention_backward_reference(grad, qkv, num_heads, bias)
        out.copy_(grads[0])
        if grad_bias is not None:
            grad_bias.copy_(grads[1])


def _check(grad, qkv, bias, num_heads, backend, out, grad_bias):
    check_dtype(_NAME, "qkv", qkv)
    if qkv.ndim != 4 or qkv.numel() == 0:
        raise ValueError(
            f"{_NAME}: qkv must be [B, N, P, 3*H*D] and not empty, got {list(qkv.shape)}"
        )
    *leading, width = qkv.shape
    if num_heads < 1 or width % (3 * num_heads):
        raise ValueError(f"{_NAME}: {width} channels are not q, k, v of num_heads={num_heads}")
    frames = leading[1]
    if frames > MAX_FRAMES:
        raise ValueError(f"{_NAME}: expected at most {MAX_FRAMES} frames, got {frames}")
    check_head_dim(_NAME, width // (3 * num_heads))
    for name, tensor in (("qkv", qkv), ("grad", grad), ("out", out)):
        channels = width // 3 if tensor is grad else width
        check_tensor(_NAME, name, tensor, (*leading, channels), qkv.dtype, qkv.device)
    if (bias is None) != (grad_bias is None):
        raise ValueError(f"{_NAME}: expected bias and grad_bias, or neither")
    for name, table in (("bias", bias), ("grad_bias", grad_bias)):
        check_table(_NAME, name, table, (num_heads, frames, frames), qkv)
    check_no_grad(_NAME, grad, qkv, bias, out, grad_bias)


_OP = register(
    f"{_NAME}(Tensor grad, Tensor qkv, Tensor? bias, int num_heads, str backend, "
    "Tensor(a!) out, Tensor(b!)? grad_bias) -> ()",
    _run,
    _check,
)
