"""A step over static buffers, captured once in a CUDA graph and replayed; run plainly on a CPU.

What can be captured: a step that reads and writes only memory that stays where it is, finds its
place in the tables from a counter on the device, never waits for the device and never branches on
its values. The steps of two_phase.py and interleaved.py are such (tests/sampling).

Threads: a process captures one graph at a time, and nothing may wait for the whole device or empty
torch's cache of memory meanwhile. All of that is done holding `exclusive`; replays never are.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..devices import tf32_products

Step = Callable[[], None]

_WARM_UP_STEPS = 2  # libraries choose algorithms and allocate workspaces in their first calls

# Held while a graph is captured, by whatever would break a capture on another thread: capturing,
# torch.cuda.synchronize, torch.cuda.empty_cache. To wait for one stream breaks none.
exclusive = threading.RLock()

_idle_streams: dict[tuple[int, str], list[torch.cuda.Stream]] = {}  # by device and use


def captured(step: Step, device: torch.device, before: Step) -> Step:
    """The replay of a CUDA graph that holds the step.

    step:   runs in inference mode
    before: called ahead of every warm-up step, to bring the counter back to where a step can run;
            warm-up and capture leave the buffers with values of no meaning

    The graph keeps a stream to itself, so that graphs may be replayed at the same time: libraries
    have a workspace for each stream, whose address is in the graph.

    Raises RuntimeError for a step that cannot be captured: it is not run eagerly instead.
    """
    with exclusive, torch.cuda.device(device):
        torch.cuda.synchronize(device)  # the stream's last graph may still be running
        graph, (stream, idle) = torch.cuda.CUDAGraph(), _take_stream(device, "capture")
        weakref.finalize(graph, idle.append, stream)
        here = torch.cuda.current_stream()
        try:
            stream.wait_stream(here)
            with torch.cuda.stream(stream), torch.inference_mode():
                for _ in range(_WARM_UP_STEPS):
                    before()
                    step()
                before()
            try:
                _capture(graph, stream, step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # Ending a broken capture raises once more; CUDA's own words go on for lines.
                cause = str(error.__context__ or error).partition("\n")[0]
                raise RuntimeError(
                    f"this step cannot be captured in a CUDA graph ({cause}); run it with "
                    "capture=False"
                ) from error
        finally:
            torch.cuda.set_stream(here)  # a capture that fails would leave the other one
            here.wait_stream(stream)
    return graph.replay


def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, step: Step) -> None:
    """Captures the step, as seen in inference mode, in a graph that is not.

    Of torch before 2.11, a capture begun in inference mode makes its generator's state there, and
    while that graph lives no other capture of the process can begin outside
    (github.com/pytorch/pytorch/issues/166792).
    """
    with (
        torch.inference_mode(False),
        # thread_local: what other threads ask of CUDA meanwhile is their own affair
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        torch.inference_mode(),
    ):
        step()


def empty_cache() -> None:
    """Gives memory that torch keeps back to the device, when no capture is underway."""
    with exclusive:
        torch.cuda.empty_cache()


@contextmanager
def side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream for what is to run beside the current one; work left on it is waited for in turn."""
    stream, idle = _take_stream(device, "side")
    try:
        yield stream
    finally:
        idle.append(stream)


def _take_stream(device: torch.device, use: str) -> tuple[torch.cuda.Stream, list]:
    """A stream, and the list to which it goes back when it is idle again.

    Torch hands out few and libraries keep memory for each, so there are never more than were in
    use at once.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    idle = _idle_streams.setdefault((index, use), [])
    try:
        return idle.pop(), idle
    except IndexError:
        return torch.cuda.Stream(device), idle


def weights_key(*modules: nn.Module) -> tuple:
    """Changes when a parameter or buffer of the modules is replaced or written to.

    A graph reads weights at the addresses that it was captured with, so a loop is only used again
    while this stays the same.
    """
    return tuple(
        (t.data_ptr(), t.dtype, t.shape, t.stride(), _version(t))
        for module in modules
        for t in _tensors(module)
    )


def surroundings_key(device: torch.device) -> tuple:
    """What else a graph would keep: settings of the process that choose how a step is computed."""
    names = ("VFENGINE_KERNEL_BACKEND", "VFENGINE_ATTENTION_BACKEND")
    return (
        *(os.environ.get(name) for name in names),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        *(_cuda_settings() if device.type == "cuda" else ()),
    )


def _cuda_settings() -> tuple:
    """Those of torch's CUDA libraries; None for what this torch has not."""
    cudnn, cuda, matmul = torch.backends.cudnn, torch.backends.cuda, torch.backends.cuda.matmul
    reductions = ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction")
    splits = (f"{name}_split_k" for name in reductions)
    attentions = ("flash", "mem_efficient", "math", "cudnn")
    return (
        tf32_products(),
        *(getattr(matmul, f"allow_{name}", None) for name in (*reductions, *splits)),
        getattr(matmul, "allow_fp16_accumulation", None),
        cuda.preferred_blas_library(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.benchmark_limit,
        cudnn.deterministic,
        *(getattr(cuda, f"{name}_sdp_enabled")() for name in attentions),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        tuple(getattr(torch._C, "_get_sdp_priority_order", tuple)()),
    )


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
