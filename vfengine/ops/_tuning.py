"""Choices that are measured: which way of computing a thing is the fastest on this machine.

A choice is made once a process and key, at the first call that can be measured; what captured
graphs replay is what was chosen while they were warmed up. VFENGINE_TUNING=off makes none.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable, Hashable, Mapping

import torch

_LAUNCHES, _REPEATS = 8, 3
_ENOUGH = 0.5  # milliseconds, beyond which more launches tell no more
_HEAD_START = 2_000_000  # clocks that the GPU waits, in which the host queues all launches

_times: dict[Hashable, dict[str, float]] = {}
_lock = threading.Lock()


def choose(key: Hashable, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the candidate that is the fastest for this key, measured at the first call.

    key:        all that times and candidates depend on: op, device, shapes, dtypes, settings
    candidates: the likely fastest first. Each queues its work on the current CUDA stream; all
                write the same results.

    Where nothing can be measured (see `can_measure`) it is what was chosen before, else the first.
    """
    if key not in _times:
        if len(candidates) == 1 or not can_measure():
            return next(iter(candidates))
        with _lock:
            if key not in _times:
                _times[key] = {name: _time(call) for name, call in candidates.items()}
    return min(_times[key], key=_times[key].__getitem__)


def measured() -> dict[Hashable, dict[str, float]]:
    """Milliseconds of all candidates of each key that was measured so far."""
    return {key: dict(times) for key, times in _times.items()}


def can_measure() -> bool:
    """Whether calls may be timed: on a GPU, outside of a capture, unless that is ruled out.

    A measured choice may differ from process to process, and with it the order of sums.
    """
    return (
        os.environ.get("VFENGINE_TUNING") != "off"
        and os.environ.get("TRITON_INTERPRET") != "1"
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    )


def _time(call: Callable[[], object]) -> float:
    """Milliseconds of a call among calls; the first one builds kernels and is not counted."""
    call()
    launches = max(1, min(_LAUNCHES, int(_ENOUGH / _once(call, 1))))
    return statistics.median(_once(call, launches) for _ in range(_REPEATS))


def _once(call: Callable[[], object], launches: int) -> float:
    """Milliseconds of a call among so many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()  # waits for this stream, and breaks no capture of another thread
    return begin.elapsed_time(end) / launches
