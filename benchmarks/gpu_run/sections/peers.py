"""torch.compile on our own VDM*, beside our loop of it.

A step is the network and DDIM's line for all frames. "eager" and "captured" are our loop, as a
pipeline runs it. What is compiled is the network's module, with weights in channels_last, which
anybody would write: by mode="reduce-overhead", and by the default mode in a CUDA graph of ours, in
case the compiler makes none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from lib.table4_models import SCHEDULE, Networks, Size, make_noise, size
from lib.table4_ways import VDM, kept
from torch import Tensor, nn

from gpu_run.sections import DEVICE, DRY, PREPARE, emit, guarded, prepared_in_parts
from gpu_run.sections.table4 import now, seconds

STEPS = 2 if DRY else 10
ROUNDS = 5
SIZES = ("large", "default")


class Step(nn.Module):
    """z <- c1 z + c2 ε̂(z, t), DDIM at η = 0, of one step in the middle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        t = SCHEDULE.timesteps(50)[25:26]
        a, p = (x(t).float().item() for x in (SCHEDULE.selected, SCHEDULE.selected_previous))
        self.c1 = (p / a) ** 0.5
        self.c2 = (1 - p) ** 0.5 - self.c1 * (1 - a) ** 0.5
        self.register_buffer("t", t, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.c1 * z + self.c2 * self.model(z, self.t.expand(len(z)))


def main() -> None:
    torch._logging.set_logs(perf_hints=True)  # why a compiled step runs without a graph, if it does
    sizes = SIZES[-1:] if DRY else SIZES
    if PREPARE:
        part = prepared_in_parts("peers", sizes)
        sizes = [name for name in sizes if name == part]
    for name in sizes:
        with guarded(f"{name}, 1 clip", dtype="bf16"), torch.no_grad():
            both(f"{name}, 1 clip", size("tiny" if DRY else name))


def both(case: str, shape: Size) -> None:
    networks = Networks(shape, DEVICE, torch.bfloat16, keep=True)
    noise = make_noise(shape, DEVICE, clips=1)
    if not PREPARE:
        for form, capture in (("eager", False), ("captured", True)):
            loop = partial(kept, VDM, networks, noise, STEPS, capture)
            measure(case, f"VDM*, {form}", loop, graph=capture, steps=STEPS)
    step = Step(channels_last(networks("plain"))).to(DEVICE).eval()
    measure(case, "VDM*, compiled, captured", lambda: captured(compiled(step), noise.clip))
    measure(case, "VDM*, compiled", lambda: reduced_overhead(step, noise.clip))


def channels_last(model: nn.Module) -> nn.Module:
    """Weights of convolutions of both kinds, where they lie."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    return model


def compiled(step: nn.Module, **how: object) -> nn.Module:
    return step if DRY else torch.compile(step, dynamic=False, **how)  # no dry run is for compilers


def reduced_overhead(step: nn.Module, z: Tensor) -> Callable[[], object]:
    state, fast = z.clone(), compiled(step, mode="reduce-overhead")

    def call() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return state.copy_(fast(state))

    return call


def eager(step: nn.Module, z: Tensor) -> Callable[[], object]:
    state = z.clone()
    return lambda: state.copy_(step(state))


def captured(step: nn.Module, z: Tensor) -> Callable[[], object]:
    """The replay of a step's graph."""
    if DRY:
        return eager(step, z)
    state, stream = z.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            state.copy_(step(state))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        state.copy_(step(state))
    return graph.replay


def measure(
    case: str,
    name: str,
    make: Callable[[], Callable[[], object]],
    graph: bool = True,
    steps: int = 1,
) -> None:
    """Times the call that `make` makes, which takes so many steps."""
    with guarded(case, contender=name, dtype="bf16"):
        if not DRY:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = now()
        call = make()
        call()
        first = now() - start
        if PREPARE:
            return
        call()
        count = max(STEPS // steps, 1)
        times = [
            seconds(lambda: [call() for _ in range(count)]) / (count * steps) * 1e3
            for _ in range(ROUNDS)
        ]
        median = statistics.median(times)
        spread = (max(times) - min(times)) / median
        place = {"dtype": "bf16", "graph": graph, "n": ROUNDS}
        emit(case, name, "per step", median, "ms", spread=spread, **place)
        emit(case, name, "first call", first, "s", **place)
        if not DRY:
            reserved = torch.cuda.max_memory_reserved() / 2**30
            emit(case, name, "reserved", reserved, "GiB", **place)


if __name__ == "__main__":
    main()
