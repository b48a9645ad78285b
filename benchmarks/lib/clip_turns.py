"""A clip end to end, by this vfengine and by an older one, in turns.

Two versions do not fit in one process, so each runs in its own and waits while the other makes a
clip: label cartwheel, 50 steps of DDIM, guidance 2, networks loaded and warm.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import vfengine
from lib import child_environment
from lib.harness import Row

LABEL, STEPS = "cartwheel", 50
HOW = {"solver": "ddim", "guidance_scale": 2.0}
NOW, BEFORE = "vfengine", "vfengine, before"
HERE = str(Path(vfengine.__file__).resolve().parent.parent)


def check_before(path: str) -> str:
    """The value of --before: a checkout, or folders as in PYTHONPATH; ValueError if neither."""
    if any((Path(entry) / "vfengine" / "__init__.py").exists() for entry in _entries(path)):
        return path
    raise ValueError(f"--before expects a checkout of vfengine, or a PYTHONPATH with one: {path}")


def _entries(path: str) -> list[str]:
    return [entry for entry in path.split(os.pathsep) if entry]


class Worker:
    """A process that makes clips with the vfengine found on `path`; variables: of it alone."""

    def __init__(self, path: str, dtype: str, variables: Mapping[str, str] | None = None) -> None:
        environment = child_environment() | dict(variables or {})
        entries = [*_entries(path), *_entries(environment["PYTHONPATH"])]
        environment["PYTHONPATH"] = os.pathsep.join(entries)
        self._process = subprocess.Popen(
            [sys.executable, __file__, dtype],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Path(self._answer()).resolve()
        if not any(found.is_relative_to(Path(entry).resolve()) for entry in _entries(path)):
            self.close()
            raise RuntimeError(f"vfengine was expected in {path} and found in {found}")

    def clip(self) -> float:
        """Makes one clip; seconds."""
        self._process.stdin.write("clip\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"a process that makes clips ended with {self._process.wait()}")
        return line


def clip_rows(dtype: str, rounds: int, before: str | None) -> list[Row]:
    """Medians of `rounds` clips each; before: see check_before, None: only this vfengine."""
    case = f"clip, {dtype}"
    paths = {NOW: HERE, **({BEFORE: before} if before else {})}
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {name: [] for name in paths}
    try:
        for name, path in paths.items():
            workers[name] = Worker(path, dtype)
        for _ in range(rounds):
            for name, worker in workers.items():
                times[name].append(worker.clip())
    finally:
        for worker in workers.values():
            worker.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, value in medians.items():
        rows += [
            Row(case, name, "time", value, "s"),
            Row(case, name, "slowest / fastest", max(times[name]) / min(times[name]), ""),
            Row(case, name, "time / vfengine", value / medians[NOW], "x"),
        ]
    return rows


def _work(dtype: str) -> None:
    """The worker: says where its vfengine is, then seconds for every line on stdin."""
    import torch

    precision = getattr(torch, dtype)
    pipeline = vfengine.VideoFusionPipeline.from_pretrained(device="cpu", dtype=precision)
    pipeline(LABEL, num_inference_steps=2, **HOW)
    print(vfengine.__file__, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        pipeline(LABEL, num_inference_steps=STEPS, **HOW)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _work(sys.argv[1])
