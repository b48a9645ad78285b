"""Steps over static buffers, captured in CUDA graphs and replayed; run plainly on a CPU.

A step can be captured if all memory that it reads or writes stays in place, if a counter on the
device selects its row of the tables, and if it neither waits for the device nor branches on values
there. The steps of two_phase.py and interleaved.py are such (tests/sampling).

Threads: a process captures one graph at a time. Meanwhile no thread may wait for the whole device
or empty torch's memory cache. Whoever does any of these holds `exclusive`; replays need no lock.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..devices import dependent_launches, matmul_in_tf32

Step = Callable[[], None]

_WARM_UP_STEPS = 2  # libraries choose algorithms and allocate workspaces in their first calls

# For everything that would break a capture on another thread: capturing, torch.cuda.synchronize,
# torch.cuda.empty_cache. Waiting for one stream breaks no capture.
exclusive = threading.RLock()

_idle_streams: dict[tuple[int, str], list[torch.cuda.Stream]] = {}  # by device and use


@dataclass(frozen=True, eq=False)
class Stepper:
    """Takes `count` steps of a loop, at every call.

    done:    steps before these
    shallow: takes a step instead, unless `done` is a multiple of `every`
    """

    take: Step
    count: int = 1
    shallow: Step | None = None
    every: int = 1

    def __call__(self, done: int = 0) -> None:
        (self.shallow if done % self.every else self.take)()


@dataclass(frozen=True, eq=False)
class CapturedStepper(Stepper):
    """The replay of a CUDA graph of whole steps, and of another of a shallow one.

    stream: where it was captured, and where no graph was that is replayed beside it: libraries keep
            a workspace for each stream, whose address is in the graph
    """

    graph: torch.cuda.CUDAGraph | None = None
    stream: torch.cuda.Stream | None = None


def captured(step: Step, device: torch.device, before: Step, count: int = 1) -> CapturedStepper:
    """A CUDA graph that holds the step, `count` times; it may be replayed beside others.

    step:   runs in inference mode
    before: called before each warm-up step and the capture, to reset the counter; both leave
            meaningless values in the buffers

    Raises RuntimeError for a step that cannot be captured: it is not run eagerly instead.
    """
    with exclusive, torch.cuda.device(device):
        torch.cuda.synchronize(device)  # the stream's last graph may still be running
        graph, (stream, idle) = torch.cuda.CUDAGraph(), _take_stream(device, "capture")
        weakref.finalize(graph, idle.append, stream)

        def steps() -> None:
            for _ in range(count):
                step()

        with on_stream(stream):
            with torch.inference_mode(), _cudnn_searches():
                for _ in range(_WARM_UP_STEPS):
                    before()
                    step()
                before()
            _capture(graph, stream, steps)
    return CapturedStepper(graph.replay, count, graph=graph, stream=stream)


def captured_after(first: CapturedStepper, device: torch.device, call: Step) -> CapturedStepper:
    """A second graph, of `call`, with the memory and stream of the first; not to run beside it.

    call: takes as many steps as `first`, and has been warmed up. It may use other streams, if it
          begins and ends on the first one's

    Raises RuntimeError for a call that cannot be captured.
    """
    with exclusive, torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with on_stream(first.stream):
            _capture(graph, first.stream, call, first.graph.pool())
    return CapturedStepper(graph.replay, first.count, graph=graph, stream=first.stream)


def captured_once(call: Step, stream: torch.cuda.Stream, device: torch.device) -> CapturedStepper:
    """A CUDA graph of a call that has been warmed up on this stream, and may take gradients.

    Raises RuntimeError for a call that cannot be captured.
    """
    with exclusive, torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with on_stream(stream):
            _capture(graph, stream, call, gradients=True)
    return CapturedStepper(graph.replay, graph=graph, stream=stream)


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """The `with` block runs on this stream, after and before what the current one does."""
    here = torch.cuda.current_stream()
    try:
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.set_stream(here)  # a failed capture leaves its own stream current
        here.wait_stream(stream)


def _capture(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    call: Step,
    pool: tuple[int, int] | None = None,
    gradients: bool = False,
) -> None:
    """Captures the call, which runs in inference mode unless it takes gradients.

    The capture begins outside of that mode.

    Torch before 2.11 creates the graph's generator state where the capture begins. If that is in
    inference mode, no capture can begin outside of it while the graph lives
    (github.com/pytorch/pytorch/issues/166792).
    """
    mode = "thread_local"  # CUDA calls of other threads do not break this capture
    try:
        with (
            torch.inference_mode(False),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode),
            torch.inference_mode(not gradients),
        ):
            call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Ending a failed capture raises a second error; CUDA's message has several lines.
        cause = str(error.__context__ or error).partition("\n")[0]
        raise RuntimeError(
            f"this step cannot be captured in a CUDA graph ({cause}); run it with capture=False"
        ) from error


@contextmanager
def _cudnn_searches() -> Iterator[None]:
    """cuDNN measures its algorithms within, and remembers the fastest; holders of `exclusive` only.

    Not where results must be the same in every process: the fastest may be another one there.
    """
    cudnn = torch.backends.cudnn
    former = cudnn.benchmark
    reproducible = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = former or not reproducible
    try:
        yield
    finally:
        cudnn.benchmark = former


def empty_cache() -> None:
    """Returns memory that torch caches to the device, while no capture is underway."""
    with exclusive:
        torch.cuda.empty_cache()


@contextmanager
def side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream for work beside the current one; its next user queues behind work left on it."""
    stream, idle = _take_stream(device, "side")
    try:
        yield stream
    finally:
        idle.append(stream)


def _take_stream(device: torch.device, use: str) -> tuple[torch.cuda.Stream, list]:
    """A stream, and the list to which it is returned after use.

    Streams are reused: torch has few, and libraries keep memory for each.
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


def process_settings_key(device: torch.device) -> tuple:
    """The settings of the process that decide how a step is computed; a graph keeps them too."""
    names = ("VFENGINE_KERNEL_BACKEND", "VFENGINE_ATTENTION_BACKEND")
    of_cuda = ()
    if device.type == "cuda":
        with exclusive:  # `_cudnn_searches` on another thread changes one of them for a moment
            of_cuda = _cuda_settings()
    return (
        *(os.environ.get(name) for name in names),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        *of_cuda,
    )


def _cuda_settings() -> tuple:
    """How kernels are launched, and the settings of torch's CUDA libraries.

    None for one that this torch does not have.
    """
    cudnn, cuda, matmul = torch.backends.cudnn, torch.backends.cuda, torch.backends.cuda.matmul
    reductions = ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction")
    splits = (f"{name}_split_k" for name in reductions)
    attentions = ("flash", "mem_efficient", "math", "cudnn")
    return (
        dependent_launches(),
        matmul_in_tf32(),
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
