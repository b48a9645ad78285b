"""The default clip from the shipped model: seconds from a cold start, by phase, and by dtype.

Also the difference between clips made on one thread and on two: the noise is the same bit for bit,
but convolutions and matrix products add in another order.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lib.harness import Row, main

from vfengine import VideoFusionPipeline
from vfengine.pipelines.videofusion import to_uint8

LABEL = "cartwheel"


def command(dtype: str, steps: int, rounds: int) -> list[Row]:
    """Medians over runs of `python -m vfengine.generate --json`, each a process of its own."""
    records = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / f"{LABEL}.mp4"
            arguments = ["--label", LABEL, "--output", str(output), "--json", "--device", "cpu"]
            arguments += ["--dtype", dtype]
            arguments += ["--num-inference-steps", str(steps)]
            run = [sys.executable, "-m", "vfengine.generate", *arguments]
            done = subprocess.run(run, check=True, capture_output=True, text=True)
            records.append(json.loads(done.stdout))
    case = f"command, {dtype}, {steps} steps"
    rows = [
        Row(case, "vfengine", phase, statistics.median(r["timings"][phase] for r in records), "s")
        for phase in ("startup", "load", "base", "residual", "write", "total")
    ]
    peak = statistics.median(r["peak_memory"]["process"] for r in records)
    return [*rows, Row(case, "vfengine", "peak memory", peak / 2**20, "MiB")]


def threads(dtype: torch.dtype, steps: int) -> list[Row]:
    """Pixels of the clip sampled on one thread against those on two."""
    clips, before = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        pipeline = VideoFusionPipeline.from_pretrained(device="cpu", dtype=dtype)
        clips.append(to_uint8(pipeline(LABEL, num_inference_steps=steps).frames).astype(np.int16))
    torch.set_num_threads(before)
    difference = np.abs(clips[0] - clips[1])
    case = f"1 thread against 2, {str(dtype).removeprefix('torch.')}, {steps} steps"
    return [
        Row(case, "vfengine", "largest", float(difference.max()), "of 255"),
        Row(case, "vfengine", "mean", float(difference.mean()), "of 255"),
        Row(case, "vfengine", "equal", 100 * float((difference == 0).mean()), "% of pixels"),
    ]


def measure(steps: int = 50, rounds: int = 3) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows += command(dtype, steps, rounds)
        rows += threads(getattr(torch, dtype), steps)
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_default_clip(benchmark, dtype, short):
    pipeline = VideoFusionPipeline.from_pretrained(device="cpu", dtype=getattr(torch, dtype))
    if short:
        benchmark.pedantic(pipeline, args=(LABEL,), kwargs={"num_inference_steps": 2}, rounds=1)
        return
    benchmark.pedantic(pipeline, args=(LABEL,), rounds=2, warmup_rounds=1)


if __name__ == "__main__":
    main(measure, __doc__)
