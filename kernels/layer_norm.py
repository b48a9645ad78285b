"""y = (x - μ) / √(σ² + ε) weight + bias of every row                       csrc/layer_norm.h

x: [R, C]; a program holds whole rows in registers, in fp32: two sums, of x and of centred squares.
One read and one write of x; weight and bias stay in cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs

TILE = 2048  # elements that a program holds at least
MAX_CHANNELS = 16384


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x_ptr,
    weight_ptr,  # x_ptr where there is none
    bias_ptr,
    out_ptr,
    rows,
    eps,
    C: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    here = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / C
    y = centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    if WEIGHT:
        y *= tl.load(weight_ptr + channel, mask=inside, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=here)


def launch(x: Tensor, *arguments) -> None:
    """Write y into out. The arguments are those of the op, checked; see `launch_arguments`."""
    grid, values, constants = launch_arguments(x, *arguments)
    launch_kernel(layer_norm_kernel, grid, values, constants)


def launch_arguments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of layer_norm_kernel."""
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"layer_norm: backend='triton' takes C up to {MAX_CHANNELS}: {channels}")
    rows = x.numel() // channels
    block = triton.next_power_of_2(channels)
    tile_rows = max(1, min(TILE // block, triton.next_power_of_2(rows)))
    constants = {
        "C": channels,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ROWS": tile_rows,
        "BLOCK": block,
        "num_warps": 4 if block <= TILE else 8,
    }
    tensors = (x if t is None else t for t in (x, weight, bias, out))
    return (triton.cdiv(rows, tile_rows),), (*tensors, rows, float(eps)), constants
