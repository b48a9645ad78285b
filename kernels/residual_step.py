"""u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i)    csrc/residual_step.h, kernels/frames.py"""

import triton
import triton.language as tl

from .frames import Rule


@triton.jit
def weights(c1, c2, sigma, lam):
    own = tl.sqrt_rn(1.0 - lam)
    return c1, tl.sqrt_rn(lam), 0.0, own * c2, own * sigma


RULE = Rule(weights, columns=3)
