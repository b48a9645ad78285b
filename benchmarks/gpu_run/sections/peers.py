"""Other libraries on the same work: diffusers' UNet3D, and torch.compile on our own VDM*.

A step is the network and DDIM's line for all frames. Eager, captured by hand in a CUDA graph, and
compiled with mode="reduce-overhead", weights in channels_last, attention as each brings it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from lib.table4_models import SCHEDULE, Networks, make_noise, size
from torch import Tensor, nn

from gpu_run.sections import DEVICE, DRY, PREPARE, emit, guarded
from gpu_run.sections.table4 import seconds

Way = Callable[[nn.Module, Tensor], Callable[[], object]]  # network and noise to one step's call

STEPS = 2 if DRY else 10
ROUNDS = 5
CASES = (  # size, network, its name, ways: compiling takes longest, diffusers' above all
    ("large", "peer", "diffusers UNet3D", ("eager", "captured")),
    ("large", "video", "VDM*", ("eager", "captured")),
    ("default", "video", "VDM*", ("eager", "captured", "compiled, captured", "compiled")),
    ("large", "video", "VDM*", ("compiled, captured", "compiled")),
    ("large", "peer", "diffusers UNet3D", ("compiled",)),
)


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
    for size_name, network, name, ways in CASES:
        if PREPARE and "compiled" not in ways:
            continue
        case = f"{size_name}, 1 clip"
        shape = size("tiny" if DRY else size_name)
        with guarded(case, contender=name, dtype="bf16"), torch.no_grad():
            networks = Networks(shape, DEVICE, torch.bfloat16, keep=True)
            noise = make_noise(shape, DEVICE, clips=1)
            model = networks(network)
            channels_last(model)
            step = Step(model).to(DEVICE).eval()
            for way in ways if not PREPARE else ("compiled",):
                with guarded(case, contender=f"{name}, {way}", dtype="bf16"):
                    measure(case, f"{name}, {way}", WAYS[way], step, noise.clip)


def channels_last(model: nn.Module) -> None:
    """Weights of convolutions of both kinds, where they lie."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)


def eager(step: nn.Module, z: Tensor) -> Callable[[], object]:
    state = z.clone()
    return lambda: state.copy_(step(state))


def captured(step: nn.Module, z: Tensor) -> Callable[[], object]:
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


def compiled(step: nn.Module, z: Tensor) -> Callable[[], object]:
    if DRY:
        return eager(step, z)
    state = z.clone()
    fast = torch.compile(step, mode="reduce-overhead", dynamic=False)

    def call() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return state.copy_(fast(state))

    return call


def compiled_and_captured(step: nn.Module, z: Tensor) -> Callable[[], object]:
    """The compiler's kernels in a graph of ours, in case the compiler makes none."""
    return captured(step if DRY else torch.compile(step, dynamic=False), z)


WAYS = {
    "eager": eager,
    "captured": captured,
    "compiled": compiled,
    "compiled, captured": compiled_and_captured,
}


def measure(case: str, name: str, way: Way, step: nn.Module, z: Tensor) -> None:
    if not DRY:
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    call = way(step, z)
    first = seconds(call)
    if PREPARE:
        return
    for _ in range(3):
        call()
    times = [seconds(lambda: [call() for _ in range(STEPS)]) / STEPS * 1e3 for _ in range(ROUNDS)]
    median = statistics.median(times)
    place = {"dtype": "bf16", "graph": way is not eager, "n": ROUNDS}
    emit(case, name, "per step", median, "ms", spread=(max(times) - min(times)) / median, **place)
    emit(case, name, "first call", first, "s", **place)
    if not DRY:
        reserved = torch.cuda.max_memory_reserved() / 2**30
        emit(case, name, "reserved", reserved, "GiB", **place)


if __name__ == "__main__":
    main()
