"""Inference of an autoencoder's decoder and encoder on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .builder import Builder
from .cuda import CudaImages
from .forms import FeatureMap
from .network import PlannedForward, PlannedNetwork
from .walk import Planner


class _PlannedImages(PlannedNetwork):
    """A network of images [B, C, H, W] without an embedding, without a gradient, on a CPU.

    The result is in the input's dtype, and depends on neither batch size nor number of threads.
    Raises RuntimeError where the instruction set was changed since the weights were packed.
    """

    on_cuda = CudaImages

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(network, dtype)
        self.out_channels, self.patches = network.out_channels, network.patches

    def forward(self, x: Tensor) -> Tensor:
        self._check_isa()
        into, out_of = self.patches
        with self._lock, torch.no_grad():
            folded = F.pixel_unshuffle(x, into) if into > 1 else x
            out = self._forward(tuple(folded.shape))(folded)[:, : self.out_channels]
            out = F.pixel_shuffle(out, out_of) if out_of > 1 else out
            return out.to(x.dtype, memory_format=torch.contiguous_format, copy=True)

    def _planned(self, shape: tuple[int, ...]) -> PlannedForward:
        """The program for images in patches, [B, C, H, W]."""
        batch, channels, height, width = shape
        build = Builder(self.dtype)
        x = build.rows(batch * height * width, channels + channels % 2)
        with torch.no_grad():
            planner = Planner(build, self._packed, batch)
            out = self._plan(planner, FeatureMap((x,), height, width))
        return PlannedForward(build.program(out.rows), (out.height, out.width), x, out.rows)


class PlannedDecoder(_PlannedImages):
    """forward(z [B, C, h, w]) -> [B, 3, H, W] as `Decoder`."""


class PlannedEncoder(_PlannedImages):
    """forward(images [B, 3, H, W]) -> the mean of z [B, C, h, w] as `Encoder`."""
