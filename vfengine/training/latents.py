"""Captioned clips as latents and token states: made once, kept, found again.

Frames are made and encoded a few clips at a time: their pixels are never all in memory, nor on
disk. Two files of a folder hold the results, named after all that decides them: the latents, with
the figure's share of each cell as a further channel where it is known, and the token states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.decompose import base_index
from .arrays import kept
from .batch import Latents

_CLIPS_AT_ONCE = {"cpu": 4, "cuda": 256}


class Source(Protocol):
    """Clips by number, and what can be said of each: `CaptionedMocap`, `captioned.CaptionedFolder`.

    name, captions_name: tell the frames, and the captions, from all others, in names of files
    """

    name: str
    captions_name: str

    def frames(self, indices: Sequence[int], only_base: bool = False) -> Tensor:
        """Clips or their base frames, uint8 [len(indices), N or 1, H, W, 3 or 4].

        A fourth channel is the figure's share of a pixel.
        """

    def captions(self, index: int, count: int) -> list[str]:
        """`count` captions of a clip, the plainest first."""


class Named(Protocol):
    """What encodes frames and texts, as `parts.Parts`."""

    def digests(self) -> tuple[str, str]:
        """Hex digits that name the autoencoder, and the text encoder, for caches."""


class Encodes(Protocol):
    """The same at work, as `parts.Coder`."""

    device: torch.device
    latent_channels: int
    at_once: int  # frames in a call of a network

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [..., H, W, 3] -> fp16 [..., C, h, w], of mean 0 and variance 1."""

    def states(self, texts: Sequence[str]) -> Tensor:
        """Token states fp16 [len(texts), L, D]."""


class CaptionedMocap:
    """Clips of rendered motion capture by number, and what can be said of each.

    held_out: draw clothes in pairs of colours that no other clip has
    """

    def __init__(
        self,
        seed: int,
        size: int,
        num_frames: int,
        device: torch.device | str,
        held_out: bool = False,
    ):
        from .mocap import VERSION, Renderer

        self._seed, self._held_out = seed, held_out
        self._renderer = Renderer(size, num_frames, device)
        self.name = self.captions_name = f"{num_frames}x{size}-drawn{VERSION}-seed{seed}"

    def frames(self, indices: Sequence[int], only_base: bool = False) -> Tensor:
        """Clips or their base frames, uint8 [len(indices), N or 1, H, W, 4], on the device.

        The fourth channel is the figure's share of a pixel.
        """
        num_frames = self._renderer.num_frames
        chosen = [base_index(num_frames)] if only_base else range(num_frames)
        scenes = [self._scene(index) for index in indices]
        return self._renderer.frames(scenes, chosen, with_figure=True)

    def captions(self, index: int, count: int) -> list[str]:
        """The plain caption of a clip, and paraphrases of it."""
        from .mocap.captions import caption, paraphrase

        scene = self._scene(index)
        rng = np.random.default_rng((self._seed, index, 1))
        return [caption(scene), *(paraphrase(scene, rng) for _ in range(count - 1))]

    def _scene(self, index: int):
        from .mocap import draw_scene

        return draw_scene(self._seed, index, held_out=self._held_out)


def make_latents(
    source: Source,
    parts: Named,
    coder: Encodes,
    folder: Path,
    num_clips: int,
    num_captions: int,
    progress: Callable[[int], None] = lambda n: None,
    num_images: int = 0,
) -> Latents:
    """The first clips of a source with captions, as fp16 on the coder's device.

    folder:     where they are kept as .npy, and found by the next call
    progress:   called with the number of clips, as they are encoded, and as their captions are
    num_images: base frames of so many further clips, which cost a fraction of whole ones

    On a CPU they are mapped from the files. Raises ValueError for a file that is cut off or holds
    something else.
    """
    autoencoder, text = parts.digests()
    null = coder.states([""])[0]
    at_once = min(_CLIPS_AT_ONCE[coder.device.type], coder.at_once)

    def made(kind: str, numbers: range, only_base: bool) -> Latents:
        span = f"{numbers.start}-{numbers.stop}"

        def rows(name: str, make: Callable[[Sequence[int]], Tensor], at_once: int) -> Tensor:
            chunks = _chunks(numbers, make, at_once, progress)
            found = kept(folder / f"{name}.npy", chunks, len(numbers), np.float16)
            return torch.from_numpy(found).to(coder.device)

        def cells(part: Sequence[int]) -> Tensor:
            frames = source.frames(part, only_base)
            latents = coder.encode(frames[..., :3])
            if frames.shape[-1] == 3:
                return latents
            return torch.cat([latents, _shares(frames[..., 3], latents.shape[-1])], 2)

        def states(part: Sequence[int]) -> Tensor:
            texts = [text for i in part for text in source.captions(i, num_captions)]
            return coder.states(texts).unflatten(0, (len(part), num_captions))

        clips = rows(f"{kind}-{source.name}-{span}-{autoencoder}", cells, at_once)
        told = f"captions-{source.captions_name}-{span}x{num_captions}-{text}"
        captions, channels = rows(told, states, 4 * at_once), coder.latent_channels
        figure = clips[:, :, channels:] if clips.shape[2] > channels else None
        return Latents(clips[:, :, :channels], captions, null, figure)

    clips = made("clips", range(num_clips), only_base=False)
    if not num_images:
        return clips
    further = range(num_clips, num_clips + num_images)
    return replace(clips, images=made("images", further, only_base=True))


def _shares(figure: Tensor, side: int) -> Tensor:
    """The share of cells that the figure fills: uint8 [M, N, H, W] of 255 -> [M, N, 1, h, w]."""
    pixels = figure.float() / 255
    return F.avg_pool2d(pixels, pixels.shape[-1] // side).half()[:, :, None]


def residual_std(latents: Latents) -> float:
    """Standard deviation of x_i - x_m, which is what the residual network predicts."""
    clips = latents.clips[:: max(1, len(latents.clips) // 256)].float()
    m = base_index(clips.shape[1])
    change = torch.cat([clips[:, :m], clips[:, m + 1 :]], 1) - clips[:, m : m + 1]
    return round(max(float(change.square().mean().sqrt()), 0.01), 3)


def _chunks(
    numbers: range,
    make: Callable[[Sequence[int]], Tensor],
    at_once: int,
    progress: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """What `make` makes of so many of the numbers at once."""
    for first in range(0, len(numbers), at_once):
        part = numbers[first : first + at_once]
        yield make(part).cpu().numpy()
        progress(len(part))
