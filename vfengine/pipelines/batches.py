"""A request in batches of a given number of clips.

The command line iterates over `Batches.run()`: it writes each batch to files, and shows progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .pipeline import VideoFusionOutput
from .plain_video import PlainVideoPipeline
from .request import VideoRequest
from .videofusion import VideoFusionPipeline


@dataclass(frozen=True)
class Steps:
    """How far a request has come.

    phase: the one that runs; empty between batches
    done:  steps taken
    total: steps of all phases of all batches; fewer once a base path is found in a cache
    """

    phase: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: output holds clips first, first + 1, …; steps is the progress after it."""

    first: int
    output: VideoFusionOutput
    steps: Steps


class Batches:
    """The clips of a request, a batch at a time.

    request:    of one label; as an attribute, with its defaults filled in
    batch_size: clips of a batch, at most; the clips do not depend on it
    base_needed_again: whether the base network is needed after the last batch too

    Raises ValueError for a request with more labels, and for one that does not fit the model.
    """

    def __init__(
        self,
        pipe: VideoFusionPipeline | PlainVideoPipeline,
        request: VideoRequest,
        batch_size: int = 1,
        base_needed_again: bool = False,
    ) -> None:
        if len(request.labels) > 1:
            raise ValueError(f"batches are of one label, got {len(request.labels)}")
        self.pipe, self.batch_size = pipe, batch_size
        again = base_needed_again or request.num_videos > batch_size
        self.request = pipe.fill_defaults(request, again)
        self.firsts = range(0, self.request.num_clips, batch_size)

    @property
    def steps(self) -> Steps:
        """How far the request is before its first batch."""
        return Steps("", 0, self._steps_from(0))

    def parts(self) -> Iterator[VideoRequest]:
        """The request of each batch."""
        for first in self.firsts:
            count = min(self.batch_size, self.request.num_clips - first)
            yield self.request.part(first, count)

    def run(self, on_step: Callable[[Steps], None] | None = None) -> Iterator[Batch]:
        """The batches, each made when it is needed; raises what the pipeline raises.

        on_step: called when a phase begins, and after each of its steps
        """
        request, steps = self.request, self.steps
        for index, first in enumerate(self.firsts):
            later = self._steps_from(index + 1)
            part = request.part(first, min(self.batch_size, request.num_clips - first))
            work = self.pipe.work(part)

            def report(
                phase: str, done: int, total: int, later: int = later, work: dict = work
            ) -> None:
                nonlocal steps
                total_steps = steps.total
                phases = list(work)
                if done == 0 and phase in phases[1:]:  # the one before may have had nothing to do
                    left = sum(work[name] for name in phases[phases.index(phase) + 1 :])
                    total_steps = steps.done + total + left + later
                steps = Steps(phase, steps.done + (done > 0), total_steps)
                if on_step is not None:
                    on_step(steps)

            output = self.pipe.sample(part, report)
            request = request.following(output.trajectory)
            steps = Steps("", steps.done, steps.done + later)
            yield Batch(first, output, steps)

    def _steps_from(self, index: int) -> int:
        """The steps of batch number `index` and of those after it."""
        whole, rest = divmod(self.request.num_clips - index * self.batch_size, self.batch_size)
        if whole < 0:
            return 0
        shared = 0  # of a base path that all batches share, and that the first one samples
        if self.request.shares_path:
            shared = self.pipe.work(self.request).get("base", 0)
        steps = whole * (self._steps_of(self.batch_size) - shared)
        steps += self._steps_of(rest) - shared if rest else 0
        return steps + (shared if index == 0 else 0)

    def _steps_of(self, count: int) -> int:
        """The steps of a batch of so many clips."""
        return sum(self.pipe.work(self.request.part(0, count)).values())
