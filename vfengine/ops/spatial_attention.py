"""spatial_attention: the pixels of a picture attend to each other, or to a few rows of context.

    y_s = Σ_t softmax_t(q_s · k_t / √D) v_t      of each frame and head

Kernels: csrc/spatial_attention.h, csrc/cpu/spatial_attention.cpp, kernels/spatial_attention.py. On
CUDA, torch's SDPA and flash-attn (vfengine/ops/attention.py) are the ones that were measured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    check_dtype,
    check_head_dim,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_tensor,
    choose_backend,
    register,
    run_native,
)

_NAME = "spatial_attention"
_KERNELS = ("triton", "cpu")


def spatial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ / √D) v of every frame (Vaswani et al. 2017).

    q:         [F, Sq, H*D] fp32, fp16 or bf16; D a multiple of 8 up to 256
    k, v:      [F, Sk, H*D], or [1, Sk, H*D] for all frames alike; same dtype
    num_heads: H
    out:       [F, Sq, H*D], contiguous memory that no argument shares; None: allocated
    backend:   "auto", "cpu", "triton" or "reference" (vfengine/ops/_dispatch.py)

    q, k and v may be columns of wider rows, such as of one projection to all three: elements of a
    row next to each other, rows at one distance, the same for k and v, frame after frame.

    Returns out. Logits, softmax and sums are in fp32.

    Raises TypeError for a dtype, ValueError for a shape, strides, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    tensors = {"q": q, "k": k, "v": v}
    given = tensors if out is None else {**tensors, "out": out}
    num_heads, backend = check_kinds(_NAME, given, num_heads=num_heads, backend=backend)
    if out is None:
        out = q.new_empty(q.shape)
    _OP(q, k, v, num_heads, backend, out)
    return out


def spatial_attention_reference(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The formula of `spatial_attention` in plain PyTorch, in fp32, or in fp64 for fp64 rows.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [F, H, Sq, Sk]
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def row_stride(rows: Tensor) -> int:
    """The distance of rows [F, S, C] that lie at one distance, frame after frame."""
    frames, length, width = rows.shape
    if length > 1:
        return rows.stride(1)
    return rows.stride(0) if frames > 1 else width


def _run(q, k, v, num_heads, backend, out):
    _check(q, k, v, num_heads, backend, out)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    check_overlap(_NAME, out, {"q": q, "k": k, "v": v})
    backend = choose_backend(_NAME, backend, q.device, _KERNELS)
    if backend == "cpu":
        frames, length, width = q.shape
        run_native(
            _NAME,
            backend,
            q,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            out=out.data_ptr(),
            frames=frames,
            q_len=length,
            k_len=k.shape[1],
            heads=num_heads,
            head_dim=width // num_heads,
            q_stride=row_stride(q),
            kv_stride=row_stride(k),
            kv_frames=k.shape[0],
            dtype=DTYPE_NUMBERS[q.dtype],
        )
    elif backend == "triton":
        from vfengine.kernels.spatial_attention import launch

        launch(q, k, v, num_heads, out)
    else:
        out.copy_(spatial_attention_reference(q, k, v, num_heads))


def _check(q, k, v, num_heads, backend, out):
    check_dtype(_NAME, "q", q)
    if q.ndim != 3 or q.numel() == 0:
        raise ValueError(f"{_NAME}: q must be [F, Sq, H*D] and not empty, got {list(q.shape)}")
    frames, _, width = q.shape
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{_NAME}: num_heads must divide {width} channels, got {num_heads}")
    check_head_dim(_NAME, width // num_heads)
    if k.ndim != 3 or k.numel() == 0 or k.shape[0] not in (1, frames) or k.shape[2] != width:
        raise ValueError(
            f"{_NAME}: k must be [{frames} or 1, Sk, {width}] and not empty, got {list(k.shape)}"
        )
    for name, rows, shape in (("q", q, q.shape), ("k", k, k.shape), ("v", v, k.shape)):
        _check_rows(name, rows, shape, q)
    if row_stride(k) != row_stride(v):
        raise ValueError(
            f"{_NAME}: rows of k and v must lie at one distance, got {row_stride(k)} and "
            f"{row_stride(v)}"
        )
    check_tensor(_NAME, "out", out, q.shape, q.dtype, q.device)
    check_no_grad(_NAME, q, k, v, out)


def _check_rows(name: str, rows: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Raise unless `rows` is of this shape, of q's dtype and device, and its rows lie as told."""
    if rows.dtype is not q.dtype:
        raise TypeError(f"{_NAME}: {name} must be {q.dtype}, got {rows.dtype}")
    if rows.device != q.device:
        raise ValueError(f"{_NAME}: {name} must be on {q.device}, got {rows.device}")
    if rows.shape != shape:
        raise ValueError(f"{_NAME}: {name} must be {list(shape)}, got {list(rows.shape)}")
    frames, length, width = shape
    stride = row_stride(rows)
    apart = frames == 1 or rows.stride(0) == length * stride
    if rows.stride(2) != 1 or stride < width or not apart:
        raise ValueError(
            f"{_NAME}: {name} must have contiguous rows at one distance, got strides "
            f"{rows.stride()}"
        )


_OP = register(
    f"{_NAME}(Tensor q, Tensor k, Tensor v, int num_heads, str backend, Tensor(a!) out) -> ()",
    _run,
    _check,
)
