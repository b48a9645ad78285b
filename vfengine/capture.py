"""A step over static buffers, captured once in a CUDA graph and replayed; run plainly on a CPU.

What can be captured: a step that reads and writes only memory that stays where it is, finds its
place in the tables from a counter on the device, never waits for the device and never branches on
its values. The loops of vfengine/loops.py are such steps (tests/test_capture.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Step = Callable[[], None]

_WARM_UP_STEPS = 2  # libraries choose algorithms and allocate workspaces in their first calls


def replayable(step: Step, device: torch.device, before: Step) -> Step:
    """The step itself on a CPU; on CUDA the replay of a graph that holds it.

    before: called ahead of every warm-up step, to bring the counter back to where a step can run;
            warm-up and capture leave the buffers with values of no meaning

    Raises RuntimeError, on CUDA, for a step that cannot be captured: it is not run eagerly instead.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                before()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        before()
        graph = torch.cuda.CUDAGraph()
        try:
            # On the stream that warmed up: libraries keep a workspace per stream, and two graphs
            # that are replayed at once must not share one.
            with torch.cuda.graph(graph, stream=stream):
                step()
        except RuntimeError as error:
            raise RuntimeError(
                f"this step cannot be captured in a CUDA graph ({error}); run it with capture=False"
            ) from error
    return graph.replay


def weights_key(*modules: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter or buffer of the modules is replaced or written to.

    A graph reads weights at the addresses that it was captured with, so a loop is only used again
    while this stays the same.
    """
    return tuple((t.data_ptr(), _version(t)) for module in modules for t in _tensors(module))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
