"""Sums of what programs leave, in the order of the programs: no atomics."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import wait_for_inputs

BLOCK = 128  # of the sums
PARTS = 32  # that are added at a time


@triton.jit(do_not_specialize=["parts"])
def partial_sums_kernel(
    partial_ptr,
    out_ptr,
    parts,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & inside[None, :]
        at = part.to(tl.int64)[:, None] * SIZE + column[None, :]
        total += tl.load(partial_ptr + at, mask=here, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=inside)


def launch_arguments(
    partial: Tensor, out: Tensor
) -> tuple[triton.JITFunction, tuple[int], tuple, dict[str, object]]:
    """The kernel, grid, arguments and constants that write into out the sums over partial's first.

    partial: fp32 [parts, ...], out: fp32, as many as a part has
    """
    size = out.numel()
    constants = {"SIZE": size, "PARTS": PARTS, "BLOCK": BLOCK, "num_warps": 4}
    grid = (triton.cdiv(size, BLOCK),)
    return partial_sums_kernel, grid, (partial, out, len(partial)), constants
