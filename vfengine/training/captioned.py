"""A user's own folder of videos as captioned clips, to be encoded a few at a time.

    DIR/walk/a.mp4  DIR/walk/a.txt      the captions of a.mp4, one a line
    DIR/walk/b.mp4                      no captions: it is told by its class, "walk"

Classes, videos and clips are those of folder.py. Pixels are never all in memory: the first pass
counts each video's clips, and keeps the counts; a video is decoded again for its frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.decompose import base_index
from ..files import replacing
from ..formats.published import read_json
from ..formats.weights import hash_files
from ..media.video import VideoReader
from .folder import UNUSED, Cutting, class_name, find_videos, none_usable


@dataclass(frozen=True)
class Video:
    """A usable video: where it lies, what is said of it, and how many clips it has.

    name:  of its file in the folder
    rate:  frames a second of its clips; None: it states none
    truncated: whether it ends in a fault or early; the frames before that are used
    """

    file: Path
    name: str
    captions: tuple[str, ...]
    clips: int
    rate: float | None
    truncated: bool


class CaptionedFolder:
    """Clips of a folder of videos by number, and their captions: a `latents.Source`.

    videos:  those that are used, in the order of their clips
    prompts: of each class, by its name
    skipped: (path, reason) of every file and every class left out
    num_captions: the most that a video has
    """

    def __init__(
        self,
        folder: str | Path,
        cutting: Cutting,
        kept: Path,
        device: torch.device | str = "cpu",
        on_file: Callable[[Path], None] = lambda file: None,
    ):
        """kept: a folder in which the counts of clips are kept, named after the videos' contents

        on_file: called with each file before it is read, for a progress bar

        Raises FileNotFoundError or NotADirectoryError for the folder; ValueError where there is no
        usable video, and for captions that are empty or no text in UTF-8.
        """
        self._folder, self._cutting, self._device = Path(folder), cutting, device
        self.skipped: list[tuple[Path, str]] = []
        classes = find_videos(self._folder, self.skipped)
        files = [file for _, videos in classes for file in videos]
        told = {file: _captions(file.with_suffix(".txt")) for file in files}
        texts = {file.with_suffix(".txt") for file in files}
        self.skipped = [(path, why) for path, why in self.skipped if path not in texts]
        self.name = self._named(files)
        index = kept / f"videos-{self.name}.json"
        counts = self._known(index, files) or {
            self._name(file): self._count(file, on_file) for file in files
        }
        self.videos: list[Video] = []
        self.prompts: dict[str, str] = {}
        for class_folder, own in classes:
            name = class_name(class_folder)
            prompt, before = name.replace("_", " "), len(self.videos)
            for file in own:
                known = counts[self._name(file)]
                if (problem := known.get("problem")) is not None:
                    self.skipped.append((file, problem))
                else:
                    said = told[file] or (prompt,)
                    self.videos.append(Video(file, self._name(file), said, **known))
            if len(self.videos) > before:
                self.prompts[name] = prompt
            else:
                self.skipped.append((class_folder, UNUSED))
        if not self.videos:
            raise ValueError(none_usable(self._folder, self.skipped))
        if not index.is_file():
            index.parent.mkdir(parents=True, exist_ok=True)
            with replacing(index) as temporary:
                temporary.write_text(json.dumps(counts, indent=1), encoding="utf-8")
        said = json.dumps([video.captions for video in self.videos])
        self.captions_name = f"{self.name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
        self.num_captions = max(len(video.captions) for video in self.videos)
        self._ends = np.cumsum([video.clips for video in self.videos])
        self._decoded: tuple[Video, np.ndarray] | None = None  # the last video, and its clips

    def __len__(self) -> int:
        """The number of clips."""
        return int(self._ends[-1])

    def frames(self, indices: Sequence[int], only_base: bool = False) -> Tensor:
        """Clips or their base frames, uint8 [len(indices), N or 1, H, W, 3], on the device.

        Raises OSError or ValueError for a video that has changed since it was counted.
        """
        m = base_index(self._cutting.num_frames)
        chosen = slice(m, m + 1) if only_base else slice(None)
        clips = np.stack([self._clip(index)[chosen] for index in indices])
        return torch.from_numpy(clips).to(self._device)

    def captions(self, index: int, count: int) -> list[str]:
        """The first captions of a clip's video; from the first again where they are fewer."""
        captions = self._video(index)[0].captions
        return [captions[number % len(captions)] for number in range(count)]

    # -- inside ------------------------------------------------------------------------------------

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _named(self, files: Sequence[Path]) -> str:
        """Names all that decides the frames: the contents of the files, and how they are cut."""
        digest = hashlib.sha256(repr(sorted(asdict(self._cutting).items())).encode())
        for file in files:
            digest.update(f"\n{self._name(file)}\n".encode())
            with suppress(OSError):  # of a file that cannot be read, which is skipped for that
                hash_files(digest, [file])
        height, width = self._cutting.size
        return f"{self._cutting.num_frames}x{height}x{width}-{digest.hexdigest()[:16]}"

    def _known(self, index: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]] | None:
        """What `_count` found of these files before, by their names; None: it is not kept."""
        if not index.is_file():
            return None
        found = read_json(index)
        if found.keys() != {self._name(file) for file in files}:
            raise ValueError(f"{index} holds the counts of other videos: remove it")
        return found

    def _count(self, file: Path, on_file: Callable[[Path], None]) -> dict[str, Any]:
        """clips, rate and truncated of a video, or the problem of what is none."""
        on_file(file)
        reader = VideoReader(file)
        try:
            clips = len(self._cutting.clips(reader, self._name(file)))
        except (OSError, ValueError) as error:
            return {"problem": str(error).removeprefix(f"{file}: ")}
        rate, truncated = self._cutting.rate(reader), bool(reader.truncated)
        return {"clips": clips, "rate": rate, "truncated": truncated}

    def _video(self, index: int) -> tuple[Video, int]:
        """The video of a clip, and the clip's number in it."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        video = self.videos[place]
        return video, index - int(self._ends[place]) + video.clips

    def _clip(self, index: int) -> np.ndarray:
        """uint8 [N, H, W, 3]."""
        video, number = self._video(index)
        if self._decoded is None or self._decoded[0] is not video:
            self._decoded = None  # before the next one is in memory
            self._decoded = video, self._cutting.clips(VideoReader(video.file), video.name)
        clips = self._decoded[1]
        if len(clips) != video.clips:
            raise ValueError(f"{video.file} has {len(clips)} clips, and had {video.clips} before")
        return clips[number]


def _captions(file: Path) -> tuple[str, ...]:
    """The lines of a video's .txt; none where there is no such file."""
    if not file.exists():
        return ()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error})") from error
    captions = tuple(line for line in lines if line)
    if not captions:
        raise ValueError(f"{file} holds no caption: write one a line, or remove it")
    return captions
