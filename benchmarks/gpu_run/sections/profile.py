"""The kernels that one replayed step of each network launches: their names, number and time.

It is a step of the sampling loop, solver included. The list shows what to optimise next. How long
the candidates of each measured choice took (vfengine/ops/_tuning.py) is in the log.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from lib.table4_models import Networks, size
from lib.table4_ways import ddim, step_loops
from torch.profiler import ProfilerActivity

from gpu_run.sections import DEVICE, DRY, emit, guarded
from vfengine.ops._tuning import measured

SIZES = ("large", "default", "paper")
STEPS = 5 if DRY else 20
SHOWN = 25  # kernels of a step, by time; the others are one row


def short(name: str) -> str:
    """A kernel's name without return type, namespaces and arguments; templates by their head."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"^(void|static|__global__)\s+", "", name.split("(", 1)[0])
    head, _, rest = name.partition("<")
    head = head.rsplit("::", 1)[-1]
    inner = re.sub(r"\b\w+::", "", rest)
    return f"{head}<{inner}"[:90] if rest else head[:90]


def main() -> None:
    for name in SIZES[:1] if DRY else SIZES:
        with guarded(name), torch.inference_mode():
            networks = Networks(size("tiny" if DRY else name), DEVICE, torch.bfloat16, keep=True)
            for network, (loop, start) in step_loops(networks, ddim(STEPS)).items():
                with guarded(f"{name}, {network}", graph=True, dtype="bf16"):
                    step = loop.stepper(capture=True, at_once=1)
                    loop.start(*start)
                    measure(f"{name}, {network}", step)
    for key, times in measured().items():
        print(f"{key}: {times} ms")


def measure(case: str, step) -> None:
    step()
    activity = ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profiled:
        for _ in range(2):
            step()
        if not DRY:
            torch.cuda.synchronize()
    counts, times = defaultdict(float), defaultdict(float)
    for event in profiled.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device or DRY:
            time = event.self_cpu_time_total if DRY else event.device_time_total
            counts[short(event.name)] += 1 / 2
            times[short(event.name)] += time / 2
    place = {"dtype": "bf16", "graph": not DRY, "n": 2}
    emit(case, "all", "kernels", sum(counts.values()), "", **place)
    emit(case, "all", "time", sum(times.values()), "us", **place)
    ranked = sorted(times, key=times.get, reverse=True)
    for name in ranked[:SHOWN]:
        emit(case, name, "count", counts[name], "", **place)
        emit(case, name, "time", times[name], "us", **place)
    if rest := ranked[SHOWN:]:
        emit(case, f"{len(rest)} others", "count", sum(counts[n] for n in rest), "", **place)
        emit(case, f"{len(rest)} others", "time", sum(times[n] for n in rest), "us", **place)


if __name__ == "__main__":
    main()
