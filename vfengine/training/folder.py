"""A user's own folder of videos as training clips.

    DIR/walk/a.mp4  DIR/walk/b.webm  DIR/run/c.gif     sub-folders are the classes
    DIR/a.mp4  DIR/b.avi                               no sub-folders: one class, named after DIR

A class has the name of its entry, which may be a link. What is hidden, and what systems leave
behind (_LEFT_BEHIND), is passed over. Links to folders are followed, but no folder is read twice in
a class.

Frames are decoded as a player shows them (media/decoding.py), and counted by that. The centre of
each is cropped to the wanted shape and resized with antialiasing. The video is then cut into as
many clips as fit one after the other. What cannot be used is skipped and named.
"""

from __future__ import annotations

import os
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..media.video import VideoReader

VIDEO_SUFFIXES = (
    *(".3gp", ".apng", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ogv", ".ts", ".webm", ".webp", ".wmv"),
)
# beside all names that begin with a dot
_LEFT_BEHIND = (
    *("__macosx", "@eadir", "#recycle", "#snapshot", "lost+found", "thumbs.db", "ehthumbs.db"),
    *("desktop.ini", "icon\r", "$recycle.bin", "system volume information"),
)
UNUSED = "no usable video in this class"  # why a class is skipped
_ALIKE = 0.02  # of a rate: a file keeps times in hundredths or thousandths of a second


@dataclass(frozen=True, eq=False)
class FolderClips:
    """Everything usable in a folder, in memory.

    clips:       uint8 [M, N, H, W, 3]
    labels:      int64 [M], indices into label_names
    label_names: the classes, sorted
    skipped:     (path, reason) of every file and every class left out
    truncated:   files that end in a fault or early; the frames before that are used
    rates:       frames a second of the clips of each video, None where it states none
    """

    clips: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    skipped: tuple[tuple[Path, str], ...]
    truncated: tuple[Path, ...]
    rates: tuple[float | None, ...]


@dataclass(frozen=True)
class Cutting:
    """How a video becomes clips.

    num_frames: N, frames of a clip
    size:       (H, W)
    stride:     take every stride-th frame of the video
    seed:       decides at which frame a video's first clip begins, by the file's name alone and
                never so late that a clip is lost

    Raises ValueError for numbers below 1.
    """

    num_frames: int
    size: tuple[int, int]
    stride: int
    seed: int

    def __post_init__(self):
        if min(self.num_frames, *self.size, self.stride) < 1:
            size = self.size[0] if self.size[0] == self.size[1] else self.size
            raise ValueError(
                f"read_folder: num_frames, size and stride must be at least 1, "
                f"got {self.num_frames}, {size} and {self.stride}"
            )

    def clips(self, reader: VideoReader, name: str) -> np.ndarray:
        """The clips of a video, uint8 [M, N, H, W, 3]; name: of its file in the folder.

        Raises OSError or ValueError for a file that is no video, ValueError for too short a one.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        frames = [_fit(frame, *self.size) for frame in reader]
        return _cut(frames, self.num_frames, self.stride, rng)

    def rate(self, reader: VideoReader) -> float | None:
        """Frames a second of a video's clips; None where it states none."""
        return reader.fps and round(reader.fps / self.stride, 3)


def read_folder(
    folder: str | Path,
    num_frames: int = 16,
    size: int | tuple[int, int] = 64,
    stride: int = 1,
    seed: int = 0,
    on_file: Callable[[Path], None] | None = None,
) -> FolderClips:
    """Cuts the videos under folder into clips (see the module's text and `FolderClips`).

    num_frames, stride, seed: see `Cutting`
    size:       side of a square clip, or (H, W)
    on_file:    called with each file before it is read, for a progress bar

    Raises FileNotFoundError or NotADirectoryError for the folder, ValueError for numbers below 1
    and when there is no usable video at all.
    """
    folder = Path(folder)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    cutting = Cutting(num_frames, sides, stride, seed)
    skipped: list[tuple[Path, str]] = []
    truncated: list[Path] = []
    names: list[str] = []
    clips: list[np.ndarray] = []
    labels: list[int] = []
    rates: list[float | None] = []
    for class_folder, files in find_videos(folder, skipped):
        clips_before = len(clips)
        for file in files:
            if on_file is not None:
                on_file(file)
            reader = VideoReader(file)
            try:
                cut = cutting.clips(reader, file.relative_to(folder).as_posix())
            except (OSError, ValueError) as error:
                skipped.append((file, str(error).removeprefix(f"{file}: ")))
                continue
            clips.append(cut)
            labels += [len(names)] * len(cut)
            rates.append(cutting.rate(reader))
            if reader.truncated:
                truncated.append(file)
        if len(clips) > clips_before:
            names.append(class_name(class_folder))
        else:
            skipped.append((class_folder, UNUSED))
    if not clips:
        raise ValueError(none_usable(folder, skipped))
    return FolderClips(
        clips=np.concatenate(clips),
        labels=np.array(labels, np.int64),
        label_names=tuple(names),
        skipped=tuple(skipped),
        truncated=tuple(truncated),
        rates=tuple(rates),
    )


def class_name(class_folder: Path) -> str:
    """That of its entry: no link is followed."""
    return Path(os.path.abspath(class_folder)).name


def none_usable(folder: Path, skipped: Sequence[tuple[Path, str]]) -> str:
    """An error text: a folder has no usable video, and why."""
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:3])
    return f"{folder}: no usable video ({reasons})"


def rate_of(rates: Sequence[float | None]) -> tuple[float | None, str]:
    """The frames a second of clips of `FolderClips.rates`, and one line about what was found.

    That is the rate of all, or the median of those that there are. None: no video states one.
    """
    counts = Counter(f"{rate:g}" for rate in sorted(filter(None, rates)))
    if not counts:
        return None, "the videos state no frame rate"
    known = [rate for rate in rates if rate]
    median = statistics.median_low(known)
    if all(abs(rate / median - 1) < _ALIKE for rate in known):
        return median, f"the clips have {median:g} frames a second"
    found = ", ".join(f"{rate} ({count} of {len(rates)})" for rate, count in counts.items())
    return median, f"the clips differ in frames a second: {found}; their median is {median:g}"


def find_videos(folder: Path, skipped: list[tuple[Path, str]]) -> list[tuple[Path, list[Path]]]:
    """Each class's folder and its video files, sorted; other files are added to skipped.

    Raises FileNotFoundError or NotADirectoryError for the folder.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")
    entries = _entries(folder)
    class_folders = [path for path in entries if path.is_dir()]
    if not class_folders:
        return [(folder, _videos(entries, skipped))]
    outside = "lies beside the class folders, not in one"
    skipped.extend((path, outside) for path in entries if not path.is_dir())
    return [(path, _videos(_below(path, skipped), skipped)) for path in class_folders]


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but for what nobody put there as data."""
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if path.name.lower() not in _LEFT_BEHIND)


def _below(folder: Path, skipped: list[tuple[Path, str]]) -> list[Path]:
    """All that are no folders, at any depth, sorted; folders that are left out go to skipped.

    Links come last, so that of a folder and a link to it the link is left out.
    """
    files, folders, links = [], [folder], []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            identity = here.stat().st_dev, here.stat().st_ino
            if identity in seen:
                skipped.append((here, "leads to a folder that was already read"))
                continue
            seen.add(identity)
            for path in _entries(here):
                to = files if not path.is_dir() else links if path.is_symlink() else folders
                to.append(path)
        except OSError as error:
            skipped.append((here, f"cannot be read ({error.strerror})"))
    return sorted(files)


def _videos(paths: list[Path], skipped: list[tuple[Path, str]]) -> list[Path]:
    videos = []
    for path in paths:
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            skipped.append((path, f"suffix {path.suffix!r} is not one of a video"))
        elif not path.is_file():
            reason = "no regular file" if path.exists() else "leads to no file"
            skipped.append((path, reason))
        else:
            videos.append(path)
    return videos


def _fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part of shape H : W, resized; uint8 [h, w, 3] -> [H, W, 3]."""
    h, w = frame.shape[:2]
    scale = min(h / height, w / width)
    top, left = (h - height * scale) / 2, (w - width * scale) / 2
    box = (left, top, w - left, h - top)
    # Pillow widens its filter when it shrinks an image, so nothing aliases.
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box))


def _cut(
    frames: list[np.ndarray], num_frames: int, stride: int, rng: np.random.Generator
) -> np.ndarray:
    """As many clips as fit, one after the other, from a random first frame; [M, N, H, W, 3].

    Raises ValueError when not even one fits.
    """
    span = (num_frames - 1) * stride + 1
    if len(frames) < span:
        raise ValueError(f"too short: {len(frames)} frames, {span} needed")
    count = len(frames) // span
    first = int(rng.integers(len(frames) - count * span + 1))
    starts = range(first, first + count * span, span)
    return np.stack([np.stack(frames[s : s + span : stride]) for s in starts])
