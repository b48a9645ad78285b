"""Sheets of what networks make while they train: of labels, or of prompts beside real clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.decompose import base_index
from ..files import replacing
from ..media.pictures import network_to_pixels, sheet
from .latents import Source
from .objectives import Decomposed
from .parts import Coder

_STEPS, ROWS = 25, 8


@dataclass(frozen=True, eq=False)
class Showcase:
    """Prompts, and real clips of them that no training sees.

    pixels:  uint8 [K, N, H, W, 3];  latents: [K, N, C, h, w]
    context: token states [K, L, D];  null: those of the empty prompt, as often
    """

    coder: Coder
    prompts: tuple[str, ...]
    pixels: Tensor
    latents: Tensor
    context: Tensor
    null: Tensor

    @classmethod
    def of(
        cls, source: Source, coder: Coder, numbers: Sequence[int] = range(0, 2 * ROWS, 2)
    ) -> Showcase:
        """Clips of these numbers; by default every second one: of mocap 8 actions of 15."""
        pixels = source.frames(numbers)[..., :3]
        prompts = tuple(source.captions(i, 1)[0] for i in numbers)
        context = coder.states(prompts)
        null = coder.states([""]).expand_as(context)
        return cls(coder, prompts, pixels.cpu(), coder.encode(pixels), context, null)


def write_prompts(
    objective: Decomposed, networks: dict, showcase: Showcase, precision: str, file: Path | None
) -> None:
    """A clip a prompt under guidance, each above the real one; and the prompts, in a .txt beside.

    The base network alone draws base frames, the residual network alone animates real ones.
    file: None: they are made and not written, by processes that have a share of the weights
    """
    m = base_index(showcase.latents.shape[1])
    with _autocast(objective.device, precision):
        latents = objective.sample(
            networks, showcase.context, _STEPS, showcase.null, showcase.latents[:, m].float()
        )
    made = showcase.coder.decode(latents).cpu()
    real = showcase.pixels if made.shape[1] > 1 else showcase.pixels[:, m : m + 1]
    if made.shape[1] == 1:  # base frames: all in one row, real ones below
        rows = torch.stack([made[:, 0], real[:, 0]])
    else:
        rows = torch.stack([made, real], 1).flatten(0, 1)
    if file is None:
        return
    write_sheet(rows, file)
    with replacing(file.with_name("prompts.txt")) as temporary:
        temporary.write_text("\n".join(showcase.prompts) + "\n", encoding="utf-8")


def write_labels(objective, networks: dict, precision: str, file: Path | None) -> None:
    """Eight classes, one clip a row, in 25 steps; file: as in `write_prompts`."""
    config = objective.config
    labels = torch.arange(min(ROWS, len(config.labels)), device=objective.device, dtype=torch.int64)
    with _autocast(objective.device, precision):
        video = objective.sample(networks, labels, _STEPS)
    if file is not None:
        write_sheet(network_to_pixels(video), file)


def write_sheet(frames: Tensor, file: Path) -> None:
    """Clips uint8 [B, N, H, W, 3] as a picture, one a row; whole or not at all."""
    with replacing(file) as temporary:
        Image.fromarray(sheet(frames.cpu().numpy(), columns=frames.shape[1])).save(temporary, "PNG")


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
