"""Progress and timings of one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

Callback = Callable[[str, int, int], None]  # (phase, steps done, steps in all)


def zero_timings(*more: str) -> dict[str, float]:
    """Timings of a call that has not begun, in seconds: reading weights, the two phases, and more.

    more: "text" and "decode", of models that have them
    """
    return dict.fromkeys(("load", "base", "residual", *more), 0.0)


@dataclass(frozen=True, eq=False)
class Run:
    """The callback and the timings of one call; everything that takes steps gets it.

    callback:  called as callback(phase, steps done, steps in all)
    timings:   seconds are added to "load", "base" and "residual", the device's work included, and
               to "text" and "decode" of models that have them;
               None: nothing is timed, and the device is not waited for
    from_zero: whether a phase is reported before its first step too, with 0 done
    """

    callback: Callback | None = None
    timings: dict[str, float] | None = field(default_factory=zero_timings)
    from_zero: bool = True

    def __post_init__(self) -> None:
        if self.callback is not None and not callable(self.callback):
            kind = type(self.callback).__name__
            raise TypeError(
                f"callback must be callable as callback(phase, done, total), got {kind}"
            )

    def report(self, phase: str, done: int, total: int) -> None:
        """Tells the callback, if there is one."""
        if self.callback is not None and (done > 0 or self.from_zero):
            self.callback(phase, done, total)

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Adds the seconds of the `with` block to timings[name]."""
        if self.timings is None:
            yield
            return
        started = _now(device)
        yield
        self.timings[name] = self.timings.get(name, 0.0) + _now(device) - started

    def phase(self, name: str, device: torch.device) -> AbstractContextManager[None]:
        """Times the `with` block as a phase; every phase but "base" counts as "residual"."""
        return self.timed("base" if name == "base" else "residual", device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        # torch.cuda.synchronize would wait for other threads too, and break their captures
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
