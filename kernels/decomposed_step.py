"""z_i <- c1 z_i + c2 (√λ_i b + √(1-λ_i) r_i) + σ (√λ_i ξ_b + √(1-λ_i) ξ_i)

csrc/decomposed_step.h, kernels/frames.py
"""

import triton
import triton.language as tl

from .frames import Rule


@triton.jit
def weights(c1, c2, sigma, lam):
    shared = tl.sqrt_rn(lam)
    own = tl.sqrt_rn(1.0 - lam)
    return c1, shared * c2, shared * sigma, own * c2, own * sigma


RULE = Rule(weights, columns=3, base_noise=True)
