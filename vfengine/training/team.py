"""The processes that train one model together, and how a step is computed. Imports no torch.

`Team` is one process on its own. `distributed.Processes` are those of torchrun, with the same
surface. Each of them calls every method, in the same order, and trains on its own rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .options import TrainingOptions

T = TypeVar("T")


class FailedElsewhere(RuntimeError):
    """Another process has failed, and tells why; status: the exit status that it comes to."""

    def __init__(self, status: int) -> None:
        super().__init__("another process of this training has failed")
        self.status = status


class Lost(RuntimeError):
    """A process that this one waited for is gone, or does not answer."""


class Team:
    """One process. What is agreed is its own word, and what is gathered is its own.

    run:       names the torchrun that started it; None: none did
    restarted: whether torchrun has started it anew, after a failure
    """

    rank, size, failed = 0, 1, False

    def __init__(self, run: str | None = None, restarted: bool = False) -> None:
        self.run, self.restarted = run, restarted

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and tells of progress."""
        return self.rank == 0

    def open(self) -> None:
        """Finds the others."""

    def close(self) -> None:
        """Parts from them; not where one of them may be gone."""

    def speaks(self) -> bool:
        """Whether this process is the one that tells how the command failed: the first to ask."""
        return True

    def device(self, name: str) -> str:
        """The device of this process, of what --device says."""
        return name

    # -- words ---------------------------------------------------------------------------------

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it has returned everywhere.

        Where it fails in one process, all fail: that one with its error, others FailedElsewhere.
        """
        return work()

    def of_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, which alone does it; failures as `agreed`."""
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` in the first process, then in the others: they find the files that it made."""
        return work()

    def largest(self, value: int) -> int:
        return value

    # -- tensors -------------------------------------------------------------------------------

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return values

    def noticing(self) -> AbstractContextManager[Any]:
        """Where a process is found to be gone, Lost is raised."""
        return nullcontext()

    def reducing(self, losses: nn.Module) -> nn.Module:
        """The module, whose gradients are then means over all processes."""
        return losses

    def postponed(self, losses: nn.Module) -> AbstractContextManager[Any]:
        """Forward and backward of the module whose gradients stay here, to be added to."""
        return nullcontext()

    def shard(self, network: nn.Module, device: Any) -> None:
        """Leaves each process its share of the weights, on the device."""
        raise ValueError("shard needs several processes: torchrun --nproc-per-node K")

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor, of which each process may have a share, as one."""
        return tensor

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Copies a whole value to a tensor of which each process may have a share."""
        tensor.copy_(value)

    def own(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The shares that are here."""
        return list(tensors)


@dataclass(frozen=True)
class Execution:
    """How steps are computed. The steps are those of any other way, but for rounding.

    team                    the processes: each takes its rows of every batch
    accumulate              parts in which it takes them, one after the other
    shard                   whether each process keeps a share of weights, averages and moments
    checkpoint_activations  whether stages of the UNets are computed again for the gradient
    compile                 whether torch.compile makes the networks' code
    capture                 whether steps are replays of a CUDA graph (captured.py)
    """

    team: Team = field(default_factory=Team)
    accumulate: int = 1
    shard: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
    capture: bool = False

    def check(self, options: TrainingOptions) -> None:
        """ValueError for what cannot be, or not with these options."""
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.shard and self.team.size == 1:
            raise ValueError("shard needs several processes: torchrun --nproc-per-node K")
        if self.shard and self.compile:
            raise ValueError("shard cannot go with compile: weights come and go between layers")
        if self.capture and self.team.size > 1:
            raise ValueError(f"capture is of one process, got {self.team.size}")
        if self.capture and self.compile:
            raise ValueError("capture cannot go with compile: nobody has tried them together")
        if self.shard and 0 < options.extra_images < self.parts:
            raise ValueError(
                f"extra_images must be 0 or at least {self.parts} with shard, where all parts call "
                f"the same networks; got {options.extra_images}"
            )
        if options.batch_size < self.parts:
            raise ValueError(
                f"batch_size must be at least {self.parts}, a clip for each of {self.parts} parts "
                f"({self.team.size} processes, accumulate {self.accumulate}), "
                f"got {options.batch_size}"
            )

    @property
    def parts(self) -> int:
        """The parts of a batch."""
        return self.team.size * self.accumulate

    def part(self, number: int) -> tuple[int, int]:
        """This process's number-th part, among those of all: (its number, how many there are)."""
        return self.team.rank * self.accumulate + number, self.parts


ALONE = Execution()  # one process, which takes all of a batch at once


def rows_of(count: int, part: tuple[int, int]) -> slice:
    """The rows of `count` that a part has; all parts together have each row once."""
    number, parts = part
    return slice(count * number // parts, count * (number + 1) // parts)
