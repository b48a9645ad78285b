"""The server's side of its engines: starts them, wakes them, watches them. No torch here.

An engine that ends is started again, and what it was at is queued again. One thread watches each of
them, from its start to its end.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import is_of_the_machine
from .log import log, log_error
from .model_info import ModelInfo
from .store import Store

_BACKOFF = (0.1, 1.0, 5.0, 15.0, 30.0)  # seconds before an engine is started again
_STEADY = 60.0  # seconds after which an engine's end is no longer one of a row
_GRACE = 25.0  # seconds that an engine has to stop in
_HOUSEKEEPING = 30.0  # seconds between two looks for what has expired


@dataclass
class _Place:
    """One of the engines, and those that took its place."""

    number: int
    process: subprocess.Popen | None = None
    name: str = ""
    ready: bool = False


class Workers:
    """The engines of a server.

    options:  flags of every engine but --store and --worker, such as ["--model", DIR]
    keep:     seconds for which finished clips are kept; None: until they are deleted
    unused_paths: seconds after which base paths go that were not used
    on_event: called, in a thread of its own, with what engines say (engine.py)
    command:  starts an engine; the flags are appended

    info:     the model, once an engine has read it; `wait_ready` waits for it
    error:    why no engine can run. If the model cannot be used, none is tried again
    restarts: engines that had to be started again
    """

    def __init__(
        self,
        store: Store,
        options: Sequence[str] = (),
        *,
        count: int = 1,
        keep: float | None = None,
        unused_paths: float = 7 * 86400.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "vfengine.serving.engine"),
    ) -> None:
        self.store, self.keep, self.unused_paths = store, keep, unused_paths
        self.info: ModelInfo | None = None
        self.error: str | None = None
        self.restarts = 0
        self._on_event = on_event
        self._command = [*command, *options, "--store", str(store.folder)]
        if keep is not None:
            self._command += ["--keep", repr(keep)]
        if count > 1 and "--threads" not in options:
            threads = max(1, len(os.sched_getaffinity(0)) // count) if _LINUX else 1
            self._command += ["--threads", str(threads)]
        self._places = [_Place(number) for number in range(count)]
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._known = threading.Event()  # info or error
        self._stopping = threading.Event()

    # -- what the server does ----------------------------------------------------------------------

    def start(self) -> None:
        """Queues again what an earlier server was at, and starts the engines.

        Raises ValueError where another server uses the store.
        """
        self.store.hold()
        self.store.recover((), self.keep, outage=True)
        watchers = [
            threading.Thread(target=self._watch, args=(place,), name=f"engine {place.number}")
            for place in self._places
        ]
        self._threads = [*watchers, threading.Thread(target=self._keep_house, name="housekeeping")]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def wait_ready(self, timeout: float | None = None) -> ModelInfo | None:
        """The model, once it is read; None after the timeout, or where there is an error."""
        self._known.wait(timeout)
        return self.info

    def wake(self) -> None:
        """Tells all engines that there may be work."""
        with self._lock:
            for place in self._places:
                _write_line(place.process)

    def stop(self) -> None:
        """Ends all engines; they give back what they were at."""
        self._stopping.set()
        with self._lock:
            processes = [place.process for place in self._places if place.process is not None]
            for process in processes:
                _close(process)
        end = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for thread in self._threads:
            thread.join()
        self.store.recover((), self.keep)  # of engines that were killed
        self.store.let_go()

    @property
    def alive(self) -> int:
        """How many engines take work."""
        return sum(place.ready for place in self._places)

    @property
    def pids(self) -> list[int]:
        """The engines' process ids."""
        with self._lock:
            return [place.process.pid for place in self._places if place.process is not None]

    # -- one thread each ---------------------------------------------------------------------------

    def _watch(self, place: _Place) -> None:
        """Keeps one engine running until the server stops."""
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                status = self._lived(place)
            except OSError as error:  # no process could be started
                status = error
            if self._stopping.is_set():
                return
            if status == 2 and self.info is None:  # the model cannot be used
                self.error = self.error or "the engine cannot be started"
                self._known.set()
                return
            failures = 1 if time.monotonic() - started > _STEADY else failures + 1
            self.restarts += 1
            log(f"vfengine: an engine ended with status {status}")
            if failures >= len(_BACKOFF) and self.info is None:
                self.error = f"no engine starts: they end with status {status}"
            self._stopping.wait(_BACKOFF[min(failures, len(_BACKOFF)) - 1])

    def _lived(self, place: _Place) -> int | None:
        """Starts an engine, hears it to its end, and returns its status."""
        with self._lock:
            if self._stopping.is_set():
                return None
            place.name = f"engine-{place.number}-{os.urandom(4).hex()}"
            place.process = process = subprocess.Popen(
                [*self._command, "--worker", place.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the server, which then stops its engines
            )
        for line in process.stdout:
            self._heard(place, line)
        status = process.wait()
        place.ready = False
        with self._lock:
            _close(process)
            place.process = None
        while not self._recovered() and not self._stopping.wait(_BACKOFF[1]):
            pass
        return status

    def _recovered(self) -> bool:
        """Queues again what engines that have ended were at; False where the disk is full."""
        with self._lock:
            names = [place.name for place in self._places if place.process is not None]
            try:
                again = self.store.recover(names, self.keep)
            except (OSError, sqlite3.Error) as error:
                if not is_of_the_machine(error):
                    raise
                log_error(error)
                return False
        if again:
            self.wake()
        return True

    def _heard(self, place: _Place, line: str) -> None:
        """Takes in what an engine says."""
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError):
            log(f"vfengine: an engine said {line.rstrip()[:200]!r}")
            return
        if kind == "ready":
            self.info, self.error = ModelInfo.of(event["model"]), None
            place.ready = True
            self._known.set()
        elif kind == "error":
            self.error = event["message"]
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception as error:  # of the caller's: the engine goes on
                log_error(error)

    def _keep_house(self) -> None:
        """Removes what has expired."""
        while not self._stopping.is_set():
            try:
                self.store.expire(time.time(), self.unused_paths)
            except (OSError, sqlite3.Error) as error:  # there is another time
                log_error(error)
            self._stopping.wait(_HOUSEKEEPING)


_LINUX = hasattr(os, "sched_getaffinity")


def _write_line(process: subprocess.Popen | None) -> None:
    if process is None or process.stdin is None or process.stdin.closed:
        return
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except OSError:
        return  # it has just ended: its watcher sees to that


def _close(process: subprocess.Popen) -> None:
    try:
        if process.stdin is not None:
            process.stdin.close()
    except OSError:
        return  # a line was left in the buffer of a pipe that nobody reads
