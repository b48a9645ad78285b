"""The loop of every training: log, progress, states, checkpoints, samples, and when it ends.

A training is any object with this surface:

    options, steps_done, device     TrainingOptions; a count; where it trains
    step() -> StepReport            takes one step
    describe() -> str               data and networks, in one line
    save(file), restore(file)       everything that a run goes on from, to the bit
    export(folder)                  the averaged weights, as what others read
    warm_start(folder) -> list      starts from such a folder; returns what stays fresh
    write_samples(file)             a picture of what it makes by now
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

import numpy as np

if TYPE_CHECKING:
    from ..training.report import StepReport

STATE, CHECKPOINT = "training.safetensors", "checkpoint"  # in --output


class Limit:
    """When a run stops before its last step: by the clock, or by a SIGTERM. Both save first."""

    def __init__(self, settings: argparse.Namespace, start: float):
        """start: of the command, by time.perf_counter"""
        hours, minutes = settings.max_hours, settings.max_minutes
        given = [x for x in (hours and hours * 3600, minutes and minutes * 60) if x is not None]
        self._end = start + min(given, default=math.inf)
        self.terminated = False

    @property
    def reached(self) -> bool:
        return self.terminated or time.perf_counter() >= self._end

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Takes SIGTERM for a wish to stop, in the main thread; elsewhere signals are not ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            self.terminated = True

        former = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)


def run(training, settings: argparse.Namespace, log: TextIO, limit: Limit) -> None:
    """The steps that are left, or those until the limit is reached; the last is saved.

    Raises FloatingPointError for a loss that is not finite; what was saved before stays.
    """
    import torch
    from tqdm import tqdm

    options, output = training.options, settings.output
    record = {
        **vars(settings),
        **asdict(options),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    log.write(json.dumps({"start": training.steps_done, **record}, default=str) + "\n")
    progress = tqdm(total=options.steps, initial=training.steps_done, unit="step", disable=None)
    reports, since = [], time.perf_counter()
    with limit.watching(), progress:
        if limit.reached:  # no time for a step, but for what a step would end in
            _save(training, settings)
        while training.steps_done < options.steps and not limit.reached:
            reports.append(training.step())
            progress.update()
            step = training.steps_done
            last = step == options.steps
            saves = last or step % settings.save_every == 0 or limit.reached
            if saves or step % settings.log_every == 0:
                line = _summary(step, reports, options.batch_size, time.perf_counter() - since)
                log.write(json.dumps(line) + "\n")
                log.flush()
                progress.set_postfix({k: v for k, v in line.items() if isinstance(v, float)})
                reports, since = [], time.perf_counter()
            if saves:
                _save(training, settings)
            if settings.sample_every and (last or step % settings.sample_every == 0):
                file = output / "samples" / f"step-{step:07d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                training.write_samples(file)
                since = time.perf_counter()


def _save(training, settings: argparse.Namespace) -> None:
    training.export(settings.output / CHECKPOINT)  # before the state: a run with a state has one
    training.save(settings.output / STATE)


def tell_end(training, settings: argparse.Namespace) -> None:
    """One line about a run that stopped before its last step."""
    steps = training.options.steps
    if training.steps_done < steps:
        print(
            f"stopped after {training.steps_done} of {steps} steps: the same command with --resume "
            "goes on",
            file=sys.stderr,
        )


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
