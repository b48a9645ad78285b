"""Which step of a sampling loop is the next, on the device                  csrc/common/clock.h"""

from typing import NamedTuple

import torch
from torch import Tensor

from vfengine.ops._dispatch import address, check_tensor, native


class Clock(NamedTuple):
    """A counter that the launch which takes a step reads, and moves on.

    counter:   int32 [1], steps done
    ticket:    int32 [1], 0 between launches: how many blocks of a running one have read the counter
    timesteps: int64 [S], of the solver's table
    t:         int64 [B], timesteps[counter] for every sample; the last step leaves it as it is
    """

    counter: Tensor
    ticket: Tensor
    timesteps: Tensor
    t: Tensor

    def rewind(self) -> None:
        """Back to the first step."""
        self.counter.zero_()
        self.ticket.zero_()
        self.t.copy_(self.timesteps[:1].expand_as(self.t))

    def move_on(self) -> None:
        """Counts a step, as ops of PyTorch."""
        self.counter.add_(1)
        row = self.counter.clamp(max=len(self.timesteps) - 1)
        self.t.copy_(self.timesteps.index_select(0, row).expand_as(self.t))

    def check(self, op: str, samples: int, device: torch.device) -> None:
        """Raise unless dtypes, shapes, strides and devices fit."""
        steps = self.timesteps.shape[0] if self.timesteps.ndim else 0
        for name, tensor, shape, dtype in (
            ("counter", self.counter, (1,), torch.int32),
            ("ticket", self.ticket, (1,), torch.int32),
            ("timesteps", self.timesteps, (steps,), torch.int64),
            ("t", self.t, (samples,), torch.int64),
        ):
            check_tensor(op, name, tensor, shape, dtype, device)

    def args(self) -> object:
        """The struct of csrc/common/clock.h."""
        return native().Clock(
            counter=address(self.counter),
            ticket=address(self.ticket),
            timesteps=address(self.timesteps),
            t=address(self.t),
            num_steps=len(self.timesteps),
            samples=len(self.t),
        )


def check_clock(op: str, clock: Clock) -> None:
    """Raise TypeError unless it is one."""
    if not isinstance(clock, Clock):
        raise TypeError(f"{op}: clock must be a Clock, got {type(clock).__name__}")
