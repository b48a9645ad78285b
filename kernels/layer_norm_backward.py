"""The gradients of (x - μ) / √(σ² + ε) weight + bias                csrc/layer_norm_backward.h

grad, x: [R, C]; a program walks over a chunk of rows, of which it holds a few whole ones in
registers, in fp32, and leaves its part of the sums over rows. A second launch adds up the parts.
One read of grad and x, one write of grad_x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs
from .partial_sums import launch_arguments as sum_arguments

TILE = 2048  # elements that a program holds at least
MAX_CHANNELS = 16384
PROGRAMS = 512  # at most: each leaves two numbers a channel


@triton.jit(do_not_specialize=["rows", "chunk_rows"])
def layer_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,  # x_ptr where there is none
    out_ptr,
    partial_ptr,  # [program, 2, channel]
    rows,
    chunk_rows,
    eps,
    C: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    first = tl.program_id(0) * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < last)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / C
        centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / C
        inverse = (1.0 / tl.sqrt_rn(variance + eps))[:, None]
        # Rows beyond the end have no gradient, but may have infinite x̂ where eps is 0.
        normalised = tl.where(here, centred * inverse, 0.0)
        of_weight += tl.sum(grad * normalised, 0)
        of_bias += tl.sum(grad, 0)
        if WEIGHT:
            grad *= tl.load(weight_ptr + channel, mask=inside, other=0.0)[None, :]
        plain = (tl.sum(grad, 1) / C)[:, None]
        moment = (tl.sum(grad * normalised, 1) / C)[:, None]
        out = (grad - plain - normalised * moment) * inverse
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=here)
    entry = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * C) + channel
    tl.store(entry, of_weight, mask=inside)
    tl.store(entry + C, of_bias, mask=inside)


def launch(x: Tensor, *arguments) -> None:
    """Write the gradients into out and tables. The arguments are those of the op, checked."""
    for kernel, grid, values, constants in launches(x, *arguments):
        launch_kernel(kernel, grid, values, constants)


def launches(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, out: Tensor, tables: Tensor
) -> list[tuple]:
    """(kernel, grid, arguments, constants) of both launches."""
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(
            f"layer_norm_backward: backend='triton' takes C up to {MAX_CHANNELS}: {channels}"
        )
    rows = x.numel() // channels
    block = triton.next_power_of_2(channels)
    tile_rows = max(1, min(TILE // block, triton.next_power_of_2(rows)))
    chunk_rows = triton.cdiv(triton.cdiv(rows, tile_rows), PROGRAMS) * tile_rows
    programs = triton.cdiv(rows, chunk_rows)
    partial = torch.empty((programs, *tables.shape), dtype=torch.float32, device=x.device)
    constants = {
        "C": channels,
        "WEIGHT": weight is not None,
        "ROWS": tile_rows,
        "BLOCK": block,
        "num_warps": 4 if block <= TILE else 8 if block <= 4 * TILE else 16,
    }
    tensors = (grad, x, x if weight is None else weight, out, partial)
    values = (*tensors, rows, chunk_rows, float(eps))
    return [
        (layer_norm_backward_kernel, (programs,), values, constants),
        sum_arguments(partial, tables),
    ]
