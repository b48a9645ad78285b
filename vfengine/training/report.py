"""What a step of any training tells: its losses, read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# the log shows losses by fifths of the schedule: early fifths are detail, late ones motion
TIME_BINS = 5


class StepReport:
    """One step's losses by name: the means, and, of a schedule, those of each fifth of it.

    A fifth without a sample is NaN. What a GPU still computes is waited for when it is read.
    """

    def __init__(
        self,
        losses: Mapping[str, Tensor | float],
        by_t: Mapping[str, Tensor | Sequence[float]] | None = None,
        step: int | None = None,
    ):
        self._losses, self._by_t, self._step = losses, by_t or {}, step

    @cached_property
    def losses(self) -> dict[str, float]:
        """Raises FloatingPointError if they are not finite."""
        losses = {name: float(loss) for name, loss in self._losses.items()}
        if not np.isfinite(sum(losses.values())):
            raise FloatingPointError(f"the loss is not finite at step {self._step}")
        return losses

    @cached_property
    def by_t(self) -> dict[str, list[float]]:
        return {name: [float(loss) for loss in losses] for name, losses in self._by_t.items()}

    def __repr__(self) -> str:
        return f"StepReport({self.losses}, {self.by_t})"


def sums_by_t(loss: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """Of each fifth of the schedule, the sum of losses and their number: [2, TIME_BINS].

    loss [B], t int64 [B] on any device; the sums are on the loss's
    """
    inside = (t * TIME_BINS // num_timesteps)[None] == torch.arange(
        TIME_BINS, dtype=torch.int64, device=t.device
    )[:, None]
    inside = inside.to(loss.device, loss.dtype, non_blocking=True)  # [TIME_BINS, B]
    return torch.stack([(inside * loss).sum(1), inside.sum(1)])
