"""One pass over the clip for the ops that treat every frame alike              csrc/common/frames.h

    out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise ξ_i

x, r: [B, N, P], P = C*H*W; g, b: [B, P]; sums in fp32. A rule, one a file, says what w is.
A program owns BLOCK pixels of one clip, reads g and draws b there once, and walks over RUN frames.
The clip moves through memory once. step, coeffs and lam are read on the device. A step outside
coeffs, λ outside [0, 1], or σ > 0 without noise writes NaN.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel, wait_for_inputs
from .noise import BASE_STREAM, RESIDUAL_STREAM, draw, frames_grid, key_halves

# Integers that may take any value: a variant compiled for 1, or for multiples of 16, gains nothing.
NUMBERS = ["num_steps", "frames", "runs", "sample", "frame", "k0", "k1", "k2", "k3"]


@dataclass(frozen=True)
class Rule:
    """weights: Triton function (row of coeffs, padded to 3 with zeros; λ_i) -> the five weights."""

    weights: triton.JITFunction
    columns: int
    residual: bool = True
    base_noise: bool = False


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
    WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BASE_NOISE: tl.constexpr,
    GUIDED: tl.constexpr,
    DRAWN: tl.constexpr,  # whether there are seeds to draw noise with
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
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=here)


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
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of frames_kernel. Seeds, where there are any, draw ξ."""
    batch, frames = x.shape[:2]
    pixels = x.numel() // (batch * frames)
    grid, runs, tiling = frames_grid(batch, frames, pixels)
    given = (x, g, x if r is None else r, x if r_uncond is None else r_uncond)
    arguments = (*given, lam, coeffs, step, out, float(guidance_scale))
    arguments += (coeffs.shape[0], frames, runs, sample_offset, frame_offset)
    arguments += (*key_halves(base_seed or 0), *key_halves(residual_seed or 0))
    constants = {
        "WEIGHTS": rule.weights,
        "COLUMNS": rule.columns,
        "RESIDUAL": rule.residual,
        "BASE_NOISE": rule.base_noise,
        "GUIDED": r_uncond is not None,
        "DRAWN": base_seed is not None or residual_seed is not None,
        **tiling,
    }
    return grid, arguments, constants
