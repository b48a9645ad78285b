"""What this CPU multiplies, bare, and what share of it a 3x3 convolution reaches.

Loops  (lib/core_loops.cpp) multiply and add numbers from L1 with each instruction that kernels
       could use, in the kernels' own shape, on one thread and on all. They are the ceilings, and
       tell which dtype pays: bfloat16 stored, multiplied in fp32, is one of them. FLOP are two a
       product, of integers as well
Convs  3x3 on 16 images in bf16: our own product, the form that a plan takes, and oneDNN with
       weights packed ahead, in turns with the best bf16 loop

    python benchmarks/bench_tiles.py [--json FILE]

On a CPU without AVX-512 or AMX the loops of what is missing are left out.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lib.harness import Row, Target, interleave, main, say
from lib.unet_ops import convolution as onednn_convolution
from torch import nn

from vfengine.native import vfengine_native
from vfengine.plan.builder import Builder
from vfengine.plan.forms import FeatureMap, ImplicitGemm, convolution

SOURCE = Path(__file__).parent / "lib" / "core_loops.cpp"
SHAPES = ((64, 32), (128, 32), (256, 32), (512, 16))  # channels, pixels across
IMAGES = 16
OURS, FORM, ONEDNN = "vfengine, direct", "vfengine, as planned", "oneDNN"
SHARE = "of the best bf16 loop"
TARGETS = [
    Target(f"conv 3x3, {channels} channels, {pixels}x{pixels}", OURS, SHARE, 60)
    for channels, pixels in SHAPES
    if channels >= 128 and vfengine_native.cpu_has_tiles()
]


class Loops:
    """The compiled loops that this CPU can run: `calls(threads)` gives {name: (call, products)}."""

    def __init__(self, folder: Path) -> None:
        library = folder / "core_loops.so"
        compiler = os.environ.get("CXX", "g++")
        flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp"]
        subprocess.run([compiler, *flags, SOURCE, "-o", library], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.loop_name.restype = ctypes.c_char_p
        self._library.run_loop.restype = ctypes.c_double

    def calls(self, threads: int, rounds: int = 2000) -> dict[str, tuple[Callable[[], float], int]]:
        run = self._library.run_loop
        found = {}
        for loop in range(self._library.loop_count()):
            if self._library.loop_can_run(loop):
                call = lambda loop=loop: run(loop, threads, ctypes.c_long(rounds))  # noqa: E731
                found[self._library.loop_name(loop).decode()] = (call, int(call()))
        return found


def measure(seconds: float = 2.0) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loops = Loops(Path(folder))
        for threads in dict.fromkeys((1, torch.get_num_threads())):
            say(f"loops, {threads} threads")
            rows += loop_rows(loops, threads, seconds)
        for channels, pixels in SHAPES:
            say(f"conv 3x3, {channels} channels")
            rows += convolution_rows(loops, channels, pixels, seconds)
    return rows


def loop_rows(loops: Loops, threads: int, seconds: float) -> list[Row]:
    case = f"{threads} thread" + ("s" if threads > 1 else "")
    calls = loops.calls(threads)
    times = interleave({name: call for name, (call, _) in calls.items()}, seconds)
    speeds = {name: 2 * calls[name][1] / taken for name, taken in times.items()}
    rows = []
    for name, speed in speeds.items():
        rows.append(Row(case, name, "arithmetic", speed / 1e9, "GFLOP/s"))
        if "fp32" in speeds:
            rows.append(Row(case, name, "times fp32", speed / speeds["fp32"], "x"))
    return rows


def convolution_rows(loops: Loops, channels: int, pixels: int, seconds: float) -> list[Row]:
    flops = 2 * 9 * channels**2 * IMAGES * pixels**2
    calls = {
        OURS: planned(channels, pixels, ImplicitGemm.of),
        FORM: planned(channels, pixels, convolution),
        ONEDNN: onednn_convolution(channels, 1, pixels)[0],
    }
    bare = {
        name: call
        for name, call in loops.calls(torch.get_num_threads(), 500).items()
        if name.startswith("bf16")
    }
    times = interleave({**calls, **{name: call for name, (call, _) in bare.items()}}, seconds)
    case = f"conv 3x3, {channels} channels, {pixels}x{pixels}"
    speeds = {name: flops / times[name] for name in calls}
    ceiling = max((2 * bare[name][1] / times[name] for name in bare), default=None)
    rows = []
    for name, speed in speeds.items():
        rows.append(Row(case, name, "time", times[name] * 1e3, "ms"))
        rows.append(Row(case, name, "arithmetic", speed / 1e9, "GFLOP/s"))
        if ceiling:
            rows.append(Row(case, name, SHARE, 100 * speed / ceiling, "%"))
    return rows


def planned(channels: int, pixels: int, form: Callable) -> Callable[[], None]:
    """One convolution of a plan, in bf16 where plans have it, with random weights and pixels."""
    dtype = torch.bfloat16 if vfengine_native.cpu_has_bf16() else torch.float32
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    with torch.no_grad():
        made = form(layer, dtype)
    build = Builder(dtype)
    x = build.rows(IMAGES * pixels**2, channels)
    plan = SimpleNamespace(build=build, batch=1, frames=IMAGES, images=IMAGES)
    out = made.emit(plan, FeatureMap((x,), pixels, pixels))
    program = build.program(out.rows)
    program.view(x).copy_(torch.randn(x.count, x.width))
    return program.run


@pytest.mark.parametrize("part", ["loops", "convolution"])
def bench_tiles(benchmark, tmp_path, part, seconds):
    loops = Loops(tmp_path)
    if part == "loops":
        call, arguments = loop_rows, (loops, torch.get_num_threads(), seconds)
    else:
        call, arguments = convolution_rows, (loops, *SHAPES[0], seconds)
    rows = benchmark.pedantic(call, args=arguments, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]


if __name__ == "__main__":
    main(measure, __doc__, TARGETS)
