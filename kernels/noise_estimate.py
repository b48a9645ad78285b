"""ε_i = gain (d_i - signal x̂_i), x̂_i a blend             vfengine/ops/_generator_ops.py

z, out: [B, N, C, H, W], rows: fp32 [copies * B*N, H/p, W/p, K p²], channels as F.pixel_shuffle
takes them. A program owns a run of pixels of one frame, patch by patch, with all their channels.
Rows and clip are read once, the base frame from cache. A step outside coeffs writes NaN.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs
from .model_input import coefficient, pixel_of

MANY = 1 << 18  # pixels of a batch from which a thread takes 4: fewer would not occupy a GPU


@triton.jit
def weight(rows_ptr, at, inside, CHANNEL: tl.constexpr, FOLDED: tl.constexpr):
    """The logit of a blend at these pixels."""
    return tl.load(rows_ptr + at + CHANNEL * FOLDED, mask=inside, other=0.0)


@triton.jit
def shares(rows_ptr, at, inside, C: tl.constexpr, FOLDED: tl.constexpr, WEIGHTS: tl.constexpr):
    """The shares of the frame and of the paint in the clean estimate."""
    if WEIGHTS == 1:
        seen = 1.0 / (1.0 + tl.exp(-weight(rows_ptr, at, inside, C, FOLDED)))
        return seen, 1.0 - seen
    else:
        still = weight(rows_ptr, at, inside, C, FOLDED)
        seen = weight(rows_ptr, at, inside, C + 1, FOLDED)
        painted = weight(rows_ptr, at, inside, C + 2, FOLDED)
        top = tl.maximum(tl.maximum(still, seen), painted)
        seen, painted = tl.exp(seen - top), tl.exp(painted - top)
        total = tl.exp(still - top) + seen + painted
        return seen / total, painted / total


@triton.jit(do_not_specialize=["num_steps", "frames", "images"])
def noise_estimate_kernel(
    z_ptr,
    rows_ptr,
    coeffs_ptr,
    step_ptr,
    out_ptr,
    guidance_scale,
    num_steps,
    frames,
    images,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,  # constants, so that Triton sees which rows are aligned
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    WEIGHTS: tl.constexpr,  # channels of rows beside the paint
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    folded: tl.constexpr = PATCH * PATCH
    pixels: tl.constexpr = HEIGHT * WIDTH
    blocks: tl.constexpr = (pixels + BLOCK - 1) // BLOCK
    K: tl.constexpr = (CHANNELS + WEIGHTS) * folded
    size: tl.constexpr = pixels // folded * K
    image = (tl.program_id(0) // blocks).to(tl.int64)
    frame = image % frames
    m = frames // 2
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    patch = index // folded
    at = pixel_of(patch, index, WIDTH, PATCH)
    row = image * size + patch * K + index % folded
    unconditional = (image + images) * size + patch * K + index % folded

    unit = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, 0)
    shrink = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, 2)
    signal = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, 3)
    gain = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, 4)
    base_unit = unit
    if WEIGHTS == 3:
        base_unit = coefficient(coeffs_ptr, step_ptr, num_steps, frames, m, 0)
    seen, painted = 0.0, 0.0
    seen_u, painted_u = 0.0, 0.0
    if WEIGHTS > 0:
        seen, painted = shares(rows_ptr, row, inside, CHANNELS, folded, WEIGHTS)
        if GUIDED:
            seen_u, painted_u = shares(rows_ptr, unconditional, inside, CHANNELS, folded, WEIGHTS)
    for c in tl.static_range(CHANNELS):
        plane = image * CHANNELS + c
        d = tl.load(z_ptr + plane * pixels + at, mask=inside, other=0.0).to(tl.float32) * unit
        base = 0.0
        if WEIGHTS == 3:
            base_plane = (image - frame + m) * CHANNELS + c
            base = tl.load(z_ptr + base_plane * pixels + at, mask=inside, other=0.0)
            base = base.to(tl.float32) * base_unit
            d -= base
        paint = tl.load(rows_ptr + row + c * folded, mask=inside, other=0.0)
        eps = estimate(d, base, paint, seen, painted, shrink, signal, gain, WEIGHTS)
        if GUIDED:
            paint = tl.load(rows_ptr + unconditional + c * folded, mask=inside, other=0.0)
            eps_u = estimate(d, base, paint, seen_u, painted_u, shrink, signal, gain, WEIGHTS)
            eps = eps_u + guidance_scale * (eps - eps_u)
        if WEIGHTS == 3:
            known = gain == gain  # a step outside coeffs stays NaN
            eps = tl.where((frame == m) & known, 0.0, eps)
        tl.store(out_ptr + plane * pixels + at, eps.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def estimate(d, base, paint, seen, painted, shrink, signal, gain, WEIGHTS: tl.constexpr):
    """ε from the clean image's parts, or from what the UNet predicts."""
    if WEIGHTS == 0:
        return gain * d + signal * paint
    else:
        clean = seen * (shrink * d) + painted * (paint - base)
        return gain * (d - signal * clean)


def launch(z: Tensor, *arguments) -> None:
    """Write ε into out. The arguments are those of the op, checked; see `launch_arguments`."""
    grid, values, constants = launch_arguments(z, *arguments)
    launch_kernel(noise_estimate_kernel, grid, values, constants)


def launch_arguments(
    z: Tensor, rows: Tensor, coeffs: Tensor, step: Tensor, guidance_scale: float, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of noise_estimate_kernel."""
    batch, frames, channels, height, width = z.shape
    images, pixels, patch = batch * frames, height * width, height // rows.shape[1]
    block = 512 if images * pixels >= MANY else 128
    constants = {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "PATCH": patch,
        "WEIGHTS": rows.shape[-1] // patch**2 - channels,
        "GUIDED": rows.shape[0] > images,
        "BLOCK": block,
        "num_warps": 4,
    }
    arguments = (z, rows, coeffs, step, out, float(guidance_scale))
    arguments += (coeffs.shape[0], frames, images)
    return (images * triton.cdiv(pixels, block),), arguments, constants
