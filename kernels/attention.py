"""y_s = Σ_t softmax_t(q_s · k_t / √D + bias_st) v_t, of each head of each of many sequences

q: rows [Sq, D], k, v: [Sk, D], read where they lie: sequence (outer, inner), row and head have each
their stride, so that frames of a pixel and pixels of a frame need no copy. A program owns BLOCK_Q
queries of one head and walks over the keys, BLOCK_K at a time, with a running maximum and sum
(Milakov and Gimelshein 2018; Dao et al. 2022). Products on tensor cores where the dtype has 16
bits, sums in fp32. q and y move once; k and v once per BLOCK_Q queries, from cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs


@triton.jit(do_not_specialize=["q_len", "k_len", "tiles", "inner_size", "heads"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,  # q_ptr where there is none
    out_ptr,
    q_outer,
    q_inner,
    q_row,
    k_outer,
    k_inner,
    k_row,
    out_outer,
    out_inner,
    out_row,
    q_len,
    k_len,
    tiles,
    inner_size,
    heads,
    scale,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs()
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    sequence = tl.program_id(0) // heads // tiles
    outer = (sequence // inner_size).to(tl.int64)
    inner = (sequence % inner_size).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    s = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = head * D + d
    q_here = (s < q_len)[:, None] & (d < D)[None, :]
    q_at = outer * q_outer + inner * q_inner + s.to(tl.int64)[:, None] * q_row + column[None, :]
    q = tl.load(q_ptr + q_at, mask=q_here, other=0.0)
    k_start = outer * k_outer + inner * k_inner

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    y = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, k_len, BLOCK_K):
        t = start + tl.arange(0, BLOCK_K)
        k_here = (t < k_len)[:, None] & (d < D)[None, :]
        k_at = k_start + t.to(tl.int64)[:, None] * k_row + column[None, :]
        k = tl.load(k_ptr + k_at, mask=k_here, other=0.0)
        v = tl.load(v_ptr + k_at, mask=k_here, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if BIAS:
            both = (s < q_len)[:, None] & (t < k_len)[None, :]
            bias_at = (head * q_len + s)[:, None] * k_len + t[None, :]
            logits += tl.load(bias_ptr + bias_at, mask=both, other=0.0)
        logits = tl.where((t < k_len)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Where every logit so far is -inf there is nothing to subtract.
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(logits - origin[:, None])
        rescale = tl.exp(top - origin)
        total = total * rescale + tl.sum(p, 1)
        y *= rescale[:, None]
        y += tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    y = y / total[:, None]
    out_at = (
        outer * out_outer + inner * out_inner + s.to(tl.int64)[:, None] * out_row + column[None, :]
    )
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=q_here)


def blocks(block_d: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """BLOCK_Q, BLOCK_K and stages, of which registers and 99 KiB of shared memory hold as many."""
    if dtype.itemsize == 4:
        return (32, 32, 2) if block_d <= 128 else (16, 16, 1)
    return (64, 64, 2) if block_d <= 64 else (64, 32, 2) if block_d <= 128 else (32, 32, 2)


def launch_attention(arguments: tuple[tuple[int], tuple, dict[str, object]]) -> None:
    """Launch what `launch_arguments` returned."""
    grid, values, constants = arguments
    launch_kernel(attention_kernel, grid, values, constants)


def launch_arguments(
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    strides: Sequence[int],
    sequences: tuple[int, int],
    lengths: tuple[int, int],
    heads: int,
    head_dim: int,
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of attention_kernel.

    tensors:   q, k, v, out
    strides:   of outer, inner and row, in q, in k and v, and in out
    sequences: outer and inner
    lengths:   Sq and Sk
    """
    q, k, v, out = tensors
    block_d = max(16, triton.next_power_of_2(head_dim))
    *most, stages = blocks(block_d, q.dtype)
    block_q, block_k = (
        max(16, min(rows, triton.next_power_of_2(length)))
        for rows, length in zip(most, lengths, strict=True)
    )
    tiles = triton.cdiv(lengths[0], block_q)
    constants = {
        "D": head_dim,
        "BIAS": bias is not None,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "num_warps": 1 if block_q == 16 and block_d <= 64 else 4,
        "num_stages": stages,
    }
    tensors = (q, k, v, q if bias is None else bias, out)
    values = (*tensors, *strides, *lengths, tiles, sequences[1], heads, head_dim**-0.5)
    return (sequences[0] * sequences[1] * tiles * heads,), values, constants
