"""Single-threaded neighbours: processes that compute on cores that this one would like to have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself where its parent has gone without ending it.
_LOOP = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
print("running", flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """`count` busy loops, dealt out over the cores that this process may use; Linux."""
    cores = sorted(os.sched_getaffinity(0))
    loops: list[subprocess.Popen] = []
    try:
        for i in range(count):
            command = [sys.executable, "-S", "-c", _LOOP, str(cores[i % len(cores)])]
            loops.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for loop in loops:
            if loop.stdout.readline() != "running\n":
                raise RuntimeError(f"a neighbour ended with {loop.wait()}")
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
            loop.stdout.close()


def fair_share(count: int) -> float:
    """How many times as long work on all cores takes that shares them fairly with `count` loops."""
    return 1 + count / len(os.sched_getaffinity(0))
