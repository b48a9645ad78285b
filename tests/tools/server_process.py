"""A real server in a process of its own: its engines, its memory, its ends. Linux."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 120.0  # seconds for what should take one


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ServerProcess:
    """`python -m vfengine.serve` at a free port of loopback; takes requests once `start` is over.

    log:       a file, to which what the processes print is appended
    variables: of their environment, beside those of this process
    """

    def __init__(
        self, store: Path, log: Path, *flags: object, variables: Mapping[str, str] | None = None
    ) -> None:
        self.store, self.log = store, log
        self._variables = {**os.environ, **(variables or {})}
        self._flags = [*map(str, flags), "--store", str(store), "--port", "0"]
        self.process: subprocess.Popen | None = None
        self.port = self._before = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Starts the process, and waits for nothing."""
        self._before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "vfengine.serve", *self._flags]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._variables)

    def start(self) -> None:
        """Starts it; RuntimeError, with what was printed, where it takes no requests."""
        self.launch()
        said, sign = "", "listening on http://127.0.0.1:"
        end = time.monotonic() + PATIENCE
        while sign not in said or not said.partition(sign)[2].count("\n"):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not start: {said}")
            time.sleep(0.02)
            with self.log.open() as log:
                log.seek(self._before)
                said = log.read()
        self.port = int(said.partition(sign)[2].split()[0])

    def engines(self) -> list[int]:
        """Process ids of its engines."""
        return children(self.process.pid)

    def end(self, number: int) -> int:
        """Sends a signal, and waits for the end of the server; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def stop(self) -> int:
        return self.end(signal.SIGTERM)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object = None,
    **headers: str,
) -> Answer:
    """One exchange; body: JSON values. Raises OSError or HTTPException where it breaks off."""
    data = None if body is None else json.dumps(body)
    kind = {} if body is None else {"content-type": "application/json"}
    connection.request(
        method, path, data, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
    )
    answer = connection.getresponse()
    return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


def until(done: Callable[[], object], what: str, pause: float = 0.05) -> None:
    """Waits; RuntimeError once that is in vain."""
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"waited in vain: {what}")
        time.sleep(pause)


def children(parent: int) -> list[int]:
    """Process ids of a process's children that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (state := _state(int(entry.name))):
            if state[1] == str(parent) and state[0] != "Z":
                found.append(int(entry.name))
    return found


def runs(pid: int) -> bool:
    """Whether a process has not ended."""
    state = _state(pid)
    return state is not None and state[0] != "Z"


def resident(pid: int) -> float:
    """MiB of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid: int) -> float:
    """Seconds of cores that a process has used."""
    state = _state(pid)
    return sum(map(int, state[11:13])) / os.sysconf("SC_CLK_TCK")


def engine_processes(store: Path) -> list[int]:
    """Engines of a store that run, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "vfengine.serving.engine" in command and str(store) in command:
            found += [int(entry.name)] if runs(int(entry.name)) else []
    return found


def _state(pid: int) -> Sequence[str] | None:
    """Fields of /proc/PID/stat from the third on; None for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
