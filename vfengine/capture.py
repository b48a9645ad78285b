"""A step over static buffers, captured once in a CUDA graph and replayed; run plainly on a CPU.

What can be captured: a step that reads and writes only memory that stays where it is, finds its
place in the tables from a counter on the device, never waits for the device and never branches on
its values. The loops of vfengine/loops.py are such steps (tests/test_capture.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Step = Callable[[], None]

_WARM_UP_STEPS = 2  # libraries choose algorithms and allocate workspaces in their first calls


def captured(step: Step, device: torch.device, before: Step, name: str = "") -> Step:
    """The replay of a CUDA graph that holds the step.

    before: called ahead of every warm-up step, to bring the counter back to where a step can run;
            warm-up and capture leave the buffers with values of no meaning
    name:   graphs that may be replayed at the same time need different ones: libraries keep a
            workspace per stream, and each name is captured on a stream of its own

    Raises RuntimeError for a step that cannot be captured: it is not run eagerly instead.
    """
    with torch.cuda.device(device):
        here, stream = torch.cuda.current_stream(), side_stream(device, f"capture {name}")
        try:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_STEPS):
                    before()
                    step()
                before()
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what other threads ask of CUDA meanwhile is their own affair
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                cause = error.__context__ or error  # ending a broken capture raises once more
                raise RuntimeError(
                    f"this step cannot be captured in a CUDA graph ({cause}); run it with "
                    "capture=False"
                ) from error
        finally:
            torch.cuda.set_stream(here)  # a capture that fails would leave the other one
            here.wait_stream(stream)
    return graph.replay


@functools.cache
def side_stream(device: torch.device, name: str) -> torch.cuda.Stream:
    """A stream that is made once: torch hands out few, and libraries keep memory for each."""
    return torch.cuda.Stream(device)


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
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
    )


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
