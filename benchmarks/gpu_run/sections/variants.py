"""Choices that a GPU decides: steps in a graph, how kernels are launched, backends of ops."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from lib.table4_models import Networks, size
from lib.table4_ways import ddim, step_loops

from gpu_run.sections import BACKENDS, DEVICE, DRY, emit, guarded
from gpu_run.sections.table4 import seconds
from vfengine.sampling.cuda_graph import Stepper
from vfengine.sampling.loop import Loop

SIZES = ("default", "large")
ROUNDS = 5
STEPS = 5 if DRY else 20


def main() -> None:
    for name in SIZES[:1] if DRY else SIZES:
        with guarded(name, dtype="bf16"), torch.inference_mode():
            networks = Networks(size("tiny" if DRY else name), DEVICE, torch.bfloat16, keep=True)
            for network in ("base", "residual", "video"):
                for variant, make in VARIANTS.items():
                    with guarded(f"{name}, {network}", contender=variant, dtype="bf16"):
                        loops = step_loops(networks, ddim(STEPS))  # new ones: they capture anew
                        loop, start = loops[network]
                        measure(f"{name}, {network}", variant, loop, start, make)


def switched(variable: str, value: str) -> Callable[[Loop], Stepper]:
    """Captures with an environment variable at this value."""

    def make(loop: Loop) -> Stepper:
        former = os.environ.get(variable)
        os.environ[variable] = value
        try:
            return loop.stepper(capture=True)
        finally:
            if former is None:
                del os.environ[variable]
            else:
                os.environ[variable] = former

    return make


VARIANTS = {
    "as it is": lambda loop: loop.stepper(capture=True),
    "1 step a graph": lambda loop: loop.stepper(capture=True, at_once=1),
    "no dependent launches": switched("VFENGINE_PDL", "off"),
    "every op in Triton": switched("VFENGINE_KERNEL_BACKEND", BACKENDS[0] if DRY else "triton"),
    "attention by SDPA": switched("VFENGINE_ATTENTION_BACKEND", "sdpa"),
}


def measure(case: str, variant: str, loop: Loop, start: tuple, make) -> None:
    stepper = make(loop)
    times = []
    for _ in range(ROUNDS):
        loop.start(*start)
        times.append(seconds(lambda: loop.run(stepper)) / len(loop) * 1e6)
    median = statistics.median(times)
    place = {"dtype": "bf16", "graph": True, "n": ROUNDS}
    emit(case, variant, "time", median, "us", spread=(max(times) - min(times)) / median, **place)


if __name__ == "__main__":
    main()
