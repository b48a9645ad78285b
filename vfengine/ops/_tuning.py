"""Choices that are measured: which way of computing a thing is the fastest on this machine.

A choice is made once, at the first call that can be measured; captured graphs replay what was
chosen while they were warmed up. It is kept in a file, so that later processes choose the same, and
with it the order of sums: $XDG_CACHE_HOME/vfengine/<GPU>.json, in ~/.cache if that is not set.

VFENGINE_TUNING is "on" (default), "process", which neither reads nor writes the file, or "off",
which measures nothing and takes the likely fastest.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import torch

from vfengine import __version__
from vfengine.files import replacing

MODES = ("on", "process", "off")
_LAUNCHES, _REPEATS = 8, 3
_ENOUGH = 0.5  # milliseconds, beyond which more launches tell no more
_HEAD_START = 2_000_000  # clocks that the GPU waits, in which the host queues all launches

_choices: dict[Hashable, str] = {}
_times: dict[Hashable, dict[str, float]] = {}
_lock = threading.Lock()


def choose(key: Hashable, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the candidate that is the fastest for this key, measured at the first call.

    key:        all that times and candidates depend on: op, device, shapes, dtypes, settings
    candidates: the likely fastest first. Each queues its work on the current CUDA stream; all
                write the same results.

    Where nothing can be measured (see `can_measure`) it is what was chosen before, else the first.
    """
    if key not in _choices:
        if len(candidates) == 1 or not can_measure():
            return next(iter(candidates))
        with _lock:
            if key not in _choices:
                _choices[key] = _kept(key, candidates) or _measured(key, candidates)
    return _choices[key]


def measured() -> dict[Hashable, dict[str, float]]:
    """Milliseconds of all candidates of each key that this process measured."""
    return {key: dict(times) for key, times in _times.items()}


def mode() -> str:
    """VFENGINE_TUNING; ValueError for a value that is none of MODES."""
    value = os.environ.get("VFENGINE_TUNING") or "on"
    if value not in MODES:
        raise ValueError(f"VFENGINE_TUNING must be one of {', '.join(MODES)}, got {value!r}")
    return value


def can_measure() -> bool:
    """Whether calls may be timed: on a GPU, outside of a capture, unless that is ruled out.

    A choice may differ from machine to machine, and with it the order of sums.
    """
    return (
        mode() != "off"
        and os.environ.get("TRITON_INTERPRET") != "1"
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    )


def _measured(key: Hashable, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The fastest of the candidates, which is kept."""
    times = _times[key] = {name: _time(call) for name, call in candidates.items()}
    fastest = min(times, key=times.__getitem__)
    if mode() == "on":
        _keep(repr(key), fastest)
    return fastest


def _kept(key: Hashable, candidates: Mapping[str, object]) -> str | None:
    """The choice of an earlier process, if it is a candidate."""
    chosen = _stored().get(repr(key)) if mode() == "on" else None
    return chosen if chosen in candidates else None


def _file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name())
    return Path(folder) / "vfengine" / f"{gpu}.json"


@functools.cache
def _versions() -> dict[str, str]:
    """Other versions may have other candidates, or make others faster."""
    import triton

    return {"vfengine": __version__, "torch": torch.__version__, "triton": triton.__version__}


@functools.cache
def _stored() -> dict[str, str]:
    """The file's choices, by repr(key), when they were first asked for."""
    return _read()


def _read() -> dict[str, str]:
    """The file's choices; none where it cannot be read, or is of other versions."""
    try:
        found = json.loads(_file().read_text())
        return found["choices"] if found["versions"] == _versions() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep(key: str, chosen: str) -> None:
    """Adds a choice to the file, with those that other processes added meanwhile."""
    content = {"versions": _versions(), "choices": {**_read(), key: chosen}}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with replacing(_file()) as file:
            file.write_text(json.dumps(content, indent=1))
    except OSError as error:
        warnings.warn(f"measured choices are not kept: {error}", stacklevel=2)


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
