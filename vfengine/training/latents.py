"""Clips of captioned motion capture as latents and token states: made once, kept, found again.

Frames are rendered and encoded a few clips at a time: their pixels are never all in memory, nor on
disk. Two files of a folder hold the results, named after all that decides them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.decompose import base_index
from ..files import replacing
from .batch import Latents
from .parts import Coder, Parts

_CLIPS_AT_ONCE = {"cpu": 4, "cuda": 256}


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
        from .mocap import Renderer

        self._seed, self._held_out = seed, held_out
        self._renderer = Renderer(size, num_frames, device)
        self.name = f"{num_frames}x{size}-seed{seed}"

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
    source: CaptionedMocap,
    parts: Parts,
    coder: Coder,
    folder: Path,
    num_clips: int,
    num_captions: int,
    progress: Callable[[int], None] = lambda n: None,
    num_images: int = 0,
    with_figure: bool = False,
) -> Latents:
    """The first clips of a source with captions, as fp16 on the coder's device.

    folder:     where they are kept as .npy, and found by the next call
    progress:   called with the number of clips, as they are encoded, and as their captions are
    num_images: base frames of so many further clips, which cost a fraction of whole ones
    with_figure: keep where the figure is, too

    On a CPU they are mapped from the files. Raises ValueError for a file that is cut off or holds
    something else.
    """
    autoencoder, text = parts.digests()
    null = coder.states([""])[0]
    at_once = _CLIPS_AT_ONCE[coder.device.type]

    def kept(kind: str, numbers: range, only_base: bool) -> Latents:
        span = f"{source.name}-{numbers.start}-{numbers.stop}"
        latents = _kept(
            folder / f"{kind}-{span}-{autoencoder}.npy",
            numbers,
            lambda part: coder.encode(source.frames(part, only_base)[..., :3]),
            at_once,
            progress,
        )
        figure = None
        if with_figure:
            side = latents.shape[-1]
            figure = _kept(
                folder / f"{kind}-figure-{span}-{side}.npy",
                numbers,
                lambda part: _shares(source.frames(part, only_base)[..., 3], side),
                at_once,
                progress,
            ).to(coder.device)

        def states(part: Sequence[int]) -> Tensor:
            texts = [text for i in part for text in source.captions(i, num_captions)]
            return coder.states(texts).unflatten(0, (len(part), num_captions))

        captions = _kept(
            folder / f"captions-{span}x{num_captions}-{text}.npy",
            numbers,
            states,
            4 * at_once,
            progress,
        )
        return Latents(latents.to(coder.device), captions.to(coder.device), null, figure)

    clips = kept("latents", range(num_clips), only_base=False)
    if not num_images:
        return clips
    further = range(num_clips, num_clips + num_images)
    return replace(clips, images=kept("images", further, only_base=True))


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


def _kept(
    file: Path,
    numbers: range,
    make: Callable[[Sequence[int]], Tensor],
    at_once: int,
    progress: Callable[[int], None],
) -> Tensor:
    """fp16 [len(numbers), ...] mapped from the file, once it is there.

    make: (some of the numbers) -> their rows
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            _write(unfinished, numbers, at_once, make, progress)
    try:
        rows = np.load(file, mmap_mode="c")  # private pages: torch takes no read-only arrays
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is no complete .npy file, remove it: {error}") from error
    count = len(numbers)
    if len(rows) != count or rows.dtype != np.float16:
        raise ValueError(
            f"{file} holds {rows.dtype} {rows.shape}, expected {count} rows of float16"
        )
    return torch.from_numpy(rows)


def _write(
    file: Path,
    numbers: range,
    at_once: int,
    make: Callable[[Sequence[int]], Tensor],
    progress: Callable[[int], None],
) -> None:
    rows = None
    for first in range(0, len(numbers), at_once):
        chunk = numbers[first : first + at_once]
        values = make(chunk).cpu().numpy()
        if rows is None:
            shape = (len(numbers), *values.shape[1:])
            rows = np.lib.format.open_memmap(file, "w+", np.float16, shape)
        rows[first : first + at_once] = values
        progress(len(chunk))
    rows.flush()
