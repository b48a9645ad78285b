"""The default clip from the shipped model: seconds from a cold start, by phase, and by dtype.

In its usual steps, and in 50 of DDIM. `clip` is a warm one: networks loaded, after another one.

Also the difference between clips made on one thread and on two: the noise is the same bit for bit,
but convolutions and matrix products add in another order.

--neighbours K: only what the clip takes on a busy machine, where K single-threaded processes are
pinned to its cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.clip_turns import HERE, Worker
from lib.harness import Row, Target, main
from lib.neighbours import fair_share, neighbours

from vfengine import VideoFusionPipeline
from vfengine.cli.start import wait_briefly
from vfengine.devices import chosen_dtype
from vfengine.pipelines.videofusion import to_uint8

LABEL = "cartwheel"
PHASES = ("startup", "load", "text", "base", "residual", "decode", "write", "total")
WAYS = ({}, {"num_inference_steps": 50, "solver": "ddim"})
TARGETS = (
    Target("command, bfloat16, usual steps", "vfengine", "total", 6, at_most=True),
    Target("clip, bfloat16", "usual steps", "time", 2, at_most=True),
)
SHARED = "times the fair share"


def command(dtype: str, how: dict[str, Any], rounds: int) -> list[Row]:
    """Medians over runs of `python -m vfengine.generate --json`, each a process of its own."""
    records = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / f"{LABEL}.mp4"
            arguments = ["--label", LABEL, "--output", str(output), "--json", "--device", "cpu"]
            arguments += ["--dtype", dtype]
            for name, value in how.items():
                arguments += [f"--{name.replace('_', '-')}", str(value)]
            run = [sys.executable, "-m", "vfengine.generate", *arguments]
            done = subprocess.run(run, check=True, capture_output=True, text=True)
            records.append(json.loads(done.stdout))
    case = f"command, {dtype}, {named(how)}"
    rows = [
        Row(case, "vfengine", phase, statistics.median(r["timings"][phase] for r in records), "s")
        for phase in PHASES
    ]
    peak = statistics.median(r["peak_memory"]["process"] for r in records)
    return [*rows, Row(case, "vfengine", "peak memory", peak / 2**20, "MiB")]


def named(how: dict[str, Any]) -> str:
    return " ".join(map(str, how.values())) or "usual steps"


def warm(dtype: torch.dtype, ways: Sequence[dict[str, Any]], rounds: int = 5) -> list[Row]:
    """Medians of a clip's seconds; the ways take turns."""
    pipeline = VideoFusionPipeline.from_pretrained(device="cpu", dtype=dtype)
    pipeline.keep_parts()
    contenders = {named(how): partial(pipeline, LABEL, offload_base=False, **how) for how in ways}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):  # the first loads everything and is not counted
        for name, clip in contenders.items():
            started = time.perf_counter()
            clip()
            if turn >= 0:
                times[name].append(time.perf_counter() - started)
    case = f"clip, {str(dtype).removeprefix('torch.')}"
    return [Row(case, name, "time", statistics.median(found), "s") for name, found in times.items()]


def threads(dtype: torch.dtype, how: dict[str, Any]) -> list[Row]:
    """Pixels of the clip sampled on one thread against those on two."""
    clips, before = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        pipeline = VideoFusionPipeline.from_pretrained(device="cpu", dtype=dtype)
        clips.append(to_uint8(pipeline(LABEL, **how).frames).astype(np.int16))
    torch.set_num_threads(before)
    difference = np.abs(clips[0] - clips[1])
    case = f"1 thread against 2, {str(dtype).removeprefix('torch.')}, {named(how)}"
    return [
        Row(case, "vfengine", "largest", float(difference.max()), "of 255"),
        Row(case, "vfengine", "mean", float(difference.mean()), "of 255"),
        Row(case, "vfengine", "equal", 100 * float((difference == 0).mean()), "% of pixels"),
    ]


def measure(rounds: int = 3) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        for how in WAYS:
            rows += command(dtype, how, rounds)
        rows += warm(getattr(torch, dtype), WAYS)
        rows += threads(getattr(torch, dtype), WAYS[0])
    return rows


def busy(count: int, rounds: int = 3) -> list[Row]:
    """Seconds of a warm clip of 50 steps of DDIM, alone and with `count` neighbours in turns."""
    dtype = str(chosen_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    rows, fair = [], fair_share(count)
    for threads in sorted({1, torch.get_num_threads()}):
        given = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        variables = {name: os.environ[name] for name in given if name in os.environ}
        variables["OMP_NUM_THREADS"] = str(threads)
        wait_briefly(variables)  # as the command does
        worker = Worker(HERE, dtype, variables)
        times: dict[int, list[float]] = {0: [], count: []}
        try:
            for _ in range(rounds):
                for number, seconds in times.items():
                    with neighbours(number):
                        seconds.append(worker.clip())
        finally:
            worker.close()
        alone, shared = (statistics.median(seconds) for seconds in times.values())
        case = f"clip, {dtype}, {count} neighbours" + (", one thread" if threads == 1 else "")
        rows += [
            Row(case, "vfengine", "alone", alone, "s"),
            Row(case, "vfengine", "with neighbours", shared, "s"),
            Row(case, "vfengine", "with neighbours / alone", shared / alone, "x"),
            Row(case, "vfengine", "fair share", fair, "x"),
            Row(case, "vfengine", SHARED, shared / alone / fair, "x"),
        ]
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_default_clip(benchmark, dtype, short):
    pipeline = VideoFusionPipeline.from_pretrained(device="cpu", dtype=getattr(torch, dtype))
    if short:
        benchmark.pedantic(pipeline, args=(LABEL,), kwargs={"num_inference_steps": 2}, rounds=1)
        return
    benchmark.pedantic(pipeline, args=(LABEL,), rounds=2, warmup_rounds=1)


def bench_busy_machine(benchmark, short):
    """One clip beside two neighbours."""
    pipeline = VideoFusionPipeline.from_pretrained(device="cpu")
    with neighbours(2):
        steps = {"solver": "ddim", "num_inference_steps": 2 if short else 50}
        benchmark.pedantic(pipeline, args=(LABEL,), kwargs=steps, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--neighbours", type=int, metavar="K", help="beside K busy processes")
    count = parser.parse_known_args()[0].neighbours
    if count is None:
        main(measure, __doc__, TARGETS)
    else:
        cases = [f"clip, {dtype}, {count} neighbours" for dtype in ("bfloat16", "float32")]
        targets = [Target(case, "vfengine", SHARED, 1.3, at_most=True) for case in cases]
        main(partial(busy, count), __doc__, targets, parser)
