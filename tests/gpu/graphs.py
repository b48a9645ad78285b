"""Streams, graphs, and how results are compared that should have the same bits."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CYCLES = 20_000_000  # about 10 ms: launches on another stream overtake it


def in_a_graph(step: Callable[[], object], device: str) -> Callable[[], object]:
    """The replay of a CUDA graph of the step, after one run of it; on a CPU the step itself."""
    if device == "cpu":
        return step
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        step()
    here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextlib.contextmanager
def late_side_stream(device: str) -> Iterator[None]:
    """A stream of its own for the `with` block, whose work begins late."""
    if device == "cpu":
        yield
        return
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        yield
    here.wait_stream(stream)


def assert_same(out: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Equal bits are expected; a warning tells of others, and more than the tolerance fails.

    Libraries may choose another algorithm where a stream or an address differs.
    """
    if torch.equal(out, expected):
        return
    largest = (out.double() - expected.double()).abs().max().item()
    told = f"{what}: not the same bits, largest difference {largest:.3g}"
    if not largest <= tolerance:  # NaN is no small difference
        raise AssertionError(f"{told}, tolerated {tolerance:.3g}")
    warnings.warn(told, stacklevel=2)


def distance(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact| in the 2-norm."""
    out, exact = out.double().cpu(), exact.double().cpu()
    return float((out - exact).norm() / exact.norm())
