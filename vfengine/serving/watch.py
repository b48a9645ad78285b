"""Progress of a batch of jobs, and its end before time. Nothing here imports torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from .store import Store

_SECONDS_BETWEEN = 0.05  # of reports, which are writes to the disk
# Shares of a first clip's time, by phase, until there is one to learn from.
_FIRST = {"text": 0.02, "base": 0.12, "residual": 0.7, "video": 0.8, "decode": 0.12, "write": 0.03}


class Stopping(Exception):
    """The engine is to end: what it was at is queued again."""


class Deleted(Exception):
    """Nobody wants these clips any longer."""


class Rates:
    """Seconds that a unit of work takes in each phase, learnt from the clips that were made."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def learn(self, phase: str, units: float, seconds: float) -> None:
        if units > 0 and seconds > 0:
            self._rates[phase] = seconds / units

    def seconds(self, units: Mapping[str, float]) -> dict[str, float]:
        """How long each phase will take; in shares of a first clip, if one was never seen."""
        if all(phase in self._rates for phase in units):
            return {phase: self._rates[phase] * count for phase, count in units.items()}
        return {phase: _FIRST[phase] for phase in units}


class Watch:
    """The callback of a pipeline that makes a batch of jobs: (phase, steps done, steps in all).

    expected: seconds of each phase, in order; one that is left out of the calls took no time
    stop:     set once the engine is to end

    A call raises Stopping or Deleted. Progress runs from 0 to 99 over all phases, and never back.
    """

    def __init__(
        self,
        store: Store,
        worker: str,
        job_ids: Sequence[str],
        expected: Mapping[str, float],
        stop: threading.Event,
    ) -> None:
        self.store, self.worker, self.stop = store, worker, stop
        self.job_ids = list(job_ids)
        self._expected = dict(expected)
        self._phase, self._from, self._share = "", 0.0, 0.0  # where the phase begins, and how wide
        self._shown, self._reported = -1, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self.stop.is_set():
            raise Stopping
        self.job_ids = [name for name in self.job_ids if self.store.holds(name, self.worker)]
        if not self.job_ids:
            raise Deleted
        entered = phase != self._phase
        if entered:
            self._enter(phase)
        percent = int(99 * (self._from + self._share * done / max(total, 1)))
        now = time.monotonic()
        due = percent > self._shown and now - self._reported >= _SECONDS_BETWEEN
        if entered or due:
            self._shown, self._reported = max(percent, self._shown), now
            for name in self.job_ids:
                self.store.report(name, self.worker, phase, self._shown)

    def _enter(self, phase: str) -> None:
        """What is left of the bar is shared by this phase and those after it."""
        self._from += self._share
        phases = list(self._expected)
        later = phases[phases.index(phase) :] if phase in phases else [phase]
        left = sum(self._expected.get(name, 0.0) for name in later)
        part = self._expected.get(phase, 0.0) / left if left else 0.0
        self._phase, self._share = phase, (1.0 - self._from) * part

    def has_base(self, job_id: str) -> bool:
        """Tells that a job's thumbnail is there; False: the clip is no longer wanted."""
        phase = self._phase or "base"  # a path that is found is no phase
        shown = max(self._shown, 0)
        return self.store.report(job_id, self.worker, phase, shown, has_base=True)
