"""u_i <- c1 u_i + √λ_i g + √(1-λ_i) (c2 r_i + σ ξ_i), u_m <- d_p    csrc/path_step.h"""

from .frames import Rule
from .residual_step import weights

RULE = Rule(weights, columns=3, path=True)
