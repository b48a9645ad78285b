"""Both phases at once: the base loop runs ahead, the residual loop follows a step behind.

The base loop never waits for the residual loop. It passes on one small image d a step, and nothing
else is shared. The results are therefore those of one phase after the other, bit for bit.

Captured on one GPU, both are branches of one graph: base steps k, k+1, ... beside the residual
steps before them. Otherwise, and where features are reused (features.py), the base loop has a
thread or a stream of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from .cuda_graph import CapturedStepper, Stepper, captured_after, side_stream
from .run import Callback
from .two_phase import BaseLoop, ResidualLoop

Wait = Callable[[int], None]


def run_overlapped(
    base: BaseLoop,
    residual: ResidualLoop,
    base_noise: Tensor,
    residual_noise: Tensor,
    capture: bool = False,
    callback: Callback | None = None,
) -> None:
    """Start and run both loops; the result is in residual.u, the path in residual.states.

    residual.states is base.states itself, or a copy on another device that is filled row by row.
    callback is called from the caller's thread, for both phases. Errors of networks are raised.
    """
    captured_here = capture and base.device.type == "cuda"
    reuses = max(base.reuse_every, residual.reuse_every) > 1  # graphs of a step each
    if captured_here and residual.states is base.states and not reuses:
        _run_as_branches(base, residual, base_noise, residual_noise, callback)
        return
    # A row at a time: several steps in a graph would hold it back.
    base_step, residual_step = base.stepper(capture, 1), residual.stepper(capture, 1)
    count = len(base)
    base.start(base_noise)
    ahead = _on_stream if base.device.type == "cuda" else _in_thread
    with ahead(base_step, count, base.device, residual.device) as wait:

        def receive(row: int) -> None:
            """Waits for a row of the path: a step's d, or after the last the finished frame."""
            if row < count:
                wait(row)
                base.report(callback, row, 1)
            if residual.states is not base.states:
                residual.states[row].copy_(base.states[row])

        receive(0)
        residual.start(residual_noise)
        for k in range(count):
            receive(k + 1)
            residual_step(k)
            residual.report(callback, k, 1)


def _run_as_branches(
    base: BaseLoop,
    residual: ResidualLoop,
    base_noise: Tensor,
    residual_noise: Tensor,
    callback: Callback | None,
) -> None:
    """Both loops on one GPU: a graph of base steps, graphs of both, a graph of residual steps."""
    ahead, behind = base.stepper(capture=True), residual.stepper(capture=True)
    both = _branches(base, residual, ahead, behind)
    count, total = ahead.count, len(base)
    lead = max(2, count)  # base steps ahead of the residual loop: it reads two rows of the path
    base.start(base_noise)
    for done in range(0, min(lead, total), count):
        ahead()
        base.report(callback, done, count)
    residual.start(residual_noise)
    for done in range(0, total, count):
        if done + lead < total:
            both()
            base.report(callback, done + lead, count)
        else:
            behind()
        residual.report(callback, done, count)


def _branches(
    base: BaseLoop, residual: ResidualLoop, ahead: CapturedStepper, behind: CapturedStepper
) -> CapturedStepper:
    """The graph of as many base steps as residual ones beside them; kept by the residual loop."""
    if (kept := residual.beside.get(base)) is not None:
        return kept
    count = behind.count

    def fork_and_join() -> None:
        side, here = ahead.stream, behind.stream
        side.wait_stream(here)
        with torch.cuda.stream(side):
            base.step()
            first = side.record_event()
            for _ in range(count - 1):
                base.step()
        for k in range(count):
            if k == count - 1 > 0:  # it reads the first row of this graph's; one step is 2 behind
                here.wait_event(first)
            residual.step()
        here.wait_stream(side)

    residual.beside[base] = captured_after(behind, residual.device, fork_and_join)
    return residual.beside[base]


@contextmanager
def _in_thread(
    step: Stepper, count: int, device: torch.device, target: torch.device
) -> Iterator[Wait]:
    """`count` steps in a thread of their own, on as many CPU threads as the caller uses."""

    done, stopped = [Future() for _ in range(count)], threading.Event()
    threads = torch.get_num_threads()
    autocast = torch.autocast(
        device.type,
        torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
    )

    def run() -> None:  # a thread inherits neither of these settings
        torch.set_num_threads(threads)
        with torch.inference_mode(), autocast:
            for k, future in enumerate(done):
                if stopped.is_set():
                    return
                try:
                    step(k)
                except BaseException as error:
                    future.set_exception(error)
                    return
                future.set_result(None)

    with ThreadPoolExecutor(1, "base") as pool:
        pool.submit(run)
        try:
            yield lambda k: done[k].result()
        finally:
            stopped.set()


@contextmanager
def _on_stream(
    step: Stepper, count: int, device: torch.device, target: torch.device
) -> Iterator[Wait]:
    """`count` steps on a stream of their own; each is launched when target first waits for it."""
    events: list[torch.cuda.Event] = []

    def wait(k: int) -> None:
        while len(events) <= k:
            with torch.cuda.stream(ahead):
                step(len(events))
                events.append(ahead.record_event())
        if target.type == "cuda":
            torch.cuda.current_stream(target).wait_event(events[k])
            if target != device:
                here.wait_event(events[k])  # `look` reads the row where it was made
        else:
            events[k].synchronize()

    here = torch.cuda.current_stream(device)
    with side_stream(device) as ahead:
        ahead.wait_stream(here)
        try:
            yield wait
        finally:
            here.wait_stream(ahead)
