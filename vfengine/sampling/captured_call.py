"""A network as a CUDA graph: for what runs often on inputs of one shape, outside of a loop."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from .cuda_graph import CapturedStepper, captured, process_settings_key, weights_key


class CapturedCall(nn.Module):
    """network(x) on CUDA, replayed from a graph, which is kept until x has another shape or dtype.

    network: depends on x and its weights alone

    One call runs at a time. Raises RuntimeError for a network that cannot be captured.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._key: tuple | None = None
        self._lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        key = (x.shape, x.dtype, x.device, process_settings_key(x.device), weights_key(self))
        with self._lock, torch.inference_mode():
            if key != self._key:
                self._key = None  # frees the old graph before the new one is captured
                self._replay = self._captured(x)
                self._key = key
            self._x.copy_(x)
            self._replay()
            return self._out.clone()

    def _captured(self, x: Tensor) -> CapturedStepper:
        self._replay = self._out = None
        self._x = x.clone()
        self._out = torch.empty_like(self.network(self._x))

        def call() -> None:
            self._out.copy_(self.network(self._x))

        return captured(call, x.device, before=lambda: None)
