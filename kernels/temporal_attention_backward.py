"""The gradients of softmax(q kᵀ / √D + bias) v over frames    csrc/temporal_attention_backward.h

qkv: [B, N, P, 3 H D], grad: [B, N, P, H D], read where they lie. Without atomics: a program of
query_kernel owns BLOCK queries of one head at some pixels, one after the other; it finds their
softmax and writes grad_q, and adds what a pixel gives to grad_bias to a part of its own. A program
of key_kernel owns BLOCK keys and writes grad_k and grad_v; where one block holds all frames,
query_kernel does that as well. A last launch adds up the parts. Products on tensor cores where the
dtype has 16 bits, sums in fp32 (Dao et al. 2022, appendix B.2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs
from .partial_sums import launch_arguments as sum_arguments

PROGRAMS = 4096  # about as many, where each adds up a part of grad_bias
MOST_PIXELS = 32  # that such a program takes
NUMBERS = ["frames", "pixels", "sequences", "chunk", "heads", "tiles"]


@triton.jit
def load_rows(from_ptr, start, n, row_step, column, frames, D: tl.constexpr):
    """Rows of frames n, zero beyond the end."""
    here = (n < frames)[:, None] & (tl.arange(0, column.shape[0]) < D)[None, :]
    at = start + n.to(tl.int64)[:, None] * row_step + column[None, :]
    return tl.load(from_ptr + at, mask=here, other=0.0)


@triton.jit
def store_rows(to_ptr, values, start, n, row_step, column, frames, D: tl.constexpr):
    here = (n < frames)[:, None] & (tl.arange(0, column.shape[0]) < D)[None, :]
    at = start + n.to(tl.int64)[:, None] * row_step + column[None, :]
    tl.store(to_ptr + at, values.to(to_ptr.dtype.element_ty), mask=here)


@triton.jit
def logits_of(q, k, bias_ptr, head, s, t, frames, scale, BIAS: tl.constexpr):
    """q kᵀ / √D + bias of queries s and keys t, -inf beyond the last key."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if BIAS:
        both = (s < frames)[:, None] & (t < frames)[None, :]
        at = (head * frames + s)[:, None] * frames + t[None, :]
        logits += tl.load(bias_ptr + at, mask=both, other=0.0)
    return tl.where((t < frames)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=NUMBERS)
def query_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,  # qkv_ptr where there is none
    out_ptr,
    partial_ptr,  # [chunk, head, query, key]; qkv_ptr where there is no bias
    rows_ptr,  # [sequence, head, 3, query]: highest logit, 1 / sum, mean; where not WHOLE
    frames,
    pixels,
    sequences,
    chunk,  # sequences that a program takes
    heads,
    tiles,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # H D
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs()
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    part = tl.program_id(0) // heads // tiles
    s = tile * BLOCK + tl.arange(0, BLOCK)
    column = head * D + tl.arange(0, BLOCK_D)
    for step in range(0, tl.minimum(chunk, sequences - part * chunk)):
        sequence = part * chunk + step
        row = (sequence // pixels).to(tl.int64) * frames * pixels + sequence % pixels
        grad_step, qkv_step = pixels * WIDTH, pixels * (3 * WIDTH)
        start = row * (3 * WIDTH)
        q = load_rows(qkv_ptr, start, s, qkv_step, column, frames, D)
        g = load_rows(grad_ptr, row * WIDTH, s, grad_step, column, frames, D)

        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        mean = tl.zeros([BLOCK], tl.float32)
        for first in range(0, frames, BLOCK):
            t = first + tl.arange(0, BLOCK)
            k = load_rows(qkv_ptr, start + WIDTH, t, qkv_step, column, frames, D)
            v = load_rows(qkv_ptr, start + 2 * WIDTH, t, qkv_step, column, frames, D)
            logits = logits_of(q, k, bias_ptr, head, s, t, frames, scale, BIAS)
            new_top = tl.maximum(top, tl.max(logits, 1))
            # Where every logit so far is -inf there is nothing to subtract.
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp(logits - origin[:, None])
            fade = tl.exp(top - origin)
            total = total * fade + tl.sum(p, 1)
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            mean = mean * fade + tl.sum(p * dp, 1)
            top = new_top
        origin = tl.where(top == float("-inf"), 0.0, top)
        inverse = 1.0 / total
        mean *= inverse

        of_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for first in range(0, frames, BLOCK):
            t = first + tl.arange(0, BLOCK)
            k = load_rows(qkv_ptr, start + WIDTH, t, qkv_step, column, frames, D)
            v = load_rows(qkv_ptr, start + 2 * WIDTH, t, qkv_step, column, frames, D)
            logits = logits_of(q, k, bias_ptr, head, s, t, frames, scale, BIAS)
            p = tl.exp(logits - origin[:, None]) * inverse[:, None]
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            ds = p * (dp - mean[:, None])
            of_q += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
            if WHOLE:
                of_k = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee") * scale
                store_rows(out_ptr, of_k, start + WIDTH, t, qkv_step, column, frames, D)
                of_v = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
                store_rows(out_ptr, of_v, start + 2 * WIDTH, t, qkv_step, column, frames, D)
            if BIAS:
                both = (s < frames)[:, None] & (t < frames)[None, :]
                matrix = (part.to(tl.int64) * heads + head) * frames
                at = (matrix + s)[:, None] * frames + t[None, :]
                before = both & (step > 0)
                ds += tl.load(partial_ptr + at, mask=before, other=0.0)
                tl.store(partial_ptr + at, ds, mask=both)
        store_rows(out_ptr, of_q * scale, start, s, qkv_step, column, frames, D)
        if not WHOLE:
            at = (sequence.to(tl.int64) * heads + head) * 3 * frames + s
            tl.store(rows_ptr + at, origin, mask=s < frames)
            tl.store(rows_ptr + at + frames, inverse, mask=s < frames)
            tl.store(rows_ptr + at + 2 * frames, mean, mask=s < frames)
        if BIAS:
            tl.debug_barrier()  # what is added to next has then been written


@triton.jit(do_not_specialize=NUMBERS)
def key_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    out_ptr,
    rows_ptr,
    frames,
    pixels,
    heads,
    tiles,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_k and grad_v of BLOCK keys of one head at one pixel."""
    wait_for_inputs()
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    sequence = tl.program_id(0) // heads // tiles
    row = (sequence // pixels).to(tl.int64) * frames * pixels + sequence % pixels
    grad_step, qkv_step = pixels * WIDTH, pixels * (3 * WIDTH)
    start = row * (3 * WIDTH)
    t = tile * BLOCK + tl.arange(0, BLOCK)
    column = head * D + tl.arange(0, BLOCK_D)
    k = load_rows(qkv_ptr, start + WIDTH, t, qkv_step, column, frames, D)
    v = load_rows(qkv_ptr, start + 2 * WIDTH, t, qkv_step, column, frames, D)
    of_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    of_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in range(0, frames, BLOCK):
        s = first + tl.arange(0, BLOCK)
        q = load_rows(qkv_ptr, start, s, qkv_step, column, frames, D)
        g = load_rows(grad_ptr, row * WIDTH, s, grad_step, column, frames, D)
        at = (sequence.to(tl.int64) * heads + head) * 3 * frames + s
        origin = tl.load(rows_ptr + at, mask=s < frames, other=0.0)
        inverse = tl.load(rows_ptr + at + frames, mask=s < frames, other=0.0)
        mean = tl.load(rows_ptr + at + 2 * frames, mask=s < frames, other=0.0)
        logits = logits_of(q, k, bias_ptr, head, s, t, frames, scale, BIAS)
        p = tl.exp(logits - origin[:, None]) * inverse[:, None]
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        ds = p * (dp - mean[:, None])
        of_k += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
        of_v += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
    store_rows(out_ptr, of_k * scale, start + WIDTH, t, qkv_step, column, frames, D)
    store_rows(out_ptr, of_v, start + 2 * WIDTH, t, qkv_step, column, frames, D)


def largest_block(block_d: int, dtype: torch.dtype) -> int:
    """BLOCK at most, of which registers and 99 KiB of shared memory hold what a kernel needs."""
    if dtype.itemsize == 4:
        return 32 if block_d <= 64 else 16
    return 64 if block_d <= 64 else 32 if block_d <= 128 else 16


def launch(grad: Tensor, *arguments) -> None:
    """Write the gradients into out and grad_bias. The arguments are those of the op, checked."""
    for kernel, grid, values, constants in launches(grad, *arguments):
        launch_kernel(kernel, grid, values, constants)


def launches(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    out: Tensor,
    grad_bias: Tensor | None,
) -> list[tuple]:
    """(kernel, grid, arguments, constants) of each launch: one to three."""
    batch, frames, pixels, width = grad.shape
    head_dim, sequences = width // num_heads, batch * pixels
    block_d = max(16, triton.next_power_of_2(head_dim))
    most = largest_block(block_d, grad.dtype)
    block = max(16, min(most, triton.next_power_of_2(frames)))
    tiles = triton.cdiv(frames, block)
    chunk = 1
    if bias is not None:
        chunk = max(1, min(MOST_PIXELS, sequences * num_heads * tiles // PROGRAMS))
    chunks = triton.cdiv(sequences, chunk)
    memory = {"dtype": torch.float32, "device": grad.device}
    partial = rows = qkv
    if bias is not None:
        partial = torch.empty((chunks, *bias.shape), **memory)
    if tiles > 1:
        rows = torch.empty((sequences, num_heads, 3, frames), **memory)
    inputs = (grad, qkv, qkv if bias is None else bias, out)
    held = block * block_d * grad.element_size()  # bytes of a tile
    constants = {
        "D": head_dim,
        "WIDTH": width,
        "BIAS": bias is not None,
        "BLOCK": block,
        "BLOCK_D": block_d,
        "num_warps": 8 if held >= 8192 else 2 if block == 16 and block_d <= 32 else 4,
        "num_stages": 1,
    }
    scale = head_dim**-0.5
    numbers = (frames, pixels, sequences, chunk, num_heads, tiles, scale)
    found = [
        (
            query_kernel,
            (chunks * tiles * num_heads,),
            (*inputs, partial, rows, *numbers),
            {**constants, "WHOLE": tiles == 1},
        )
    ]
    if tiles > 1:
        numbers = (frames, pixels, num_heads, tiles, scale)
        grid = (sequences * tiles * num_heads,)
        found.append((key_kernel, grid, (*inputs, rows, *numbers), constants))
    if bias is not None:
        found.append(sum_arguments(partial, grad_bias))
    return found
