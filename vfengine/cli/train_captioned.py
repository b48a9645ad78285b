"""Captioned clips of a training on latents: of motion capture, or of a folder of videos."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .streams import tell

if TYPE_CHECKING:
    from ..training.batch import Latents
    from ..training.latents import Encodes, Named, Source


class Captioned(NamedTuple):
    """What a training on latents learns from.

    num_captions: of each clip
    prompts: of each label
    rates:   frames a second of the videos; None: of rendered clips
    shown:   clips for a sheet of samples: their source, and their numbers
    """

    source: Source
    num_clips: int
    num_captions: int
    prompts: dict[str, str]
    rates: Sequence[float | None] | None
    shown: Callable[[], tuple[Source, Sequence[int]]]


def read_captioned(settings: argparse.Namespace) -> Captioned:
    """The clips of --data, not yet encoded; raises what `CaptionedFolder` does."""
    from ..training.samples import ROWS

    if settings.data == "mocap":
        from ..training.latents import CaptionedMocap
        from ..training.mocap.captions import LABEL_PROMPTS

        clips = settings.size, settings.num_frames, settings.device

        def unseen() -> tuple[Source, Sequence[int]]:
            source = CaptionedMocap(settings.seed + 1, *clips, held_out=True)
            return source, range(0, 2 * ROWS, 2)

        source = CaptionedMocap(settings.seed, *clips)
        counts = settings.num_clips, settings.captions
        return Captioned(source, *counts, LABEL_PROMPTS, None, unseen)
    from tqdm import tqdm

    from ..training.captioned import CaptionedFolder
    from ..training.folder import Cutting

    cutting = Cutting(
        settings.num_frames, (settings.size, settings.size), settings.frame_stride, settings.seed
    )
    with tqdm(desc="reading", unit="file", disable=None) as progress:
        source = CaptionedFolder(
            settings.data,
            cutting,
            _kept(settings),
            settings.device,
            lambda file: progress.update(),
        )
    tell_left_out(source.skipped, (video.file for video in source.videos if video.truncated))
    count = len(source)
    return Captioned(
        source,
        count,
        min(settings.captions, source.num_captions),
        source.prompts,
        [video.rate for video in source.videos],
        lambda: (source, range(0, count, -(-count // ROWS))),
    )


def encoded(told: Captioned, parts: Named, coder: Encodes, settings: argparse.Namespace) -> Latents:
    """The clips as latents with states of captions, kept in --clips-cache or --output."""
    from tqdm import tqdm

    from ..training.latents import make_latents

    images = settings.base_images
    total = 2 * (told.num_clips + images)  # clips, and what is said of them
    with tqdm(total=total, desc="encoding", unit="clip", disable=None) as progress:
        return make_latents(
            told.source,
            parts,
            coder,
            _kept(settings),
            told.num_clips,
            told.num_captions,
            progress.update,
            images,
        )


def tell_left_out(skipped: Iterable[tuple[Path, str]], truncated: Iterable[Path]) -> None:
    """A line for each file of a folder that is not used, or not to its end."""
    for path, reason in skipped:
        tell(f"skipped {path}: {reason}")
    for path in truncated:
        tell(f"truncated, read up to the fault: {path}")


def _kept(settings: argparse.Namespace) -> Path:
    return settings.clips_cache or settings.output
