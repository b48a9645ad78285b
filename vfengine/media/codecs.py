"""Video codecs: which file takes which, what each can do, and frames through its encoder.

Each encoder runs on one thread and writes no dates, names of releases or random identifiers, so
that the same frames give the same bytes. Its speed and its other choices are fixed here; a caller
chooses quality (crf) and the resolution of colours (chroma).

    h264  x264       crf 0..51, 17 by default    4:2:0 or 4:4:4
    hevc  x265       crf 0..51, 17 by default    4:2:0 or 4:4:4
    av1   SVT-AV1    crf 1..63, 20 by default    4:2:0
    vp9   libvpx     crf 0..63, 18 by default    4:2:0 or 4:4:4
    ffv1  FFmpeg's   lossless, RGB
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.codec.context import Flags
from av.filter import Graph
from av.video.reformatter import ColorRange

from ..arguments import as_int
from ..names import CHROMAS

OLDEST = 17  # those before it decode the colours of HD video as if they were SD's
if int(av.__version__.partition(".")[0]) < OLDEST:
    raise ImportError(f"videos need PyAV {OLDEST} or newer, got {av.__version__}")


class _Codec(NamedTuple):
    """An encoder of FFmpeg.

    crfs, crf: the range of its quality and the default; None without a choice
    chromas:   the resolutions of colours that it takes; none: it takes RGB
    options:   of the encoder, beside crf
    tag:       in an mp4, where a player needs another than FFmpeg's
    """

    encoder: str
    crfs: range | None
    crf: int | None
    chromas: tuple[str, ...]
    options: Mapping[str, str]
    tag: str = ""


# mbtree and cutree: the lookahead of x264 reads past its tables on small frames, so that the bytes
# differ from run to run, and that of x265 writes past them. It shifts bits between long-lived and
# short-lived blocks; at a crf of 17 and a few dozen frames nothing is lost.
_X265 = "pools=none:frame-threads=1:wpp=0:info=0:cutree=0:log-level=none"
_X265_BLOCK = 64  # pixels of a side
_CODECS = {
    "h264": _Codec("libx264", range(52), 17, CHROMAS, {"preset": "medium", "mbtree": "0"}),
    "hevc": _Codec(
        *("libx265", range(52), 17, CHROMAS, {"preset": "medium", "x265-params": _X265}),
        tag="hvc1",  # Apple's players take no other
    ),
    "av1": _Codec(
        *("libsvtav1", range(1, 64), 20, ("420",), {"preset": "6", "svtav1-params": "lp=1"})
    ),
    "vp9": _Codec(
        *("libvpx-vp9", range(64), 18, CHROMAS),
        {"b": "0", "deadline": "good", "cpu-used": "2"},
    ),
    "ffv1": _Codec("ffv1", None, None, (), {"level": "3", "g": "1", "slicecrc": "1"}),
}


_RGB = "bgr0"  # the pixels of ffv1


class _Container(NamedTuple):
    """A file format of FFmpeg, and its codecs, the default first."""

    format: str
    codecs: tuple[str, ...]
    options: Mapping[str, str]


_CONTAINERS = {
    ".mp4": _Container("mp4", ("h264", "hevc", "av1"), {"movflags": "+faststart"}),
    ".webm": _Container("webm", ("vp9", "av1"), {}),
    ".mkv": _Container("matroska", ("ffv1", "h264", "hevc", "av1", "vp9"), {}),
}
SUFFIXES = tuple(_CONTAINERS)


# -- choosing one ----------------------------------------------------------------------------------


class Encoding(NamedTuple):
    """How frames are encoded, complete; None is what a format does not leave open."""

    codec: str | None = None
    crf: int | None = None
    chroma: str | None = None


def available_codecs(suffix: str) -> tuple[str, ...]:
    """The codecs that a file of this suffix may have and that this PyAV can encode."""
    container = _CONTAINERS.get(suffix.lower())
    names = container.codecs if container else ()
    return tuple(name for name in names if has_encoder(_CODECS[name].encoder))


def check_encoding(
    suffix: str,
    codec: str | None = None,
    crf: int | None = None,
    chroma: str | None = None,
    size: tuple[int, int] | None = None,
) -> Encoding:
    """The encoding of a file, with the defaults of its format and codec filled in.

    suffix: of the file's name, such as ".mp4"
    codec:  one of `names.CODECS`; crf: less is better; chroma: one of `names.CHROMAS`
    size:   height and width of the frames, to try the encoder on

    Raises ValueError for a codec that the format does not take or that PyAV lacks, naming those
    that are there; for a crf or chroma that the codec does not take; for frames of a size that it
    cannot encode.
    """
    suffix = suffix.lower()
    asked = {"codec": codec, "crf": crf, "chroma": chroma}
    container = _CONTAINERS.get(suffix)
    if container is None:
        for name, value in asked.items():
            if value is not None:
                raise ValueError(f"a {suffix} file takes no {name}, got {value!r}")
        return Encoding()
    there = available_codecs(suffix)
    name = container.codecs[0] if codec is None else codec
    if name not in there:
        problem = f"PyAV {av.__version__} has no encoder for it"
        problem = problem if name in container.codecs else f"a {suffix} file does not take it"
        known = ", ".join(there) or "none"
        raise ValueError(f"codec {name!r}: {problem}; there for {suffix}: {known}")
    found = _CODECS[name]
    if found.crfs is None:
        for setting, value in (("crf", crf), ("chroma", chroma)):
            if value is not None:
                raise ValueError(f"{name} is lossless: it takes no {setting}, got {value!r}")
        encoding = Encoding(name)
    else:
        crf = found.crf if crf is None else crf
        chroma = CHROMAS[0] if chroma is None else chroma
        if as_int(crf) not in found.crfs:
            low, high = found.crfs[0], found.crfs[-1]
            raise ValueError(f"crf of {name} must be an int from {low} to {high}, got {crf!r}")
        if chroma not in found.chromas:
            known = " or ".join(found.chromas)
            raise ValueError(f"chroma of {name} must be {known}, got {chroma!r}")
        encoding = Encoding(name, crf, chroma)
    if size is not None:
        _try(encoding, size)
    return encoding


def has_encoder(name: str) -> bool:
    """Whether this PyAV has an encoder of FFmpeg's."""
    try:
        av.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _try(encoding: Encoding, size: tuple[int, int]) -> None:
    """ValueError unless the encoder takes a frame of this size; mkv needs no file to seek in."""
    try:
        frame = np.zeros((1, *size, 3), np.uint8)
        _encode(BytesIO(), _CONTAINERS[".mkv"], frame, 8.0, encoding, None)
    except (av.FFmpegError, OSError) as error:
        height, width = size
        raise ValueError(
            f"{encoding.codec} cannot encode frames of {width} x {height} ({error})"
        ) from error


# -- encoding --------------------------------------------------------------------------------------


def encode(
    path: Path, suffix: str, frames: np.ndarray, fps: float, encoding: Encoding, text: bytes | None
) -> None:
    """Writes frames uint8 [N, H, W, 3] to path, in the format that suffix names.

    4:2:0 needs even sides: an odd one is extended by its last column or row.

    encoding: of `check_encoding`;  text: the file's comment in UTF-8, if it is to have one
    """
    _encode(str(path), _CONTAINERS[suffix], frames, fps, encoding, text)


def _encode(
    place: str | BytesIO,
    container: _Container,
    frames: np.ndarray,
    fps: float,
    encoding: Encoding,
    text: bytes | None,
) -> None:
    codec = _CODECS[encoding.codec]
    if encoding.chroma == "420":
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    pixels = _RGB if encoding.chroma is None else f"yuv{encoding.chroma}p"
    conversion = _conversion(pixels, height, width, 1 / rate)
    options = dict(codec.options)
    if encoding.crf is not None:
        options["crf"] = str(encoding.crf)
    if encoding.codec == "hevc" and len(frames) <= 2:
        # x265 takes the decoding times of so few frames out of memory that it has never written
        options["x265-params"] += ":bframes=0"
    if encoding.codec == "hevc" and max(frames.shape[1:3]) <= _X265_BLOCK:
        # nor does it always write what predicts frames of one block: here each stands for itself
        options["x265-params"] += ":keyint=1"
    if encoding.codec == "av1":
        os.environ.setdefault("SVT_LOG", "1")  # errors alone; it prints its settings otherwise
    mux = {"fflags": "+bitexact", **container.options}
    with av.open(place, "w", format=container.format, options=mux) as file:
        if text is not None:
            file.metadata["comment"] = text.decode()
        stream = file.add_stream(codec.encoder, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= Flags.bitexact
        if codec.tag and container.format == "mp4":
            context.codec_tag = codec.tag
        # 1 is BT.709 for all three; without the tags a player may guess another matrix.
        context.color_primaries = context.color_trc = 1
        if encoding.chroma is not None:
            context.colorspace = 1
            context.color_range = ColorRange.MPEG
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            conversion.push(frame)
            file.mux(stream.encode(conversion.pull()))
        file.mux(stream.encode())


def _conversion(pixels: str, height: int, width: int, tick: Fraction) -> Graph:
    """Turns frames in RGB into the encoder's pixels, one at a time.

    FFmpeg's filter, because what PyAV's `reformat` can be told differs from release to release.
    """
    graph = Graph()
    scale = "threads=1"
    if pixels != _RGB:
        scale += ":flags=bicubic+accurate_rnd+bitexact:out_color_matrix=bt709:out_range=tv"
    graph.link_nodes(
        graph.add_buffer(width=width, height=height, format="rgb24", time_base=tick),
        graph.add("scale", scale),
        graph.add("format", f"pix_fmts={pixels}"),
        graph.add("buffersink"),
    ).configure()
    return graph
