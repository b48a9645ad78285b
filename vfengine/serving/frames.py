"""Frames of jobs on disk: exact ones on a sheet, and clips that were sent, read within limits.

A file that was sent is named by its first bytes, and is read as that alone: FFmpeg must never take
one for a playlist, which names further files. Nor may it use the decoders of seldom formats, or
open anything but the file that it is given. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from ..files import replacing
from ..media.decoding import (
    animation,
    animation_kind,
    displayed,
    open_video,
    seconds_of,
    square_size,
    video_decoder,
    video_stream,
)
from ..media.pictures import SHEET_COLUMNS, decoding, sheet

MAX_PIXELS = 2**24  # of a frame that was sent
MAX_FRAMES = 1000
MAX_ALL_PIXELS = 2**31  # of all frames: those of 1000 in full HD
_LEVEL = 2  # of PNG's 9: a third of the usual one's time, for files that are a sixth larger
_NOTE = "vfengine sheet"  # of a PNG: "frames width height fps"
_VIDEOS = ((4, b"ftyp", "mov"), (0, b"\x1a\x45\xdf\xa3", "matroska"))  # place, bytes, FFmpeg's name
_DECODERS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "ffv1", "mpeg4", "mjpeg"),
    *("libvpx", "libvpx-vp9"),  # of what is transparent
)


class Source(NamedTuple):
    """A clip: frames uint8 [N, H, W, 3], and frames a second, None where the file has none."""

    frames: np.ndarray
    fps: float | None


# -- exact frames ----------------------------------------------------------------------------------


def write_png(file: Path, pixels: np.ndarray, record: str | None, note: str | None = None) -> None:
    """Writes uint8 [H, W, 3], whole or not at all.

    record: of what made it, where `media.metadata` looks for it; note: for `read_sheet`
    """
    info = PngInfo()
    if record is not None:
        info.add_itxt("Comment", record)
    if note is not None:
        info.add_text(_NOTE, note)
    with replacing(file) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info, compress_level=_LEVEL)


def write_sheet(file: Path, frames: np.ndarray, fps: float, record: str | None = None) -> None:
    """Writes frames uint8 [N, H, W, 3] as one picture, of which `read_sheet` makes them again.

    record: as in `write_png`
    """
    count, height, width, _ = frames.shape
    write_png(file, sheet(frames), record, f"{count} {width} {height} {fps!r}")


def read_sheet(file: Path) -> Source:
    """The frames of a sheet. ValueError for another file."""
    with decoding("not a sheet of frames"), Image.open(file, formats=["PNG"]) as image:
        count, width, height, fps = image.text[_NOTE].split()
        pixels = np.array(image.convert("RGB"))
        count, width, height = int(count), int(width), int(height)
        columns = min(count, SHEET_COLUMNS)
        places = (divmod(k, columns) for k in range(count))
        cuts = [
            pixels[
                row * (height + 1) : row * (height + 1) + height,
                column * (width + 1) : column * (width + 1) + width,
            ]
            for row, column in places
        ]
        return Source(np.stack(cuts), float(fps))


# -- clips that were sent --------------------------------------------------------------------------


def read_source(
    file: Path, width: int, height: int, fps: float, check: Callable[[], None] = lambda: None
) -> np.ndarray:
    """The frames of the clip in a file, uint8 [N, height, width, 3], at so many a second.

    Frames of this size and rate are kept exactly. Others are cropped in the middle and resized, and
    chosen by their time.

    check: called for each frame; what it raises ends the reading

    Raises ValueError for a file that is no clip, is broken, or is larger than the limits above.
    """
    with file.open("rb") as opened:
        start = opened.read(16)
    if animation_kind(start) == "PNG":
        source = read_sheet(file)
        frames = [_fitted(frame, width, height) for frame in source.frames]
        return _at_rate(frames, source.fps, fps)
    read = _animation if animation_kind(start) else _video
    frames, times, left = [], [], MAX_ALL_PIXELS
    for pixels, seconds in read(file, start):
        check()
        left -= pixels.shape[0] * pixels.shape[1]
        if len(frames) == MAX_FRAMES or left < 0:
            raise ValueError(f"the video has more than {len(frames)} frames, which is too many")
        frames.append(_fitted(pixels, width, height))
        times.append(seconds)
    if not frames:
        raise ValueError("no frame of the video could be decoded")
    length = times[-1] - times[0]
    rate = (len(frames) - 1) / length if length > 0 else None
    return _at_rate(frames, rate, fps)


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"a frame of the video may have {MAX_PIXELS} pixels, got {width}x{height}")


def _video(file: Path, start: bytes) -> Iterator[tuple[np.ndarray, float]]:
    """Frames of a file of one of _VIDEOS, and their seconds; broken data is an error."""
    names = (n for place, magic, n in _VIDEOS if start[place : place + len(magic)] == magic)
    kind = next(names, None)
    if kind is None:
        raise ValueError("expected a video: mp4, webm, gif or animated webp")
    try:
        decoders = {"codec_whitelist": ",".join(_DECODERS)}
        with open_video(file, kind, format_whitelist=kind, **decoders) as container:
            stream = video_stream(container)
            decoder = video_decoder(stream)
            if stream.codec_context.name not in _DECODERS:
                raise ValueError(f"a video in {stream.codec_context.name} is not read")
            decoder.options = {"max_pixels": str(MAX_PIXELS), **decoders}
            _check_size(stream.width, stream.height)
            size, k = None, 0
            for packet in container.demux(stream):
                for frame in decoder.decode(packet):
                    _check_size(frame.width, frame.height)
                    size = size or square_size(frame, stream)
                    _check_size(*size)
                    seconds = seconds_of(frame, stream)
                    yield displayed(frame, size), k if seconds is None else seconds
                    k += 1
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the video cannot be decoded ({reason})") from error


def _animation(file: Path, start: bytes) -> Iterator[tuple[np.ndarray, float]]:
    """Frames of a gif or webp, and their seconds."""
    with (
        decoding("the animation cannot be decoded"),
        Image.open(file, formats=[animation_kind(start)]) as image,
    ):
        _check_size(*image.size)
        seconds = 0.0
        for pixels, milliseconds in animation(image):
            yield pixels, seconds
            seconds += milliseconds / 1000


# -- size and rate ---------------------------------------------------------------------------------


def _fitted(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def _at_rate(frames: list[np.ndarray], rate: float | None, fps: float) -> np.ndarray:
    """Frames at fps, of frames at another rate; those of nearly the same one are kept as they are.

    A file keeps times in hundredths or thousandths of a second, so a rate is never exact.
    """
    if rate is None or abs(rate / fps - 1) < 0.02:
        return np.stack(frames)
    count = max(1, round(len(frames) * fps / rate))
    if count > MAX_FRAMES:
        raise ValueError(f"the video has more than {MAX_FRAMES} frames at {fps:g} a second")
    return np.stack(
        [frames[min(len(frames) - 1, int((k + 0.5) * rate / fps))] for k in range(count)]
    )


def reduced(pixels: np.ndarray, scale: int) -> np.ndarray:
    """The picture that was enlarged to this one, uint8 [H, W, 3]; the same one if it was not."""
    small = pixels[::scale, ::scale]
    again = small.repeat(scale, axis=0).repeat(scale, axis=1)
    return small if again.shape == pixels.shape and np.array_equal(again, pixels) else pixels
