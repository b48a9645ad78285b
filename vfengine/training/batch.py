"""The batch of a step: clips, what is said of them, timesteps and noise, drawn from (seed, step).

A step's clips are `Pixels` with labels or `Latents` with captions; both have the same surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diffusion.decompose import base_index
from ..media.pictures import pixels_to_network
from .team import rows_of


class Samples(NamedTuple):
    """Clips [B, N, ...] or base frames [B, ...], and what is said of each, [B, ...].

    figure: the figure's share of each cell, of clips or frames of one channel; None: not known
    """

    x: Tensor
    condition: Tensor
    figure: Tensor | None


@dataclass(frozen=True, eq=False)
class Pixels:
    """Clips as uint8 [M, N, H, W, C], an array or a memory map, with labels int64 [M].

    null_class: the label that says nothing
    """

    clips: np.ndarray
    labels: np.ndarray
    null_class: int
    condition = "class_labels"  # the networks' argument that a sample's label is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.clips.shape

    def take(
        self,
        rng: np.random.Generator,
        count: int,
        dropout: float,
        m: int | None,
        rows: slice = slice(None),
    ) -> Samples:
        """Rows of `count` random clips uint8 [B, N, H, W, C], or of their frames m, and of labels.

        Labels are int64 [B]; dropout: share of them that become the null class
        """
        chosen = rng.integers(0, len(self.clips), count)[rows]
        pixels = np.stack([self.clips[i] if m is None else self.clips[i, m] for i in chosen])
        labels = self.labels[chosen].copy()
        labels[rng.uniform(size=count)[rows] < dropout] = self.null_class
        return Samples(torch.from_numpy(pixels), torch.from_numpy(labels), None)


@dataclass(frozen=True, eq=False)
class Latents:
    """Clips as normalised latents [M, N, C, h, w], with captions' token states [M, P, L, D].

    Both fp16, on any device; null: the state [L, D] of the empty prompt. A clip has P captions.
    figure: its share of each cell, fp16 [M, N, 1, h, w]; None: not known
    images: base frames of further clips, as clips of one frame; base frames are then taken of these
    """

    clips: Tensor
    captions: Tensor
    null: Tensor
    figure: Tensor | None = None
    images: Latents | None = None
    condition = "context"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.clips.shape)

    def take(
        self,
        rng: np.random.Generator,
        count: int,
        dropout: float,
        m: int | None,
        rows: slice = slice(None),
    ) -> Samples:
        """Rows of `count` random clips fp16 [B, N, C, h, w], or of their frames m, and of contexts.

        Contexts are [B, L, D]; dropout: share of captions that become the empty prompt
        """
        if m is not None and self.images is not None:
            return self.images.take(rng, count, dropout, 0, rows)
        chosen = self._index(rng.integers(0, len(self.clips), count)[rows])
        dropped = self._index(rng.uniform(size=count)[rows] < dropout)
        told = self._index(rng.integers(0, self.captions.shape[1], count)[rows])
        context = torch.where(dropped[:, None, None], self.null, self.captions[chosen, told])
        places = chosen if m is None else (chosen, m)
        figure = None if self.figure is None else self.figure[places]
        return Samples(self.clips[places], context, figure)

    def _index(self, values: np.ndarray) -> Tensor:
        return placed(torch.from_numpy(values), self.clips.device)


class BatchSampler:
    """Draws everything random in one step from (seed, step); the order of the calls matters.

    Counts and shapes are those of the whole batch. All of it is drawn, for the numbers of a part
    are those that it has in the whole, and the part's rows are returned: all, if there is one part.

    part: its number among the parts of the batch, and how many they are

    Timesteps are on the CPU, all else on the device. Nothing waits for the device.
    """

    def __init__(
        self,
        data: Pixels | Latents,
        seed: tuple[int, int],
        *,
        dropout: float,
        num_timesteps: int,
        timestep_shift: float,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ):
        self._part = part
        self._data, self._dropout = data, dropout
        self._num_timesteps, self._shift, self._device = num_timesteps, timestep_shift, device
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator("cpu").manual_seed(int(self._rng.integers(2**62)))
        self._normals = self._generator
        if device.type != "cpu":
            self._normals = torch.Generator(device).manual_seed(self._generator.initial_seed())

    def rows(self, count: int) -> slice:
        """The part's rows of `count`."""
        return rows_of(count, self._part)

    def clips(self, count: int, only_base: bool = False) -> Samples:
        """Of `count` clips: fp32 [B, N, C, H, W] or base frames [B, C, H, W], and their conditions.

        Pixels are in -1..1. A condition is what networks take as the argument data.condition: int64
        labels, or fp32 states (torch.cat refuses fp16 where autocast is on).
        """
        m = base_index(self._data.shape[1]) if only_base else None
        x, condition, figure = self._data.take(self._rng, count, self._dropout, m, self.rows(count))
        x = self._placed(x)
        x = pixels_to_network(x) if x.dtype == torch.uint8 else x.float()
        figure = None if figure is None else self._placed(figure).float()
        condition = self._placed(condition)
        condition = condition.float() if condition.is_floating_point() else condition
        return Samples(x.contiguous(), condition, figure)

    @property
    def null(self) -> Tensor:
        """What says nothing of a clip: the null class, int64 [], or the empty prompt's [L, D]."""
        data = self._data
        if not isinstance(data, Pixels):
            return data.null
        return torch.tensor(data.null_class, dtype=torch.int64, device=self._device)

    def places(self, count: int) -> Tensor:
        """One number in each of `count` equal parts of 0..1, on the CPU."""
        whole = torch.arange(count, dtype=torch.int64, device="cpu")
        places = (
            whole + torch.rand(1, generator=self._generator, dtype=torch.float32, device="cpu")
        ) / count
        return places[self.rows(count)]

    def timesteps(self, count: int) -> Tensor:
        """One t in each of `count` equal parts of the (shifted) schedule: int64."""
        place = self.places(count)
        if self._shift != 1:
            place = self._shift * place / (1 + (self._shift - 1) * place)
        return (place * self._num_timesteps).long().clamp(max=self._num_timesteps - 1)

    def normal(self, shape: Sequence[int]) -> Tensor:
        noise = torch.randn(
            shape, generator=self._normals, device=self._device, dtype=torch.float32
        )
        return noise[self.rows(shape[0])]

    def uniform(self, *shape: int) -> Tensor:
        numbers = torch.rand(*shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return self._placed(numbers[self.rows(shape[0])])

    def _placed(self, values: Tensor) -> Tensor:
        return placed(values, self._device)


def placed(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device. Nobody waits: CUDA reads them from memory that is pinned."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
