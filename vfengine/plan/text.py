"""Inference of a text encoder on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .builder import Builder
from .forms import FeatureMap
from .network import PlannedForward, PlannedNetwork
from .walk import Planner


class PlannedTextEncoder(PlannedNetwork):
    """forward(ids int64 [B, L]) -> [B, L, D] as `TextEncoder`, without a gradient, on a CPU.

    The result is in the dtype of the weights, and depends on neither batch size nor number of
    threads. Raises what `TextEncoder` does; RuntimeError where the instruction set was changed
    since the weights were packed.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(network, dtype)
        self.embeddings = network.embeddings  # rows that are looked up, and not multiplied

    def forward(self, ids: Tensor) -> Tensor:
        self._check_isa()
        with self._lock, torch.no_grad():
            # a text is a clip of one pixel, its tokens are the frames: [B * L, D, 1, 1]
            rows = self.embeddings(ids).flatten(0, 1)[..., None, None]
            out = self._forward(tuple(ids.shape))(rows)
            return out.view(*ids.shape, -1).clone()  # out of the arena

    def _planned(self, shape: tuple[int, ...]) -> PlannedForward:
        """The program for ids [B, L]."""
        batch, length = shape
        build = Builder(self.dtype)
        x = build.rows(batch * length, self.embeddings.width)
        with torch.no_grad():
            planner = Planner(build, self._packed, batch, length)
            out = self._plan(planner, FeatureMap((x,), 1, 1))
        return PlannedForward(build.program(out.rows), (1, 1), x, out.rows)
