"""Frames of video and animation files as they are to be looked at, for every reader of them.

A frame is uint8 [H, W, 3], RGB: turned and mirrored as the file says, in square pixels, and what is
transparent over black (pictures.py). Errors of broken files are ValueErrors.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageSequence

from .pictures import opaque, upright

MAX_PIXELS = 178_956_970  # of a frame: what Pillow takes for a bomb in a picture
_MAX_ASPECT = 16  # of a pixel's sides
_NO_CLIP = Disposition.attached_pic | Disposition.timed_thumbnails
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop it
_ANIMATIONS = ((0, b"GIF8", "GIF"), (8, b"WEBP", "WEBP"), (0, b"\x89PNG", "PNG"))  # and Pillow's


def animation_kind(start: bytes) -> str | None:
    """Pillow's name of the format of an animation or picture that begins so, or None."""
    for place, magic, name in _ANIMATIONS:
        if start[place : place + len(magic)] == magic:
            return name
    return None


def animation(image: Image.Image) -> Iterator[tuple[np.ndarray, float]]:
    """Frames of an open animation or picture, and the milliseconds that each is shown."""
    for frame in ImageSequence.Iterator(image):
        yield np.array(opaque(upright(frame))), frame.info.get("duration", 0)


# -- videos ----------------------------------------------------------------------------------------


@contextmanager
def open_video(
    path: Path, format: str | None = None, **options: str
) -> Iterator[av.container.InputContainer]:
    """A video file, of which FFmpeg opens no others, as one that is a playlist would have it.

    format: FFmpeg's name, or None to find out; options: of FFmpeg
    """
    options["protocol_whitelist"] = ""
    said = {"format": format, "options": options, "metadata_errors": "replace"}
    with _File(path) as file, av.open(file, **said) as container:
        yield container


class _File(io.FileIO):
    """A file in which broken data may seek anywhere; PyAV prints errors that are raised there."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError):
            return -1


def video_stream(file: av.container.InputContainer) -> av.VideoStream:
    """The best video stream, as FFmpeg chooses, but no cover picture; ValueError without one."""
    streams = [stream for stream in file.streams.video if not stream.disposition & _NO_CLIP]
    if not streams:
        cover = ", but a cover picture" if file.streams.video else ""
        raise ValueError(f"holds no video stream{cover}")
    best = file.streams.best("video")
    return best if best in streams else streams[0]


def video_decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """A decoder of the stream's packets that keeps what is transparent; ValueError without one.

    It has no threads: a process that is forked meanwhile would wait for them when it lets go of it.
    """
    decoder = stream.codec_context
    if decoder is None:
        raise ValueError("holds a video in an unknown codec")
    name = _WITH_ALPHA.get(decoder.name)
    if name is not None and stream.metadata.get("alpha_mode") == "1":
        decoder = av.CodecContext.create(name, "r")
    decoder.thread_count = 1
    return decoder


def square_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Width and height of a frame in square pixels, before it is turned.

    Sides only grow. ValueError for a frame beyond `MAX_PIXELS`, and for pixels of an absurd shape.
    """
    aspect, width, height = stream.sample_aspect_ratio or 1, frame.width, frame.height
    if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        raise ValueError(f"pixels may be {_MAX_ASPECT} times as wide as high, got {aspect}")
    if aspect > 1:
        width = round(width * aspect)
    else:
        height = round(height / aspect)
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"a frame may have {MAX_PIXELS} pixels, got {width} x {height}")
    return width, height


def seconds_of(frame: av.VideoFrame, stream: av.VideoStream) -> float | None:
    """When a frame is shown; None where the file does not say.

    PyAV 17.0's own `frame.time` divides by zero in frames that follow a fault.
    """
    if frame.pts is None or stream.time_base is None:
        return None
    return float(frame.pts * stream.time_base)


def displayed(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """A decoded frame as it is to be looked at; size: of `square_size`, before it is turned."""
    form = frame.format
    clear = form.has_palette or any(part.is_alpha for part in form.components)
    # threads of the conversion would outlive it, and a process that is forked later waits for them
    frame_rgb = frame.reformat(format="rgba" if clear else "rgb24", threads=1)
    pixels = frame_rgb.to_ndarray()
    if clear:
        pixels = np.asarray(opaque(Image.fromarray(pixels)))
    if pixels.shape[1::-1] != size:
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return pixels if matrix is None else _turned(pixels, np.frombuffer(matrix, np.int32))


def _turned(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The pixels where a display matrix (a b u, c d v, x y w) puts them, of eight places the next.

    It sends the point (x, y), y down, to (a x + c y, b x + d y).
    """
    a, b, _, c, d = matrix[:5].astype(float)
    mirrors = (a, d)  # those of x and y, where they are not swapped
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, mirrors = pixels.swapaxes(0, 1), (c, b)
    steps = [-1 if sign < 0 else 1 for sign in mirrors]
    return pixels[:: steps[1], :: steps[0]]
