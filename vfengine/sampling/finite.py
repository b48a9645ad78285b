"""Numbers that are not finite: found once they are made, and named with what made them."""

from __future__ import annotations

import torch
from torch import Tensor

_LIMIT = "float16 holds no number above 65504: try bfloat16 or float32"
_OTHERS = "try float32 or a smaller guidance_scale; damaged weights make such numbers too"


class NotFinite(RuntimeError, FloatingPointError):
    """A network, or a solver's step, has made NaN or infinity."""

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        """what: phase and step, as in "residual phase, step 3 of 50"; dtype: of the networks."""
        name = str(dtype).removeprefix("torch.")
        hint = _LIMIT if dtype == torch.float16 else _OTHERS
        super().__init__(f"{what}: the numbers are not finite (NaN or infinity) in {name}; {hint}")


def is_finite(x: Tensor) -> bool:
    """Whether all numbers of x, not empty, are; without a copy of x. Waits for x's device."""
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


def check_finite(x: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """x [B, …] itself, not empty; `NotFinite` where a number is not."""
    if not is_finite(x):
        raise NotFinite(what, dtype)
    return x


def check_given(**given: Tensor) -> None:
    """ValueError for a tensor that a caller gave, by name, and that is not finite."""
    for name, x in given.items():
        if x.numel() and not is_finite(x):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
