"""x_i = input d_i, of residuals followed by 2 f_m            vfengine/ops/_generator_ops.py

z: [B, N, C, H, W] -> out: [copies * B*N, H/p, W/p, K], channels as F.pixel_unshuffle orders them,
then zeros. A program owns a tile of patches of one frame, with all their channels. The clip is read
once, its base frame from cache; rows are written once a copy. A step outside coeffs writes NaN.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs

TILE = 1024  # elements of out that a program owns, at least a row


@triton.jit
def coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, COLUMN: tl.constexpr):
    """A number of this step and frame; NaN where there is no such step."""
    step = tl.load(step_ptr)
    known = (step >= 0) & (step < num_steps)
    at = (step.to(tl.int64) * frames + frame) * 5 + COLUMN
    return tl.load(coeffs_ptr + at, mask=known, other=float("nan"))


@triton.jit
def pixel_of(patch, k, WIDTH: tl.constexpr, PATCH: tl.constexpr):
    """Where pixel k of a patch, counted on from patch to patch, lies in its image, by rows."""
    across: tl.constexpr = WIDTH // PATCH
    y = patch // across * PATCH + k // PATCH % PATCH
    return y * WIDTH + patch % across * PATCH + k % PATCH


@triton.jit(do_not_specialize=["num_steps", "frames", "images"])
def model_input_kernel(
    z_ptr,
    coeffs_ptr,
    step_ptr,
    out_ptr,
    num_steps,
    frames,
    images,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,  # constants, so that Triton sees which rows are aligned
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    K: tl.constexpr,
    CONDITIONED: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    folded: tl.constexpr = PATCH * PATCH
    pixels: tl.constexpr = HEIGHT * WIDTH
    patches: tl.constexpr = pixels // folded
    blocks: tl.constexpr = (patches + ROWS - 1) // ROWS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    frame = image % frames
    patch = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    inside = (patch < patches) & (k < K)

    unit = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, 0)
    scale = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frame, 1)
    at = k // folded % CHANNELS * pixels + pixel_of(patch, k, WIDTH, PATCH)
    own = inside & (k < CHANNELS * folded)
    size: tl.constexpr = CHANNELS * pixels
    x = tl.load(z_ptr + image * size + at, mask=own, other=0.0).to(tl.float32) * unit
    if CONDITIONED:
        m = image - frame + frames // 2
        seen = inside & (k < 2 * CHANNELS * folded)
        base = tl.load(z_ptr + m * size + at, mask=seen, other=0.0).to(tl.float32)
        base_unit = coefficient(coeffs_ptr, step_ptr, num_steps, frames, frames // 2, 0)
        base *= base_unit
        x = tl.where(own, (x - base) * scale, 2.0 * base)
    else:
        x *= scale
    y = x.to(out_ptr.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        row = (copy * images + image) * patches + patch
        tl.store(out_ptr + row * K + k, y, mask=inside)


def launch(z: Tensor, *arguments) -> None:
    """Write rows into out. The arguments are those of the op, checked; see `launch_arguments`."""
    grid, values, constants = launch_arguments(z, *arguments)
    launch_kernel(model_input_kernel, grid, values, constants)


def launch_arguments(
    z: Tensor, coeffs: Tensor, step: Tensor, conditioned: bool, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of model_input_kernel."""
    batch, frames, channels, height, width = z.shape
    patches, row = out.shape[1] * out.shape[2], out.shape[3]
    block = triton.next_power_of_2(row)
    rows = max(1, min(TILE // block, triton.next_power_of_2(patches)))
    constants = {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "PATCH": height // out.shape[1],
        "K": row,
        "CONDITIONED": conditioned,
        "COPIES": out.shape[0] // (batch * frames),
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": 4,
    }
    arguments = (z, coeffs, step, out, coeffs.shape[0], frames, batch * frames)
    return (batch * frames * triton.cdiv(patches, rows),), arguments, constants
