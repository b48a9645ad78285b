"""The batch of a step: clips, labels, timesteps and noise, all drawn from (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..diffusion.decompose import base_index
from ..media.pictures import pixels_to_network


class BatchSampler:
    """Draws everything random in one step from (seed, step); the order of the calls matters.

    clips uint8 [M, N, H, W, C], labels int64 [M]; class_dropout: share of labels to be null_class
    """

    def __init__(
        self,
        clips: np.ndarray,
        labels: np.ndarray,
        seed: tuple[int, int],
        *,
        class_dropout: float,
        null_class: int,
        num_timesteps: int,
        device: torch.device,
    ):
        self._clips, self._labels = clips, labels
        self._class_dropout, self._null_class = class_dropout, null_class
        self._num_timesteps, self._device = num_timesteps, device
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(int(self._rng.integers(2**62)))

    def clips(self, count: int, only_base: bool = False) -> tuple[Tensor, Tensor]:
        """`count` clips [B, N, C, H, W] or base frames [B, C, H, W], in -1..1, and their labels."""
        chosen = self._rng.integers(0, len(self._clips), count)
        m = base_index(self._clips.shape[1])
        pixels = np.stack([self._clips[i, m] if only_base else self._clips[i] for i in chosen])
        x = pixels_to_network(torch.from_numpy(pixels).to(self._device)).contiguous()
        labels = self._labels[chosen].copy()
        labels[self._rng.uniform(size=count) < self._class_dropout] = self._null_class
        return x, torch.from_numpy(labels).to(self._device)

    def timesteps(self, count: int) -> Tensor:
        """One t in each of `count` equal parts of the schedule: int64 [count]."""
        place = (torch.arange(count) + torch.rand(1, generator=self._generator)) / count
        t = (place * self._num_timesteps).long().clamp(max=self._num_timesteps - 1)
        return t.to(self._device)

    def normal(self, shape) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator).to(self._device)
