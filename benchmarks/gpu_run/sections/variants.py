"""Choices that a GPU decides: cuDNN's own search, steps in a graph, which backend of an op."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from lib.table4_models import Networks, size
from lib.table4_ways import ddim, step_loops

from gpu_run.sections import BACKENDS, DEVICE, DRY, emit, guarded
from gpu_run.sections.table4 import seconds
from vfengine.sampling.loop import Loop

SIZES = ("default", "large")
ROUNDS = 5
STEPS = 5 if DRY else 20
PER_GRAPH = 5  # steps


def main() -> None:
    for name in SIZES[:1] if DRY else SIZES:
        with guarded(name, dtype="bf16"), torch.inference_mode():
            networks = Networks(size("tiny" if DRY else name), DEVICE, torch.bfloat16, keep=True)
            for network in ("base", "residual", "video"):
                for variant, make in VARIANTS.items():
                    with guarded(f"{name}, {network}", contender=variant, dtype="bf16"):
                        loop, start = step_loops(networks, ddim(STEPS))[
                            network
                        ]  # a new one: it captures anew
                        measure(f"{name}, {network}", variant, loop, start, make)


def as_it_is(loop: Loop) -> tuple[Callable[[], object], int]:
    """A call, and the steps that it takes."""
    return loop.stepper(capture=True), 1


def cudnn_searches(loop: Loop) -> tuple[Callable[[], object], int]:
    former = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        return loop.stepper(capture=True), 1
    finally:
        torch.backends.cudnn.benchmark = former


def triton_ops(loop: Loop) -> tuple[Callable[[], object], int]:
    former = os.environ.get("VFENGINE_KERNEL_BACKEND")
    os.environ["VFENGINE_KERNEL_BACKEND"] = BACKENDS[0] if DRY else "triton"
    try:
        return loop.stepper(capture=True), 1
    finally:
        if former is None:
            del os.environ["VFENGINE_KERNEL_BACKEND"]
        else:
            os.environ["VFENGINE_KERNEL_BACKEND"] = former


def sdpa_attention(loop: Loop) -> tuple[Callable[[], object], int]:
    os.environ["VFENGINE_ATTENTION_BACKEND"] = "sdpa"
    try:
        return loop.stepper(capture=True), 1
    finally:
        del os.environ["VFENGINE_ATTENTION_BACKEND"]


def several_steps(loop: Loop) -> tuple[Callable[[], object], int]:
    single = loop.step
    loop.step = lambda: [single() for _ in range(PER_GRAPH)]
    return loop.stepper(capture=True), PER_GRAPH


VARIANTS = {
    "as it is": as_it_is,
    "cudnn.benchmark": cudnn_searches,
    "every op in Triton": triton_ops,
    "attention by SDPA": sdpa_attention,
    f"{PER_GRAPH} steps a graph": several_steps,
}


def measure(case: str, variant: str, loop: Loop, start: tuple, make) -> None:
    call, steps = make(loop)
    times = []
    for _ in range(ROUNDS):
        loop.start(*start)
        count = len(loop) // steps
        times.append(seconds(lambda n=count: [call() for _ in range(n)]) / (count * steps) * 1e6)
    median = statistics.median(times)
    place = {"dtype": "bf16", "graph": True, "n": ROUNDS}
    emit(case, variant, "time", median, "us", spread=(max(times) - min(times)) / median, **place)


if __name__ == "__main__":
    main()
