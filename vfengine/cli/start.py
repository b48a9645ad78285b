"""How every command's process begins: clock, streams and signals, how threads wait, its name.

A door calls `begin` before anything heavy is imported. Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .streams import open_streams


def begin(briefly: bool = True) -> float:
    """Readies this process for a command; `time.perf_counter()` at the moment it was started.

    briefly: whether OpenMP's threads soon sleep when there is no work; training leaves them as is
    """
    open_streams()
    if briefly:
        wait_briefly(os.environ)
    on_stop(_terminate)
    return time.perf_counter() - _seconds_since_process_start()


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Lets OpenMP's threads sleep after 0.1 ms without work, not after some 10 ms.

    Threads that spin take a busy machine's cores from those that they wait for. GNU's OpenMP reads
    the variable when torch is loaded; what the user has set is left alone.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "5000")


def short_name(program: str) -> str:
    """A command's name in front of its errors: vfengine.generate, or vfengine generate.

    program: how it was called, as its help states it
    """
    return program.removeprefix("python -m ")


def on_stop(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Handles the wishes of the system that a process stop: SIGTERM and SIGHUP.

    A SIGHUP that is ignored, as by nohup, stays so. Returns the former handlers by signal.
    """
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds the stack, so that temporary files are removed


def _seconds_since_process_start() -> float:
    """The age of this process on Linux. Elsewhere 0: times then count from this call."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return uptime - started / os.sysconf("SC_CLK_TCK")
