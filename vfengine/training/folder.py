"""A user's own folder of videos as training clips.

    DIR/walk/a.mp4  DIR/walk/b.webm  DIR/run/c.gif     sub-folders are the classes
    DIR/a.mp4  DIR/b.avi                               no sub-folders: one class, named after DIR

Frames are counted by decoding. The centre of each frame is cropped to the wanted shape and resized
with antialiasing. The video is then cut into as many clips as fit one after the other. Files that
cannot be used are skipped and named.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..media.video import VideoReader

VIDEO_SUFFIXES = (
    *(".3gp", ".apng", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ogv", ".ts", ".webm", ".webp", ".wmv"),
)


@dataclass(frozen=True, eq=False)
class FolderClips:
    """Everything usable in a folder, in memory.

    clips:       uint8 [M, N, H, W, 3]
    labels:      int64 [M], indices into label_names
    label_names: the classes, sorted
    skipped:     (path, reason) of every file and every class left out
    truncated:   files that end in a fault or early; the frames before that are used
    """

    clips: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    skipped: tuple[tuple[Path, str], ...]
    truncated: tuple[Path, ...]


def read_folder(
    folder: str | Path,
    num_frames: int = 16,
    size: int | tuple[int, int] = 64,
    stride: int = 1,
    seed: int = 0,
    on_file: Callable[[Path], None] | None = None,
) -> FolderClips:
    """Cuts the videos under folder into clips (see the module's text and `FolderClips`).

    num_frames: N, frames of a clip
    size:       side of a square clip, or (H, W)
    stride:     take every stride-th frame of the video
    seed:       decides at which frame a video's first clip begins, by the file's name alone and
                never so late that a clip is lost
    on_file:    called with each file before it is read, for a progress bar

    Hidden files are passed over. Raises FileNotFoundError or NotADirectoryError for the folder,
    ValueError for numbers below 1 and when there is no usable video at all.
    """
    folder = Path(folder)
    height, width = (size, size) if isinstance(size, int) else size
    if min(num_frames, height, width, stride) < 1:
        raise ValueError(
            f"read_folder: num_frames, size and stride must be at least 1, "
            f"got {num_frames}, {size} and {stride}"
        )
    skipped: list[tuple[Path, str]] = []
    truncated: list[Path] = []
    names: list[str] = []
    clips: list[np.ndarray] = []
    labels: list[int] = []
    for class_folder, files in _classes(folder, skipped):
        clips_before = len(clips)
        for file in files:
            if on_file is not None:
                on_file(file)
            name = file.relative_to(folder).as_posix()
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            reader = VideoReader(file)
            try:
                frames = [_fit(frame, height, width) for frame in reader]
                cut = _cut(frames, num_frames, stride, rng)
            except (OSError, ValueError) as error:
                skipped.append((file, str(error).removeprefix(f"{file}: ")))
                continue
            clips.append(cut)
            labels += [len(names)] * len(cut)
            if reader.truncated:
                truncated.append(file)
        if len(clips) > clips_before:
            names.append(class_folder.resolve().name)
        else:
            skipped.append((class_folder, "no usable video in this class"))
    if not clips:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:3])
        raise ValueError(f"{folder}: no usable video ({reasons})")
    return FolderClips(
        clips=np.concatenate(clips),
        labels=np.array(labels, np.int64),
        label_names=tuple(names),
        skipped=tuple(skipped),
        truncated=tuple(truncated),
    )


def _classes(folder: Path, skipped: list[tuple[Path, str]]) -> list[tuple[Path, list[Path]]]:
    """Each class's folder and its video files, sorted; other files are added to skipped."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    class_folders = [path for path in entries if path.is_dir()]
    if not class_folders:
        return [(folder, _videos(entries, skipped))]
    outside = "lies beside the class folders, not in one"
    skipped.extend((path, outside) for path in entries if not path.is_dir())
    return [(path, _videos(sorted(path.rglob("*")), skipped)) for path in class_folders]


def _videos(paths: list[Path], skipped: list[tuple[Path, str]]) -> list[Path]:
    videos = []
    for path in paths:
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(path)
        else:
            skipped.append((path, f"suffix {path.suffix!r} is not one of a video"))
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
