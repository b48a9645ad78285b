"""u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i)                      csrc/residual_step.h

u, r: [B, N, P], g: [B, P], lam: [N] fp32. Sums in fp32. A program owns BLOCK pixels of one clip,
reads g there once and walks over RUN frames. 2 reads + 1 write of the clip.
step, coeffs and lam are read on the device. A step outside coeffs, or σ > 0 without ξ, writes NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MAX_RUN = 8


@triton.jit
def residual_step_kernel(
    u_ptr,
    r_ptr,
    g_ptr,
    r_uncond_ptr,  # u_ptr where HAS_UNCOND is false
    xi_ptr,  # u_ptr where HAS_XI is false
    lam_ptr,
    coeffs_ptr,
    step_ptr,
    out_ptr,
    guidance_scale,
    num_steps,
    frames,
    PIXELS: tl.constexpr,  # a constant, so that Triton sees which rows are aligned
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_XI: tl.constexpr,
):
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    runs = tl.cdiv(frames, RUN)
    tile = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    clip = (tile // runs).to(tl.int64)
    first = tile % runs * RUN
    inside = pixel < PIXELS

    step = tl.load(step_ptr)
    known = (step >= 0) & (step < num_steps)
    c1 = tl.load(coeffs_ptr + 3 * step, mask=known, other=float("nan"))
    c2 = tl.load(coeffs_ptr + 3 * step + 1, mask=known, other=float("nan"))
    sigma = tl.load(coeffs_ptr + 3 * step + 2, mask=known, other=0.0)
    noisy = (sigma == 0.0) == 0  # true of NaN too; the interpreter has no float !=
    if not HAS_XI:
        c1 = tl.where(noisy, float("nan"), c1)

    g = tl.load(g_ptr + clip * PIXELS + pixel, mask=inside, other=0.0).to(tl.float32)
    for k in range(RUN):
        n = first + k
        here = inside & (n < frames)
        lam = tl.load(lam_ptr + n, mask=n < frames, other=0.0)
        at = (clip * frames + n) * PIXELS + pixel
        u = tl.load(u_ptr + at, mask=here, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + at, mask=here, other=0.0).to(tl.float32)
        if HAS_UNCOND:
            r_uncond = tl.load(r_uncond_ptr + at, mask=here, other=0.0).to(tl.float32)
            r = r_uncond + guidance_scale * (r - r_uncond)
        residual = c2 * r
        if HAS_XI:
            xi = tl.load(xi_ptr + at, mask=here & noisy, other=0.0).to(tl.float32)
            residual += sigma * xi
        x = c1 * u + tl.sqrt(lam) * g + tl.sqrt(1.0 - lam) * residual
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=here)


def launch(
    u: Tensor,
    r: Tensor,
    g: Tensor,
    lam: Tensor,
    coeffs: Tensor,
    step: Tensor,
    r_uncond: Tensor | None,
    xi: Tensor | None,
    guidance_scale: float,
    out: Tensor,
) -> None:
    """Write the step of u into out (which may be u). The arguments are those of the op, checked."""
    batch, frames = u.shape[:2]
    pixels = u.numel() // (batch * frames)
    run = min(MAX_RUN, triton.next_power_of_2(frames))
    grid = (triton.cdiv(pixels, BLOCK) * batch * triton.cdiv(frames, run),)
    with torch.cuda.device_of(u):
        residual_step_kernel[grid](
            u,
            r,
            g,
            u if r_uncond is None else r_uncond,
            u if xi is None else xi,
            lam,
            coeffs,
            step,
            out,
            float(guidance_scale),
            coeffs.shape[0],
            frames,
            PIXELS=pixels,
            RUN=run,
            BLOCK=BLOCK,
            HAS_UNCOND=r_uncond is not None,
            HAS_XI=xi is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
