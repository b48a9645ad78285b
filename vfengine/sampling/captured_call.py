"""A network as a CUDA graph: for what runs often on inputs of one shape, outside of a loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..forks import Lock
from .cuda_graph import CapturedStepper, captured, process_settings_key, weights_key


@dataclass(eq=False)
class _Graph:
    """The replay of a call, with its input and output.

    key:  of all that it was made from
    done: when the last result was taken
    """

    key: tuple
    x: Tensor
    out: Tensor | None = None
    replay: CapturedStepper | None = None
    done: torch.cuda.Event | None = None


class CapturedCall(nn.Module):
    """network(x) on CUDA, replayed from a graph.

    network: depends on x, its weights and the settings of the process alone

    One graph is kept, until x has another shape or dtype, or weights or settings have changed.
    Calls may come from any thread and stream; one runs at a time. Raises RuntimeError for a network
    that cannot be captured.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._lock = Lock()
        self._kept: _Graph | None = None

    def __getstate__(self) -> dict:
        """Of a copy or a pickle, which captures its own graph."""
        return {**self.__dict__, "_kept": None}

    def forward(self, x: Tensor) -> Tensor:
        with self._lock:
            stream = torch.cuda.current_stream(x.device)
            with torch.inference_mode():
                graph = self._graph(x)
                if graph.done is not None:  # of a call on another stream, perhaps
                    stream.wait_event(graph.done)
                graph.x.copy_(x)
                graph.replay()
            out = graph.out.clone()  # the next call overwrites it
            graph.done = stream.record_event()
            return out

    def _graph(self, x: Tensor) -> _Graph:
        settings = process_settings_key(x.device)
        key = (x.shape, x.dtype, x.device, settings, weights_key(self.network))
        if self._kept is None or self._kept.key != key:
            self._kept = None  # frees the old graph before the new one is captured
            graph = _Graph(key, x.clone(memory_format=torch.contiguous_format))

            def call() -> None:
                graph.out = self.network(graph.x)

            graph.replay = captured(call, x.device, before=lambda: None)
            self._kept = graph
        return self._kept
