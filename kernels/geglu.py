"""y = x₁ gelu(x₂), gelu(v) = v/2 (1 + erf(v/√2))                                    csrc/geglu.h

x: [R, 2K], y: [R, K]; a program owns a tile of rows and columns. Computed in fp32; one read of x
and one write of y.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs

TILE = 1024  # elements of y that a program owns


@triton.jit(do_not_specialize=["rows"])
def geglu_kernel(
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
    value = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + K, mask=here, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out_ptr + row * K + column[None, :], y.to(out_ptr.dtype.element_ty), mask=here)


def launch(x: Tensor, out: Tensor) -> None:
    """Write y into out."""
    grid, arguments, constants = launch_arguments(x, out)
    launch_kernel(geglu_kernel, grid, arguments, constants)


def launch_arguments(x: Tensor, out: Tensor) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of geglu_kernel."""
    width = out.shape[-1]
    rows = out.numel() // width
    block = min(TILE, triton.next_power_of_2(width))
    tile_rows = min(TILE // block, triton.next_power_of_2(rows))
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(width, block),)
    return grid, (x, out, rows), {"K": width, "ROWS": tile_rows, "BLOCK": block, "num_warps": 4}
