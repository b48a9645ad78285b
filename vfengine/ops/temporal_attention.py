"""temporal_attention: every pixel's frames attend to each other, with nothing permuted.

    y_n = Σ_m softmax_m(q_n · k_m / √D + bias_nm) v_m      of each pixel and head

Kernels: csrc/temporal_attention.h, csrc/{cpu,cuda}/temporal_attention.*,
kernels/temporal_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
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

_NAME = "temporal_attention"
MAX_FRAMES = 128
# What "auto" takes on CUDA for 16-bit dtypes. The CUDA C++ kernel on tensor cores has not been
# measured against Triton's yet, which was three times as fast as the kernel before it.
PREFERRED_16_BITS = "triton"


def temporal_attention(
    qkv: Tensor,
    num_heads: int,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ / √D + bias) v over the frames of every pixel (Ho et al. 2022, video diffusion).

    qkv:       [B, N, P, 3*H*D] fp32, fp16 or bf16, contiguous: q, k and v of P pixels, in that
               order, the heads contiguous inside; 1 to 128 frames, D a multiple of 8 up to 256
    num_heads: H
    bias:      fp32 [H, N, N], added to the logits (relative positions), or None
    out:       [B, N, P, H*D], same dtype, contiguous memory that is no argument's; None: allocated
    backend:   "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out. Logits, softmax and sums are in fp32; nothing is permuted or copied.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    given = {"bias": bias, "out": out}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    tensors = {"qkv": qkv, **given}
    num_heads, backend = check_kinds(_NAME, tensors, num_heads=num_heads, backend=backend)
    if out is None:
        out = qkv.new_empty(_out_shape(qkv, num_heads))
    _OP(qkv, bias, num_heads, backend, out)
    return out


def temporal_attention_reference(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """The formula of `temporal_attention` in plain PyTorch, in fp32, or in fp64 for fp64 clips.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(dtype).unflatten(-1, (3, num_heads, -1)).unbind(-3)  # [B, N, P, H, D]
    logits = torch.einsum("bnphd, bmphd -> bphnm", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(dtype)
    return torch.einsum("bphnm, bmphd -> bnphd", logits.softmax(-1), v).flatten(-2)


def _out_shape(qkv: Tensor, num_heads: int) -> tuple[int, ...]:
    if qkv.ndim != 4 or qkv.numel() == 0:
        raise ValueError(
            f"{_NAME}: qkv must be [B, N, P, 3*H*D] and not empty, got {list(qkv.shape)}"
        )
    width = qkv.shape[-1]
    if num_heads < 1 or width % (3 * num_heads):
        raise ValueError(f"{_NAME}: {width} channels are not q, k, v of num_heads={num_heads}")
    return (*qkv.shape[:-1], width // 3)


def _run(qkv, bias, num_heads, backend, out):
    _check(qkv, bias, num_heads, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"qkv": qkv, "bias": bias})
    prefer = "cuda" if qkv.dtype is torch.float32 else PREFERRED_16_BITS
    backend = choose_backend(_NAME, backend, qkv.device, prefer=prefer)
    if backend == "reference":
        out.copy_(temporal_attention_reference(qkv, num_heads, bias))
    elif backend == "triton":
        from vfengine.kernels.temporal_attention import launch

        launch(qkv, bias, num_heads, out)
    else:
        batch, frames, pixels, width = out.shape
        run_native(
            _NAME,
            backend,
            qkv,
            qkv=qkv.data_ptr(),
            bias=address(bias),
            out=out.data_ptr(),
            batch=batch,
            frames=frames,
            pixels=pixels,
            heads=num_heads,
            head_dim=width // num_heads,
            dtype=DTYPE_NUMBERS[qkv.dtype],
        )


def _check(qkv, bias, num_heads, backend, out):
    check_dtype(_NAME, "qkv", qkv)
    shape = _out_shape(qkv, num_heads)
    _, frames, _, width = shape
    if frames > MAX_FRAMES:
        raise ValueError(f"{_NAME}: expected at most {MAX_FRAMES} frames, got {frames}")
    check_head_dim(_NAME, width // num_heads)
    check_tensor(_NAME, "qkv", qkv, qkv.shape, qkv.dtype, qkv.device)
    check_tensor(_NAME, "out", out, shape, qkv.dtype, qkv.device)
    check_table(_NAME, "bias", bias, (num_heads, frames, frames), qkv)
    check_no_grad(_NAME, qkv, bias, out)


_OP = register(
    f"{_NAME}(Tensor qkv, Tensor? bias, int num_heads, str backend, Tensor(a!) out) -> ()",
    _run,
    _check,
)
