"""Clips to files and back: mp4, webm, mkv, gif, animated webp, and png sheets.

A clip is uint8 [N, H, W, 3], RGB. Every file is written under a temporary name in its own folder
and renamed when it is complete, so that an error or an interrupt leaves nothing behind. The same
frames give the same bytes: one encoder thread, no dates, no random identifiers. Every animated
format decodes to exactly N frames, equal neighbours included.

    mp4   H.264, or another codec (codecs.py); 4:2:0, or 4:4:4
    webm  VP9, or AV1
    mkv   FFV1, lossless, or another codec
    gif   one palette of 256 colours for the clip
    webp  lossless
    png   lossless, all frames side by side in rows of 16

Where colours are 4:2:0, an odd width or height is extended by its last column or row. A file may
carry a text (metadata.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import PIL
from av.filter import Graph
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from ..files import check_writable, replacing
from .codecs import SUFFIXES as ENCODED
from .codecs import check_encoding, encode, has_encoder
from .decoding import (
    MAX_PIXELS,
    animation,
    animation_kind,
    displayed,
    open_video,
    seconds_of,
    square_size,
    video_decoder,
    video_stream,
)
from .metadata import check_metadata, exif_with_description, gif_with_comment
from .pictures import check_clip, decoding, sheet

__all__ = [
    "SUFFIXES",
    "Video",
    "VideoReader",
    "check_target",
    "read_video",
    "write_video",
]

MIN_FPS, MAX_FPS = 0.01, 1000.0


# -- writing ---------------------------------------------------------------------------------------


def check_target(
    path: str | Path,
    codec: str | None = None,
    crf: int | None = None,
    chroma: str | None = None,
) -> Path:
    """path itself, once a video can be written there: suffix known, folder there and writable.

    codec, crf, chroma: of `codecs.check_encoding`

    Raises ValueError for an unknown suffix, one whose encoder is missing or what `check_encoding`
    refuses, else what `check_writable` raises.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
        )
    if suffix == ".gif" and not has_encoder("gif"):
        raise ValueError(f"{path}: PyAV {av.__version__} has no encoder for it")
    if suffix == ".webp" and not features.check("webp"):
        raise ValueError(f"{path}: Pillow {PIL.__version__} has no encoder for it")
    try:
        check_encoding(suffix, codec, crf, chroma)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return check_writable(path)


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float = 8.0,
    *,
    metadata: str | None = None,
    codec: str | None = None,
    crf: int | None = None,
    chroma: str | None = None,
) -> None:
    """Writes a clip in the format that the suffix of path names (see the module's table).

    frames:   uint8 [N, H, W, 3], N >= 1
    fps:      frames per second, a real number in [0.01, 1000]; gif keeps 1/100 s, webm, mkv and
              webp 1/1000 s (a png none)
    metadata: a text for the file to carry, of 64 KiB at most; `metadata.read_metadata` returns it
    codec, crf, chroma: how mp4, webm and mkv are encoded (`codecs.check_encoding`); None is the
              default of the format

    Raises TypeError for another dtype or an fps that is no number, ValueError for a shape, suffix,
    fps or encoding, OSError when the file cannot be written. Only a complete file ever appears
    under path.
    """
    path = check_target(path, codec, crf, chroma)
    check_clip("write_video", frames)
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise TypeError(f"write_video: fps must be a number, got {fps!r}")
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"write_video: fps must be in [{MIN_FPS:g}, {MAX_FPS:g}], got {fps!r}")
    text = None if metadata is None else check_metadata(metadata)
    suffix, frames, fps = path.suffix.lower(), np.ascontiguousarray(frames), float(fps)
    with replacing(path) as temporary:
        if suffix in _WRITERS:
            _WRITERS[suffix](temporary, frames, fps, text)
        else:
            encode(temporary, suffix, frames, fps, check_encoding(suffix, codec, crf, chroma), text)


def _write_gif(path: Path, frames: np.ndarray, fps: float, text: bytes | None) -> None:
    # FFmpeg, because Pillow merges equal neighbours and the clip would lose frames.
    height, width = frames.shape[1:3]
    tick = Fraction(1, 100)
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=tick)
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0")
    apply = graph.add("paletteuse")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(apply, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(sink)
    graph.configure()
    starts, _ = _ticks(len(frames), fps, 100)
    for start, pixels in zip(starts, frames, strict=True):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = start, tick
        graph.push(frame)
    graph.push(None)
    with av.open(str(path), "w", format="gif", options={"fflags": "+bitexact", "loop": "0"}) as f:
        stream = f.add_stream("gif", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.codec_context.time_base = tick
        for _ in frames:
            f.mux(stream.encode(graph.pull()))
        f.mux(stream.encode())
    if text is not None:
        path.write_bytes(gif_with_comment(path.read_bytes(), text))


def _write_webp(path: Path, frames: np.ndarray, fps: float, text: bytes | None) -> None:
    # The container by hand (developers.google.com/speed/webp/docs/riff_container), because
    # libwebp's animation encoder merges equal neighbours and the clip would lose frames.
    size = _uint24(frames.shape[2] - 1) + _uint24(frames.shape[1] - 1)
    animated, with_exif, no_blending, forever = 0x02, 0x08, b"\x02", b"\0\0"
    flags = animated | (0 if text is None else with_exif)
    header = flags.to_bytes(4, "little") + size
    chunks = [_chunk(b"VP8X", header), _chunk(b"ANIM", b"\0\0\0\0" + forever)]
    _, lasts = _ticks(len(frames), fps, 1000)
    for duration, pixels in zip(lasts, frames, strict=True):
        still = BytesIO()
        Image.fromarray(pixels).save(still, format="WEBP", lossless=True)
        bitstream = still.getvalue()[12:]  # after "RIFF", size, "WEBP"
        place = _uint24(0) + _uint24(0) + size + _uint24(duration) + no_blending
        chunks.append(_chunk(b"ANMF", place + bitstream))
    if text is not None:
        chunks.append(_chunk(b"EXIF", exif_with_description(text)))
    path.write_bytes(_chunk(b"RIFF", b"WEBP" + b"".join(chunks)))


def _chunk(name: bytes, payload: bytes) -> bytes:
    return name + len(payload).to_bytes(4, "little") + payload + b"\0" * (len(payload) % 2)


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _ticks(count: int, fps: float, per_second: int) -> tuple[list[int], list[int]]:
    """Start and duration of each frame in whole ticks, at least one, without drift."""
    starts = [max(i, round(i * per_second / fps)) for i in range(count + 1)]
    return starts[:-1], [end - start for start, end in pairwise(starts)]


def _write_png(path: Path, frames: np.ndarray, fps: float, text: bytes | None) -> None:
    info = PngInfo()
    if text is not None:
        info.add_itxt("Comment", text.decode())
    Image.fromarray(sheet(frames)).save(path, format="PNG", pnginfo=info)


_WRITERS: dict[str, Callable[[Path, np.ndarray, float, bytes | None], None]] = {
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_png,
}
SUFFIXES = (*ENCODED, *_WRITERS)


# -- reading ---------------------------------------------------------------------------------------


class Video(NamedTuple):
    """A file's frames uint8 [N, H, W, 3]; fps, or None if it states none; truncated or not."""

    frames: np.ndarray
    fps: float | None
    truncated: bool


def read_video(path: str | Path) -> Video:
    """All frames of a video file that decode (see `VideoReader`, which yields them one by one).

    Raises FileNotFoundError for a missing file, ValueError for one without a single readable frame.
    """
    reader = VideoReader(path)
    frames = np.stack(list(reader))
    return Video(frames, reader.fps, reader.truncated)


class VideoReader:
    """Iterates over the frames of a video file, uint8 [H, W, 3], up to the first fault.

    They are upright and opaque, in square pixels (decoding.py). Frames are counted by decoding,
    whatever the header says. All have the size of the first. During and after the iteration:

        fps        frames per second as the file states them, or None; after the iteration, the mean
                   of their times where that is far from it
        truncated  the data ended in a fault, or before the end that the header announces

    Iterating raises FileNotFoundError for a missing file, ValueError for a file that is no video or
    in which no frame decodes. A file that names other files is not followed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fps: float | None = None
        self.truncated = False

    def __iter__(self) -> Iterator[np.ndarray]:
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file")
        self.fps, self.truncated = None, False
        with self.path.open("rb") as file:
            kind = animation_kind(file.read(16))
        # FFmpeg does not decode animated webp, and passes off half a gif frame as a whole one.
        count = 0
        for frame in self._images(kind) if kind else self._video():
            count += 1
            yield frame
        if count == 0:
            raise ValueError(f"{self.path}: no frame could be decoded")

    def _video(self) -> Iterator[np.ndarray]:
        try:
            with open_video(self.path) as file:
                stream = video_stream(file)
                self.fps = _rate(stream.average_rate)
                size, times = None, []
                for frame in self._decoded(file, stream):
                    size = size or square_size(frame, stream)
                    yield displayed(frame, size)
                    times.append(seconds_of(frame, stream))
                end = next((time for time in reversed(times) if time is not None), 0.0)
                last_expected = _announced_seconds(stream) - 2.0 / (self.fps or 1.0)
                self.truncated |= len(times) < stream.frames or end < last_expected
                self.fps = _likely_rate(self.fps, times)
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{self.path}: not a readable video ({reason})") from error

    def _decoded(
        self, file: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[av.VideoFrame]:
        """Frames up to the first fault in the data, the decoder's delayed ones included."""
        decoder = video_decoder(stream)
        decoder.options = {"max_pixels": str(MAX_PIXELS)}
        try:
            for packet in file.demux(stream):
                for frame in decoder.decode(packet):
                    if frame.is_corrupt:
                        self.truncated = True
                        return
                    yield frame
        except av.FFmpegError:
            self.truncated = True
            try:
                yield from decoder.decode(None)
            except av.FFmpegError:
                return

    def _images(self, kind: str) -> Iterator[np.ndarray]:
        milliseconds: list[float] = []
        try:
            with (
                decoding(f"{self.path}: not a readable picture or animation"),
                Image.open(self.path, formats=[kind]) as image,
            ):
                for pixels, shown in animation(image):
                    milliseconds.append(shown)
                    self.fps = _rate(1000.0 * len(milliseconds) / (sum(milliseconds) or math.inf))
                    yield pixels
        except ValueError:
            if not milliseconds:
                raise
            self.truncated = True


def _rate(stated: Fraction | float | None) -> float | None:
    """Frames a second as a file states them; None for what no video has."""
    return float(stated) if stated and MIN_FPS <= stated <= MAX_FPS else None


def _likely_rate(stated: float | None, times: Sequence[float | None]) -> float | None:
    """The rate of frames at these times: the stated one, unless their mean is far from it.

    Headers are wrong of videos whose rate varies, and of fields that are counted as frames.
    """
    known = [(index, time) for index, time in enumerate(times) if time is not None]
    if len(known) < 2 or known[-1][1] <= known[0][1]:
        return stated
    (first, start), (last, end) = known[0], known[-1]
    mean = (last - first) / (end - start)
    return stated if stated and abs(mean / stated - 1) < 0.1 else _rate(mean)


def _announced_seconds(stream: av.VideoStream) -> float:
    """The track's length as a Matroska tag states it ("00:00:05.333000000"), 0 without one."""
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
