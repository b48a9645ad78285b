"""Table 4 on a GPU: VDM* and the ways to sample a decomposed model, graphs off and on.

Loops are made once and kept, as a pipeline keeps them; contenders take turns in making a clip.
Per step is per clip: of a batch, and of K clips on one base path, a clip's share.
"""

from __future__ import annotations

import statistics
import time

import torch
from lib.table4_models import SHARING, Networks, Noise, size
from lib.table4_ways import BASE_KEPT, INTERLEAVED, OVERLAPPED, SHARED, VDM, kept

from gpu_run.sections import DEVICE, DRY, PREPARE, emit, guarded, prepared_in_parts
from vfengine.diffusion.noise import decomposed_noise

CASES = (  # size, clips, steps with graphs off and on; those that targets are for come first
    ("large", 1, 6, 30),
    ("paper", 1, 4, 10),
    ("default", 16, 10, 30),
    ("default", 1, 10, 50),
)
NAMES = (VDM, BASE_KEPT, OVERLAPPED, INTERLEAVED, SHARED)
ROUNDS = 3


def main() -> None:
    cases = CASES[-1:] if DRY else CASES
    if PREPARE:
        names = [f"{size}/{clips}" for size, clips, *_ in cases]
        part = prepared_in_parts("table4", names)
        if part is None:
            return
        cases = [case for case in cases if part == f"{case[0]}/{case[1]}"]
    networks: dict[str, Networks] = {}
    for graph in (True, False) if not PREPARE else (True,):
        for size_name, clips, eager, captured in cases:
            case = f"{size_name}, {clips} clip{'s' if clips > 1 else ''}"
            with guarded(case):
                if size_name not in networks:
                    shape = size("tiny" if DRY else size_name)
                    networks[size_name] = Networks(shape, DEVICE, torch.bfloat16, keep=True)
                steps = 2 if DRY or PREPARE else captured if graph else eager
                measure(case, networks[size_name], clips, graph, steps)


def measure(case: str, networks: Networks, clips: int, graph: bool, steps: int) -> None:
    calls = {}
    for name in NAMES[:2] if PREPARE else NAMES:  # these have every kernel
        if name == SHARED and clips > 1:
            continue  # a batch of its own
        with guarded(case, contender=name, dtype="bf16", graph=graph):
            noise = make_noise(networks, clips, SHARING if name == SHARED else clips)
            call = kept(name, networks, noise, steps, graph)
            finite(call())
            calls[name] = call
    if PREPARE:
        return
    share = {name: SHARING if name == SHARED else clips for name in calls}
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call) / steps / share[name] * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        place = {"dtype": "bf16", "graph": graph, "n": ROUNDS}
        spread = (max(values) - min(values)) / medians[name]
        emit(case, name, "per step", medians[name], "ms", spread=spread, **place)
        if VDM in medians:
            emit(case, name, "per step / VDM*", medians[name] / medians[VDM], "", **place)


def make_noise(networks: Networks, batch: int, clips: int) -> Noise:
    shape = networks.size
    sizes = (max(batch, clips), shape.frames, 3, shape.pixels, shape.pixels)
    noise = decomposed_noise(sizes, base_seed=0, residual_seed=1, device=DEVICE)
    return Noise(noise.base[:batch].clone(), noise.residual)


def finite(clip: torch.Tensor) -> None:
    if not clip.isfinite().all():
        raise ValueError("the clip is not finite")


def seconds(call) -> float:
    start = now()
    call()
    return now() - start


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if not DRY:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
