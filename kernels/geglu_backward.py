"""The gradient of a gelu(b): grad gelu(b) and grad a gelu'(b)            csrc/geglu_backward.h

grad: [R, K], x: [R, 2K]; a program owns a tile of rows and columns. Computed in fp32; one read of
grad and x and one write of grad_x.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs

TILE = 1024  # elements of grad that a program owns


@triton.jit(do_not_specialize=["rows"])
def geglu_backward_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    rows,
    K: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (column < K)[None, :]
    row = row.to(tl.int64)[:, None]
    at = row * (2 * K) + column[None, :]
    grad = tl.load(grad_ptr + row * K + column[None, :], mask=here, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + K, mask=here, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = cdf + gate * (tl.exp(-0.5 * gate * gate) * 0.3989422804014327)
    tl.store(out_ptr + at, (grad * (gate * cdf)).to(out_ptr.dtype.element_ty), mask=here)
    tl.store(out_ptr + at + K, (grad * value * slope).to(out_ptr.dtype.element_ty), mask=here)


def launch(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Write grad_x into out."""
    grid, arguments, constants = launch_arguments(grad, x, out)
    launch_kernel(geglu_backward_kernel, grid, arguments, constants)


def launch_arguments(
    grad: Tensor, x: Tensor, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of geglu_backward_kernel."""
    width = grad.shape[-1]
    rows = grad.numel() // width
    block = min(TILE, triton.next_power_of_2(width))
    tile_rows = min(TILE // block, triton.next_power_of_2(rows))
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(width, block),)
    constants = {"K": width, "ROWS": tile_rows, "BLOCK": block, "num_warps": 4}
    return grid, (grad, x, out, rows), constants
