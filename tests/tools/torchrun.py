"""Commands under torchrun, and their workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400  # after which a command hangs; some ten suffice where cores are free


def start(*argv: object, count: int = 2, flags: Sequence[str] = ()) -> subprocess.Popen:
    """`count` processes of `python ARGV`; their stderr, and torchrun's, in a pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), *flags, *map(str, argv)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environ, start_new_session=True, **pipes)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, once it has ended; one that hangs is ended, and fails."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise AssertionError(f"hangs: {process.communicate()}") from None
    return process.returncode, out, err


def until(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
    """Waits for something that the processes do."""
    last = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None and time.monotonic() < last, end(process)
        time.sleep(0.02)


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")
