"""One pass over the clip for the ops that treat every frame alike              csrc/common/frames.h

    out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise ξ_i

x, r: [B, N, P], P = C*H*W; g, b: [B, P]; sums in fp32. A rule, one a file, says what w is.
A program owns BLOCK pixels of one clip, reads g and draws b there once, and walks over RUN frames.
The clip moves through memory once. step, coeffs and lam are read on the device. A step outside
coeffs, λ outside [0, 1], or σ > 0 without noise writes NaN.

A rule with `path` computes g = d_p - c1 d_t of two rows of the base path, writes the base frame as
it is there, and moves the clock on (csrc/path_step.h).
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vfengine.ops._clock import Clock

from .clock import move_on
from .launch import launch_kernel, wait_for_inputs
from .noise import BASE_STREAM, RESIDUAL_STREAM, draw, frames_grid, key_halves

# Integers that may take any value: a variant compiled for 1, or for multiples of 16, gains nothing.
NUMBERS = ["num_steps", "frames", "runs", "sample", "frame", "k0", "k1", "k2", "k3"]
NUMBERS += ["base_frame", "path_batch", "samples"]


@dataclass(frozen=True)
class Rule:
    """weights: Triton function (row of coeffs, padded to 3 with zeros; λ_i) -> the five weights."""

    weights: triton.JITFunction
    columns: int
    residual: bool = True
    base_noise: bool = False
    path: bool = False


@dataclass(frozen=True)
class BasePath:
    """What a rule with `path` takes; fields as of ops.path_step."""

    clock: Clock
    states: Tensor | None
    c1: Tensor | None
    base_frame: int


@triton.jit(do_not_specialize=NUMBERS)
def frames_kernel(
    x_ptr,
    g_ptr,
    r_ptr,  # x_ptr where there is no residual, and likewise the next
    r_uncond_ptr,
    lam_ptr,
    coeffs_ptr,
    step_ptr,
    out_ptr,
    guidance_scale,
    num_steps,
    frames,
    runs,
    sample,
    frame,
    k0,  # base key, low and high half
    k1,
    k2,  # residual key
    k3,
    states_ptr,  # of the base path; x_ptr where there is none, and likewise the next five
    c1_ptr,
    ticket_ptr,
    timesteps_ptr,
    t_ptr,
    base_frame,
    path_batch,
    samples,
    WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BASE_NOISE: tl.constexpr,
    GUIDED: tl.constexpr,
    DRAWN: tl.constexpr,  # whether there are seeds to draw noise with
    CLOCK: tl.constexpr,  # whether the launch moves the clock on
    PATH: tl.constexpr,  # whether there is a base path
    MOVING: tl.constexpr,  # and whether g is other than 0 on it
    PIXELS: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // blocks
    first_pixel = tl.program_id(0) % blocks * BLOCK
    pixel = first_pixel + tl.arange(0, BLOCK)
    clip = (tile // runs).to(tl.int64)
    first = tile % runs * RUN
    inside = pixel < PIXELS

    step = tl.load(step_ptr)
    known = (step >= 0) & (step < num_steps)
    c0 = tl.load(coeffs_ptr + COLUMNS * step, mask=known, other=float("nan"))
    c1 = 0.0
    sigma = 0.0
    if COLUMNS == 3:
        c1 = tl.load(coeffs_ptr + 3 * step + 1, mask=known, other=0.0)
        sigma = tl.load(coeffs_ptr + 3 * step + 2, mask=known, other=0.0)
        if not DRAWN:
            c0 = tl.where(sigma == 0.0, c0, float("nan"))
    noisy = (sigma == 0.0) == 0  # true of NaN too; the interpreter mixes no float != with masks

    if CLOCK:
        g = tl.zeros([BLOCK], tl.float32)
        if PATH:
            row = path_batch * step.to(tl.int64) + (clip if path_batch > 1 else clip * 0)
            here = inside & known
            to = tl.load(states_ptr + (row + path_batch) * PIXELS + pixel, mask=here, other=0.0)
            if MOVING:  # a small difference, hence float64
                start = tl.load(states_ptr + row * PIXELS + pixel, mask=here, other=0.0)
                ratio = tl.load(c1_ptr + step, mask=known, other=0.0)
                g = to.to(tl.float64) - ratio * start.to(tl.float64)
                g = g.to(tl.float32).to(out_ptr.dtype.element_ty).to(tl.float32)
    else:
        g = tl.load(g_ptr + clip * PIXELS + pixel, mask=inside, other=0.0).to(tl.float32)
    if DRAWN:
        at_sample = sample + clip.to(tl.int32)
        counter_step = step + 1
        if BASE_NOISE:
            base_noise = draw(
                *(first_pixel, step * 0, at_sample, counter_step + BASE_STREAM, k0, k1),
                BLOCK=BLOCK,
                WORDS=False,
            )
    for k in range(RUN):
        n = first + k
        here = inside & (n < frames)
        lam = tl.load(lam_ptr + n, mask=n < frames, other=0.0)
        lam = tl.where((lam >= 0.0) & (lam <= 1.0), lam, float("nan"))
        w_x, w_base, w_base_noise, w_residual, w_noise = WEIGHTS(c0, c1, sigma, lam)
        at = (clip * frames + n) * PIXELS + pixel
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        total = w_x * x + w_base * g
        if RESIDUAL:
            r = tl.load(r_ptr + at, mask=here, other=0.0).to(tl.float32)
            if GUIDED:
                r_uncond = tl.load(r_uncond_ptr + at, mask=here, other=0.0).to(tl.float32)
                r = r_uncond + guidance_scale * (r - r_uncond)
            total += w_residual * r
            if DRAWN:
                if noisy:
                    if BASE_NOISE:
                        total += w_base_noise * base_noise
                    total += w_noise * draw(
                        *(
                            first_pixel,
                            frame + n,
                            at_sample,
                            counter_step + RESIDUAL_STREAM,
                            k2,
                            k3,
                        ),
                        BLOCK=BLOCK,
                        WORDS=False,
                    )
        if PATH:
            total = tl.where(known & (n == base_frame), to, total)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=here)
    if CLOCK:
        move_on(step_ptr, ticket_ptr, timesteps_ptr, t_ptr, step, num_steps, samples)


def launch_frames(rule: Rule, **options) -> None:
    """Write the rule's result into out, which may be x. options: of `launch_arguments`, checked."""
    grid, arguments, constants = launch_arguments(rule, **options)
    launch_kernel(frames_kernel, grid, arguments, constants)


def launch_arguments(
    rule: Rule,
    *,
    x: Tensor,
    g: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    out: Tensor,
    r: Tensor | None = None,
    r_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    base_seed: int | None = None,
    residual_seed: int | None = None,
    sample_offset: int = 0,
    frame_offset: int = 0,
    path: BasePath | None = None,
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of frames_kernel. Seeds, where there are any, draw ξ."""
    batch, frames = x.shape[:2]
    pixels = x.numel() // (batch * frames)
    grid, runs, tiling = frames_grid(batch, frames, pixels)
    given = (x, g, x if r is None else r, x if r_uncond is None else r_uncond)
    arguments = (*given, lam, coeffs, step, out, float(guidance_scale))
    arguments += (coeffs.shape[0], frames, runs, sample_offset, frame_offset)
    arguments += (*key_halves(base_seed or 0), *key_halves(residual_seed or 0))
    states = c1 = None
    clock, base_frame = (x, x, x), 0
    if path is not None:
        states, c1, base_frame, clock = path.states, path.c1, path.base_frame, path.clock[1:]
    arguments += (x if states is None else states, x if c1 is None else c1, *clock, base_frame)
    arguments += (1 if states is None else states.shape[1], batch)
    constants = {
        "WEIGHTS": rule.weights,
        "COLUMNS": rule.columns,
        "RESIDUAL": rule.residual,
        "BASE_NOISE": rule.base_noise,
        "GUIDED": r_uncond is not None,
        "DRAWN": base_seed is not None or residual_seed is not None,
        "CLOCK": rule.path,
        "PATH": states is not None,
        "MOVING": c1 is not None,
        **tiling,
    }
    return grid, arguments, constants
