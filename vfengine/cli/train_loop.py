"""The loop of every training: log, progress, states, checkpoints, samples, and when it ends.

A training is any object with this surface:

    options, steps_done, device     TrainingOptions; a count; where it trains
    step() -> StepReport            takes one step
    describe() -> str               data and networks, in one line
    save(file, checkpoint)          everything that a run goes on from, to the bit; and the name of
    restore(file)                   the checkpoint that was exported of it
    export(folder)                  the averaged weights, as what others read
    warm_start(folder) -> list      starts from such a folder; returns what stays fresh
    write_samples(file)             a picture of what it makes by now
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np

from ..training.team import Lost
from .ending import begun
from .flags import Failure
from .start import on_stop
from .streams import tell

if TYPE_CHECKING:
    from ..training.report import StepReport
    from ..training.team import Team
    from .train_output import Output


class Limit:
    """When a run stops before its last step: by the clock, or by a signal. Both save first.

    signal: SIGTERM or SIGHUP, once it has come
    """

    def __init__(self, settings: argparse.Namespace, start: float):
        """start: of the command, by time.perf_counter"""
        hours, minutes = settings.max_hours, settings.max_minutes
        given = [x for x in (hours and hours * 3600, minutes and minutes * 60) if x is not None]
        self._end = start + min(given, default=math.inf)
        self.signal: int | None = None

    @property
    def reached(self) -> bool:
        return self.signal is not None or time.perf_counter() >= self._end

    def reached_by(self, team: Team) -> bool:
        """Whether any process of a team has reached it: the same answer, and signal, for all."""
        wish = int(self.reached) if self.signal is None else 128 + self.signal
        wish = team.largest(wish)
        if wish > 128:
            self.signal = wish - 128
        return wish > 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Takes a signal for a wish to stop, in the main thread; elsewhere signals are not ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.signal = number

        former = on_stop(stop)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


@begun()
def run(training, settings: argparse.Namespace, output: Output, limit: Limit) -> None:
    """The steps that are left, or those until the limit is reached; the last is saved.

    What an earlier run was to leave behind at the step that it came to is made up for: its
    checkpoint, and its samples.

    Raises FloatingPointError for a loss that is not finite, Failure for files that cannot be
    written, or where another process of the training is gone; what was saved before stays.
    """
    import torch
    from tqdm import tqdm

    from ..devices import peak_memory

    options, team = training.options, output.team
    record = {
        **{name: value for name, value in vars(settings).items() if name != "execution"},
        **asdict(options),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": team.size,
        "torchrun": team.run,
    }
    output.log({"start": training.steps_done, **record})
    progress = tqdm(total=options.steps, initial=training.steps_done, unit="step", disable=None)
    reports, since = [], time.perf_counter()
    with limit.watching(), progress, _loss_of_a_worker_told(training, output):
        stops = limit.reached_by(team)
        if (settings.resume or stops) and not output.is_current():
            output.save(training)
            if settings.resume:
                tell(f"{output.checkpoint} was not that of the state, and has been written anew")
        if settings.resume and not stops and _shows(training, settings):
            if not output.has_samples(training.steps_done):
                output.write_samples(training)
        while training.steps_done < options.steps and not stops:
            reports.append(training.step())
            progress.update()
            step = training.steps_done
            stops = limit.reached_by(team)
            saves = step == options.steps or step % settings.save_every == 0 or stops
            if saves or step % settings.log_every == 0:
                line = _summary(step, reports, options.batch_size, time.perf_counter() - since)
                line["peak_memory_mib"] = peak_memory(training.device) >> 20
                output.log(line)
                progress.set_postfix({k: v for k, v in line.items() if isinstance(v, float)})
                reports, since = [], time.perf_counter()
            if saves:
                output.save(training)
            if _shows(training, settings):
                output.write_samples(training)
                since = time.perf_counter()


@contextlib.contextmanager
def _loss_of_a_worker_told(training, output: Output) -> Iterator[None]:
    """Failure in place of Lost: another process is gone, and what a run goes on from."""
    try:
        yield
    except Lost as error:
        saved = output.saved()
        then = "nothing was saved yet" if saved is None else f"--resume goes on from step {saved}"
        raise Failure(
            f"a worker was lost at step {training.steps_done} ({error}); {then}"
        ) from error


def _shows(training, settings: argparse.Namespace) -> bool:
    """Whether samples are due at the step that a training has come to."""
    step, every = training.steps_done, settings.sample_every
    return bool(every and step) and (step == training.options.steps or step % every == 0)


def tell_end(training, first: int) -> None:
    """The most memory that this process had, and how a run ended that took not all of its steps.

    first: the step that it began at
    """
    from ..devices import peak_memory

    tell(f"peak memory {peak_memory(training.device) / 2**20:,.0f} MiB")
    done, steps = training.steps_done, training.options.steps
    if done < steps:
        tell(f"stopped after {done} of {steps} steps: the same command with --resume goes on")
    elif first == done:
        tell(f"no step to take: {done} of {steps} are done")


def _summary(step: int, reports: Sequence[StepReport], batch_size: int, seconds: float) -> dict:
    """The log line of some steps: mean losses, those of each fifth of the schedule, the speed."""
    losses = [report.losses for report in reports]
    by_t = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a fifth without a sample is null
        for name in reports[0].by_t:
            means = np.nanmean([r.by_t[name] for r in reports], axis=0)
            by_t[name] = [None if np.isnan(v) else round(float(v), 4) for v in means]
    return {
        "step": step,
        **{name: round(float(np.mean([x[name] for x in losses])), 4) for name in losses[0]},
        **{f"{name}_by_t": means for name, means in by_t.items()},
        "clips_per_second": round(len(reports) * batch_size / seconds, 2),
    }
