"""out_i = √λ_i b + √(1-λ_i) r_i, b and r_i ~ N(0, I) straight from the counter    kernels/noise.py

A program owns BLOCK pixels of one clip, draws b there once, and walks over RUN frames. One write of
the clip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import BASE_STREAM, RESIDUAL_STREAM, check_pixels, draw, key_halves

BLOCK = 1024
MAX_RUN = 8
# Integers that may take any value: a variant compiled for 1, or for multiples of 16, gains nothing.
NUMBERS = ["frames", "runs", "step", "sample", "frame", "k0", "k1", "k2", "k3"]


@triton.jit(do_not_specialize=NUMBERS)
def noise_kernel(
    out_ptr,
    lam_ptr,  # out_ptr where there is no lam
    frames,
    runs,
    step,
    sample,
    frame,
    k0,  # base key, low and high half
    k1,
    k2,  # residual key
    k3,
    PIXELS: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,  # "base", "residual" or "combined"
    WORDS: tl.constexpr,
):
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // blocks
    first_pixel = tl.program_id(0) % blocks * BLOCK
    pixel = first_pixel + tl.arange(0, BLOCK)
    clip = tile // runs
    first = tile % runs * RUN
    inside = pixel < PIXELS
    sample = sample + clip
    if PART != "residual":
        b = draw(first_pixel, step * 0, sample, step + BASE_STREAM, k0, k1, BLOCK, WORDS)
    for k in range(RUN):
        n = first + k
        if PART == "base":
            x = b
        else:
            x = draw(first_pixel, frame + n, sample, step + RESIDUAL_STREAM, k2, k3, BLOCK, WORDS)
        if PART == "combined":
            lam = tl.load(lam_ptr + n, mask=n < frames, other=0.0)
            x = tl.sqrt_rn(lam) * b + tl.sqrt_rn(1.0 - lam) * x
        at = (clip.to(tl.int64) * frames + n) * PIXELS + pixel
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside & (n < frames))


def launch(out: Tensor, *seeds_and_lam, **place) -> None:
    """Fill out [B, N, P]; the rest are those of `launch_arguments`."""
    grid, arguments, constants = launch_arguments(out, *seeds_and_lam, **place)
    with torch.cuda.device_of(out):
        noise_kernel[grid](*arguments, **constants)


def launch_arguments(
    out: Tensor,
    base_seed: int,
    residual_seed: int,
    lam: Tensor | None,
    *,
    base: bool,
    step: int,
    sample_offset: int,
    frame_offset: int,
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of noise_kernel.

    lam: combine both; None: base noise where `base`, else residual noise
    """
    batch, frames, pixels = out.shape
    check_pixels(pixels)
    run = min(MAX_RUN, triton.next_power_of_2(frames))
    runs = triton.cdiv(frames, run)
    arguments = (out, out if lam is None else lam, frames, runs, step, sample_offset, frame_offset)
    arguments += (*key_halves(base_seed), *key_halves(residual_seed))
    constants = {
        "PIXELS": pixels,
        "RUN": run,
        "BLOCK": BLOCK,
        "PART": "combined" if lam is not None else "base" if base else "residual",
        "WORDS": out.dtype == torch.int32,
        "num_warps": 4,
        "enable_fp_fusion": False,  # the same bits as the C++ kernels
    }
    return (triton.cdiv(pixels, BLOCK) * batch * runs,), arguments, constants
