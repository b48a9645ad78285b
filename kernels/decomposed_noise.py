"""b or r_i ~ N(0, I), straight from the counter                                  kernels/noise.py

A program owns BLOCK pixels of one clip and walks over RUN frames. One write of the clip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs
from .noise import BASE_STREAM, RESIDUAL_STREAM, draw, frames_grid, key_halves

# Integers that may take any value: a variant compiled for 1, or for multiples of 16, gains nothing.
NUMBERS = ["frames", "runs", "step", "sample", "frame", "k0", "k1"]


@triton.jit(do_not_specialize=NUMBERS)
def noise_kernel(
    out_ptr,
    frames,
    runs,
    step,
    sample,
    frame,
    k0,  # key, low and high half
    k1,
    PIXELS: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    BASE: tl.constexpr,  # base noise, else residual noise
    WORDS: tl.constexpr,
):
    wait_for_inputs()
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // blocks
    first_pixel = tl.program_id(0) % blocks * BLOCK
    pixel = first_pixel + tl.arange(0, BLOCK)
    clip = tile // runs
    first = tile % runs * RUN
    inside = pixel < PIXELS
    sample = sample + clip
    if BASE:
        b = draw(first_pixel, step * 0, sample, step + BASE_STREAM, k0, k1, BLOCK, WORDS)
    for k in range(RUN):
        n = first + k
        if BASE:
            x = b
        else:
            x = draw(first_pixel, frame + n, sample, step + RESIDUAL_STREAM, k0, k1, BLOCK, WORDS)
        at = (clip.to(tl.int64) * frames + n) * PIXELS + pixel
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside & (n < frames))


def launch(out: Tensor, seed: int, **options) -> None:
    """Fill out [B, N, P]; the rest are those of `launch_arguments`."""
    grid, arguments, constants = launch_arguments(out, seed, **options)
    launch_kernel(noise_kernel, grid, arguments, constants)


def launch_arguments(
    out: Tensor,
    seed: int,
    *,
    base: bool,
    step: int,
    sample_offset: int,
    frame_offset: int,
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of noise_kernel. base: base noise, else residual noise."""
    batch, frames, pixels = out.shape
    grid, runs, tiling = frames_grid(batch, frames, pixels)
    arguments = (out, frames, runs, step, sample_offset, frame_offset, *key_halves(seed))
    return grid, arguments, {"BASE": base, "WORDS": out.dtype == torch.int32, **tiling}
