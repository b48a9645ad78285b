"""The sections of gpu_check.py, each a program of its own: `python -m gpu_run.sections.<name>`.

A section prints one JSON object a line on stdout, a part of a line of gpu.jsonl (results.py);
gpu_check.py adds the rest and keeps it. Everything else that it prints is its log.

With --prepare it compiles whatever it would compile and measures nothing. Compilers keep what they
made on disk, so the parts of a preparation are processes of their own, beside one another
(`prepared_in_parts`). With VFENGINE_GPU_CHECK=dry it runs at tiny sizes on a CPU, where a graph is
the plain call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

DRY = os.environ.get("VFENGINE_GPU_CHECK") == "dry"
PREPARE = "--prepare" in sys.argv
if PREPARE:  # beside others: what is measured now is not to be kept
    os.environ["VFENGINE_TUNING"] = "process"
DEVICE = "cpu" if DRY else "cuda"
if DRY and os.environ.get("TRITON_INTERPRET") == "1":
    from triton_tools import compute_bf16_correctly  # of tests/tools; Triton truncates here

    compute_bf16_correctly()
BACKENDS = ("cpu", "triton") if DRY else ("cuda", "triton")  # C++ and Triton


_DETAILS = {"dtype", "graph", "spread", "n", "status", "note"}


def emit(
    case: str,
    contender: str = "",
    metric: str = "",
    value: float | None = None,
    unit: str = "",
    **details: object,
) -> None:
    """Writes a line; details: dtype, graph, spread, n, status, note, as in results.py.

    What is left out is empty, and the status "measured". Nothing is written while preparing.
    """
    if unknown := details.keys() - _DETAILS:
        raise TypeError(f"emit: expected details of {sorted(_DETAILS)}, got {sorted(unknown)}")
    if PREPARE and details.get("status", "measured") == "measured":
        return
    line = {"case": case, "contender": contender, "metric": metric, "value": value, "unit": unit}
    print(json.dumps({**line, **details}), flush=True)


def verdict(case: str, passed: bool, note: str = "", **place: object) -> None:
    """A line that says whether something is correct."""
    emit(case, status="passed" if passed else "failed", note=note, **place)


@contextmanager
def guarded(case: str, **place: object) -> Iterator[None]:
    """Turns errors inside into rows: a missing package, or an error that is a verdict.

    After an error that the device itself reports, nothing of this process can be trusted: it ends.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        emit(case, status="unavailable", note=f"{error.name} is not installed", **place)
    except Exception as error:
        note = f"{type(error).__name__}: {error}".split("\n\n")[0][:600]
        verdict(case, False, note, **place)
        if _of_the_device(error):
            sys.exit(1)
        import traceback

        traceback.print_exc()


def _of_the_device(error: Exception) -> bool:
    import torch

    sticky = getattr(torch, "AcceleratorError", ())  # torch >= 2.8 has it
    return isinstance(error, sticky) or "CUDA error" in str(error)


def prepared_in_parts(section: str, parts: Sequence[str]) -> str | None:
    """Prepares a process a part, and returns None when they have ended; in each of them, its part.

    section: the name of its module
    """
    if len(sys.argv) > 2:
        return sys.argv[2]
    command = [sys.executable, "-m", f"gpu_run.sections.{section}", "--prepare"]
    parts = parts[:1] if DRY else parts
    start = time.monotonic()
    processes = [subprocess.Popen([*command, part]) for part in parts]
    for part, process in zip(parts, processes, strict=True):
        status = process.wait()
        note = f"ended with exit status {status} after {time.monotonic() - start:.0f} s"
        verdict(part, status == 0, note)
    return None


def timed(
    case: str,
    contenders: dict[str, Callable[[], object]],
    *,
    moved_bytes: int,
    dtype: str,
    seconds: float = 0.3,
    flops: int | None = None,
) -> None:
    """Time, GB/s and share of a copy's GB/s of contenders in turns, from graphs of many calls.

    moved_bytes: what the op must read and write; the copy moves as many, in as much memory
    flops:       of a call, for its TFLOP/s
    """
    import torch
    from lib.harness import timed_turns

    if PREPARE:
        for name, call in contenders.items():
            with guarded(case, contender=name, dtype=dtype):
                call()
        return
    source = torch.empty(max(moved_bytes // 2, 1), dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    calls = {**contenders, "copy": lambda: target.copy_(source)}
    times = timed_turns(calls, seconds, DEVICE)
    for name, value in times.items():
        place = {"dtype": dtype, "graph": not DRY, "spread": value.spread, "n": len(value.values)}
        emit(case, name, "time", value.median * 1e6, "us", **place)
        emit(case, name, "bandwidth", moved_bytes / value.median / 1e9, "GB/s", **place)
        emit(case, name, "of copy", 100 * times["copy"].median / value.median, "%", **place)
        if flops is not None and name != "copy":
            emit(case, name, "rate", flops / value.median / 1e12, "TFLOP/s", **place)
