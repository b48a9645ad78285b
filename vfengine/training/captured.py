"""Training steps as one CUDA graph: losses, gradients, clipping, AdamW and averages, replayed.

A graph reads where it read when it was captured, and repeats the numbers of the host. So all that
changes from step to step lies in tensors that stay: what is random is drawn as ever, from (seed,
step), and copied to where the first step's draws lay (`StaticBatch`); the rates of the step are
tensors (`Updates.keep_rates_on`); timesteps are looked up where they are (`ScheduleOnDevice`).

The first steps are taken plainly: they ready libraries and memory for the capture. So every step is
taken once, and a state means what it means without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule
from ..sampling.cuda_graph import CapturedStepper, captured_once, on_stream
from .batch import BatchSampler, Samples, placed
from .team import rows_of

_PLAIN_STEPS = 2  # libraries choose algorithms and allocate workspaces in their first calls

Drawn = list[tuple[Tensor | None, ...]]  # of each call of a sampler


class CapturedSteps:
    """Takes optimizer steps; from the third on, each is the replay of one CUDA graph.

    take:    a whole optimizer step, but for its rates, on the parts of a batch, by their numbers;
             what it tells
    sampler: of a step, and of a part of its batch, both from 0
    parts:   how many there are
    end:     the number of steps: the batch of step k + 1 is drawn while step k runs, up to this

    Nothing waits for the device. Raises RuntimeError for a step that cannot be captured.
    """

    def __init__(
        self,
        take: Callable[[Callable[[int], StaticBatch]], Tensor],
        sampler: Callable[[int, int], BatchSampler],
        parts: int,
        end: int,
        device: torch.device,
    ):
        self._take, self._sampler, self._end, self._device = take, sampler, end, device
        with torch.cuda.device(device):
            self._stream, self._beside = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._batches = [StaticBatch((number, parts), device) for number in range(parts)]
        self._plain = 0  # steps that were taken plainly
        self._graph: CapturedStepper | None = None
        self._told: Tensor | None = None  # where each replay leaves it
        self._ahead: _Ahead | None = None
        self._loaded: torch.cuda.Event | None = None  # when the last draws had been read

    def __call__(self, step: int) -> Tensor:
        """Takes the step; what it tells, in a tensor of the caller's."""
        with torch.cuda.device(self._device):
            if self._plain == 0:
                for number, batch in enumerate(self._batches):
                    batch.record(self._sampler(step, number))
                self._loaded = torch.cuda.current_stream(self._device).record_event()
            else:
                self._load(step)
            if self._plain < _PLAIN_STEPS:
                with on_stream(self._stream):
                    self._run()
                self._plain += 1
            else:
                if self._graph is None:
                    self._graph = captured_once(self._run, self._stream, self._device)
                self._graph.take()
            told = self._told.clone()
            if step + 1 < self._end:
                self._ahead = self._draw(step + 1)
            return told

    def _run(self) -> None:
        self._told = self._take(self._batches.__getitem__)
        for batch in self._batches:
            batch.rewind()

    def _load(self, step: int) -> None:
        """Copies the draws of a step to where the first one's lie."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.step != step:
            ahead = self._draw(step)
        here = torch.cuda.current_stream(self._device)
        here.wait_event(ahead.ready)
        for batch, drawn in zip(self._batches, ahead.drawn, strict=True):
            batch.load(drawn)
        self._loaded = here.record_event()

    def _draw(self, step: int) -> _Ahead:
        """Draws what a step needs, beside the work of the current stream."""
        self._beside.wait_event(self._loaded)  # these draws may take the memory of earlier ones
        with torch.cuda.stream(self._beside):
            drawn = [
                batch.draw(self._sampler(step, number))
                for number, batch in enumerate(self._batches)
            ]
            return _Ahead(step, drawn, self._beside.record_event())


class _Ahead(NamedTuple):
    """The draws of a step, for each part of its batch; on the device once `ready`."""

    step: int
    drawn: list[Drawn]
    ready: torch.cuda.Event


class StaticBatch:
    """Stands for the `BatchSampler` of every step; results of its calls lie where they first lay.

    In the first step the calls are those of the sampler that `record` is given, and are remembered.
    In later ones they must be the same, in the same order: they find what `load` was given last.
    Everything is on the device, timesteps too.

    part: that of the samplers
    """

    def __init__(self, part: tuple[int, int], device: torch.device):
        self._part, self._device = part, device
        self._calls: list[tuple[str, tuple]] = []
        self._buffers: Drawn = []
        self._sampler: BatchSampler | None = None
        self._next = 0

    def record(self, sampler: BatchSampler) -> None:
        """The next step is the first one, which draws from this sampler."""
        self._sampler = sampler

    def draw(self, sampler: BatchSampler) -> Drawn:
        """The remembered calls of a sampler."""
        return [self._drawn(sampler, *call) for call in self._calls]

    def load(self, drawn: Drawn) -> None:
        """The next step is that of these draws."""
        for buffers, values in zip(self._buffers, drawn, strict=True):
            for buffer, value in zip(buffers, values, strict=True):
                if buffer is not None:
                    buffer.copy_(value, non_blocking=True)

    def rewind(self) -> None:
        """The next call is the first one of a step."""
        self._sampler, self._next = None, 0

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for buffers in self._buffers for buffer in buffers if buffer is not None]

    # -- the surface of a BatchSampler --------------------------------------------------------

    def rows(self, count: int) -> slice:
        return rows_of(count, self._part)

    def clips(self, count: int, only_base: bool = False) -> Samples:
        return Samples(*self._of_call("clips", count, only_base))

    def timesteps(self, count: int) -> Tensor:
        return self._of_call("timesteps", count)[0]

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._of_call("normal", tuple(shape))[0]

    def uniform(self, *shape: int) -> Tensor:
        return self._of_call("uniform", *shape)[0]

    def _of_call(self, name: str, *arguments) -> tuple[Tensor | None, ...]:
        call = name, arguments
        if self._sampler is not None:
            drawn = self._drawn(self._sampler, *call)
            self._calls.append(call)
            self._buffers.append(tuple(None if value is None else value.clone() for value in drawn))
        elif self._next == len(self._calls) or self._calls[self._next] != call:
            raise RuntimeError(f"a later step draws {name}{arguments}, which the first one did not")
        else:
            self._next += 1
            return self._buffers[self._next - 1]
        return self._buffers[-1]

    def _drawn(self, sampler: BatchSampler, name: str, arguments: tuple) -> tuple:
        found = getattr(sampler, name)(*arguments)
        values = found if isinstance(found, tuple) else (found,)
        return tuple(None if value is None else placed(value, self._device) for value in values)


class ScheduleOnDevice(NoiseSchedule):
    """A schedule whose table is on a device as well, where timesteps of the device are looked up.

    Square roots of float64 are correctly rounded on a GPU too, so the bits are those of the CPU.
    Such timesteps are not checked, which would wait for them: they are a BatchSampler's.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device):
        super().__init__(schedule.alphas_cumprod, schedule.recipe)
        object.__setattr__(self, "_table", self.alphas_cumprod.to(device, copy=True))

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if t.device != self._table.device:
            return super().signal_and_noise(t, like)
        alphas = self._table.index_select(0, t).reshape(-1, *[1] * (like.ndim - 1))
        at_least_fp32 = torch.promote_types(like.dtype, torch.float32)
        return alphas.sqrt().to(at_least_fp32), (1.0 - alphas).sqrt().to(at_least_fp32)
