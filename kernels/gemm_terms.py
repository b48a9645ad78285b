"""y + bias + shift + residual, for products of other libraries (vfengine/ops/implicit_gemm.py)

y, residual, out: [R, N], bias: fp32 [N], shift: fp32, a row for each `shift_rows` rows of y; a
program owns a tile. Sums in fp32; one read of y and residual, one write; y may be out.
"""

import triton
import triton.language as tl
from torch import Tensor

from vfengine.ops.implicit_gemm import Product

from .launch import launch_kernel, wait_for_inputs

ROWS, COLUMNS = 32, 64  # of a tile: 8 lanes of 16 bytes a row

_RUN_TIME = ["rows", "shift_rows", "shift_stride", "with_bias", "with_shift", "with_residual"]


@triton.jit(do_not_specialize=_RUN_TIME)
def add_terms_kernel(
    y_ptr,
    bias_ptr,  # y_ptr where there is none, as the two below
    shift_ptr,
    residual_ptr,
    out_ptr,
    N,
    rows,
    shift_rows,
    shift_stride,
    with_bias,
    with_shift,
    with_residual,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    wait_for_inputs()
    tiles = tl.cdiv(N, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    n_here = column < N
    here = (row < rows)[:, None] & n_here[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    sums = tl.load(y_ptr + at, mask=here, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=n_here & (with_bias != 0), other=0.0)
    shift_at = (row // shift_rows).to(tl.int64)[:, None] * shift_stride + column[None, :]
    shift = tl.load(shift_ptr + shift_at, mask=here & (with_shift != 0), other=0.0)
    residual = tl.load(residual_ptr + at, mask=here & (with_residual != 0), other=0.0)
    sums += bias.to(tl.float32)[None, :]
    sums += shift.to(tl.float32)
    sums += residual.to(tl.float32)
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=here)


def launch(product: Product, y: Tensor) -> None:
    """Write into product.out what follows the product y."""
    grid, arguments, constants = launch_arguments(product, y)
    launch_kernel(add_terms_kernel, grid, arguments, constants)


def launch_arguments(product: Product, y: Tensor) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of add_terms_kernel."""
    terms = product.bias, product.shift, product.residual
    shift, rows = product.shift, product.rows
    arguments = (
        y,
        *(y if term is None else term for term in terms),
        product.out,
        product.columns,
        rows,
        rows // (1 if shift is None else len(shift)),
        0 if shift is None else shift.stride(0),
        *(int(term is not None) for term in terms),
    )
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(product.columns, COLUMNS),)
    return grid, arguments, {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
