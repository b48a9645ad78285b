"""d_t = z - √(1-ᾱ_t) b, z <- c1 z + c2 b̃ + σ ξ_b, and both are kept           csrc/base_step.h

A program owns BLOCK pixels of one image. A step outside coeffs, or σ > 0 without noise, makes z
NaN; the first writes no states.
"""

import triton
import triton.language as tl
from torch import Tensor

from vfengine.ops._clock import Clock

from .clock import move_on
from .launch import launch_kernel, wait_for_inputs
from .noise import BASE_STREAM, draw, frames_grid, key_halves


@triton.jit(do_not_specialize=["num_steps", "batch", "sample", "k0", "k1"])
def base_step_kernel(
    z_ptr,
    b_ptr,
    mixed_ptr,
    states_ptr,
    noise_levels_ptr,
    coeffs_ptr,
    counter_ptr,
    ticket_ptr,
    timesteps_ptr,
    t_ptr,
    num_steps,
    batch,
    sample,
    k0,  # base key, low and high half
    k1,
    DRAWN: tl.constexpr,  # whether there is a seed to draw noise with
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first_pixel = tl.program_id(0) % blocks * BLOCK
    pixel = first_pixel + tl.arange(0, BLOCK)
    inside = pixel < PIXELS

    step = tl.load(counter_ptr)
    known = (step >= 0) & (step < num_steps)
    level = tl.load(noise_levels_ptr + step, mask=known, other=0.0)
    c1 = tl.load(coeffs_ptr + 3 * step, mask=known, other=float("nan"))
    c2 = tl.load(coeffs_ptr + 3 * step + 1, mask=known, other=0.0)
    sigma = tl.load(coeffs_ptr + 3 * step + 2, mask=known, other=0.0)
    if not DRAWN:
        c1 = tl.where(sigma == 0.0, c1, float("nan"))

    at = image * PIXELS + pixel
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    b = tl.load(b_ptr + at, mask=inside, other=0.0)
    mixed = tl.load(mixed_ptr + at, mask=inside, other=0.0)
    d = z + (-level) * b
    moved = c1 * z + c2 * mixed
    moved += (0.0 * c2) * mixed  # a frame's own estimate, as decomposed_step has it: λ = 1
    if DRAWN:
        if (sigma == 0.0) == 0:
            moved += sigma * draw(
                *(first_pixel, step * 0, sample + image.to(tl.int32), step + 1 + BASE_STREAM),
                *(k0, k1),
                BLOCK=BLOCK,
                WORDS=False,
            )
    kept = states_ptr + step.to(tl.int64) * batch * PIXELS + at
    tl.store(z_ptr + at, moved, mask=inside)
    tl.store(kept, d, mask=inside & known)
    tl.store(kept + batch.to(tl.int64) * PIXELS, moved, mask=inside & known)
    move_on(counter_ptr, ticket_ptr, timesteps_ptr, t_ptr, step, num_steps, batch)


def launch_base_step(*tensors_and_place: object) -> None:
    """Take the step; arguments as of `launch_arguments`, checked."""
    grid, arguments, constants = launch_arguments(*tensors_and_place)
    launch_kernel(base_step_kernel, grid, arguments, constants)


def launch_arguments(
    z: Tensor,
    b: Tensor,
    mixed: Tensor,
    states: Tensor,
    noise_levels: Tensor,
    coeffs: Tensor,
    clock: Clock,
    seed: int | None,
    sample_offset: int,
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of base_step_kernel."""
    batch, pixels = z.shape[0], z[0].numel()
    grid, _, constants = frames_grid(batch, 1, pixels)
    arguments = (z, b, mixed, states, noise_levels, coeffs, *clock, coeffs.shape[0], batch)
    arguments += (sample_offset, *key_halves(seed or 0))
    del constants["RUN"]
    return grid, arguments, {"DRAWN": seed is not None, **constants}
