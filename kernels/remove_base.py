"""z'_i <- z_i - √λ_i √(1-ᾱ_t) b    csrc/remove_base.h, kernels/frames.py"""

import triton
import triton.language as tl

from .frames import Rule


@triton.jit
def weights(level, _c1, _sigma, lam):
    # level NaN, where there is no such step, makes everything NaN.
    return 1.0, -(tl.sqrt_rn(lam) * level), 0.0, 0.0, 0.0


RULE = Rule(weights, columns=1, residual=False)
