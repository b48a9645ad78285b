"""Inference of an autoencoder's decoder on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .builder import Builder
from .forms import FeatureMap
from .network import PlannedForward, PlannedNetwork
from .walk import Planner


class PlannedDecoder(PlannedNetwork):
    """forward(z [B, C, h, w]) -> [B, 3, H, W] as `Decoder`, without a gradient, on a CPU.

    The result is in z's dtype, and depends on neither batch size nor number of threads. Raises
    RuntimeError where the instruction set was changed since the weights were packed.
    """

    def forward(self, z: Tensor) -> Tensor:
        self._check_isa()
        with self._lock, torch.no_grad():
            out = self._forward(tuple(z.shape))(z)
            return out.to(z.dtype, memory_format=torch.contiguous_format, copy=True)

    def _planned(self, shape: tuple[int, ...]) -> PlannedForward:
        """The program for latents [B, C, h, w]."""
        batch, channels, height, width = shape
        build = Builder(self.dtype)
        z = build.rows(batch * height * width, channels)
        with torch.no_grad():
            planner = Planner(build, self._packed, batch)
            out = self._plan(planner, FeatureMap((z,), height, width))
        return PlannedForward(build.program(out.rows), (out.height, out.width), z, out.rows)
