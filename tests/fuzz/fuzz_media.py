"""Damaged pictures and videos: read whole, in part, or refused in one line that names the file.

python tests/fuzz/fuzz_media.py --cases 10000 --seed 1   (with --first N it goes on from a case)
"""

from __future__ import annotations

import functools
import io
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    TESTS = Path(__file__).resolve().parents[1]
    sys.path += map(str, (TESTS.parent, TESTS / "tools"))

import av
import numpy as np
from damage import damaged_bytes
from odd_media import EIGHT, corners, cover_first, set_matrix, write_odd
from PIL import Image
from watched import main

from vfengine.media import decoding
from vfengine.media.metadata import read_metadata
from vfengine.media.pictures import read_picture
from vfengine.media.video import VideoReader, write_video
from vfengine.serving.errors import ApiError
from vfengine.serving.frames import read_source
from vfengine.serving.uploads import store_picture
from vfengine.training.folder import read_folder

av.logging.set_level(av.logging.PANIC)
CODECS = (
    *(("mp4", "libx264", "yuv420p"), ("mov", "mpeg4", "yuv420p"), ("mkv", "ffv1", "bgra")),
    *(("avi", "mpeg4", "yuv420p"), ("ts", "mpeg2video", "yuv420p"), ("flv", "flv1", "yuv420p")),
    *(("mpg", "mpeg1video", "yuv420p"), ("wmv", "wmv2", "yuv420p"), ("m4v", "libx264", "yuv444p")),
    *(("webm", "libvpx-vp9", "yuva420p"), ("3gp", "mpeg4", "yuv420p"), ("m2ts", "libx264", "gray")),
    *(("mkv", "libx264", "yuv420p10le"), ("mov", "qtrle", "argb"), ("avi", "mjpeg", "yuvj420p")),
)
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ENDS = (0, 1, 255, 2**15, 30_000, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
MOST_PIXELS = 2**22  # that are decoded of one file: it is about damage, not about speed


@functools.cache
def files() -> dict[str, bytes]:
    """Small valid files of every kind, by name; the same ones for every seed."""
    clip = np.stack([np.roll(corners(32, 48), 3 * k, 1) for k in range(6)])
    glass = np.dstack([clip[0], np.arange(48, dtype=np.uint8)[None].repeat(32, 0) * 5])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k, (suffix, codec, form) in enumerate(CODECS):
            options = {"auto-alt-ref": "0"} if form == "yuva420p" else {}
            rate = 10 if codec not in ("mpeg1video", "mpeg2video") else 25
            write_odd(folder / f"{k}.{suffix}", clip, codec, form, rate=rate, **options)
        for place in EIGHT[1::3]:
            file = folder / f"turned{place.exif}.mp4"
            write_odd(file, clip, aspect="4/3", cover=clip[0])
            set_matrix(file, place.matrix)
            cover_first(file)
        for suffix in ("gif", "webp", "png", "mp4"):
            write_video(folder / f"made.{suffix}", clip, metadata="a text")
        for codec in ("hevc", "av1"):
            write_video(folder / f"{codec}.mkv", clip, codec=codec)
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a text"
        for kind in PICTURES:
            for k, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "1")):
                image = Image.fromarray(glass).convert(mode)
                try:
                    image.save(folder / f"still{k}.{kind.lower()}", kind, exif=exif)
                except (OSError, ValueError):  # a mode that the format has not
                    continue
        images = [Image.fromarray(glass), Image.fromarray(glass[::-1].copy())]
        for kind in ("GIF", "WEBP", "PNG"):
            options = {"save_all": True, "append_images": images[1:], "duration": 90}
            images[0].save(folder / f"moving.{kind.lower()}", kind, **options)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Changed once or some times, more often in its head, where sizes are."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        head = chance.choice((32, 256, len(data)))
        if chance.random() < 0.3 and len(data) > 8:
            place, size = chance.randrange(min(head, len(data) - 4)), chance.choice((2, 4))
            number = chance.choice(ENDS) % 2 ** (8 * size)
            value = number.to_bytes(size, chance.choice(("little", "big")))
            data = data[:place] + value + data[place + size :]
        else:
            data = damaged_bytes(chance, data[:head]) + data[head:]
    return data


def case(chance: random.Random, folder: Path) -> str:
    """A damaged file, perhaps under the suffix of another format, before every reader."""
    Image.MAX_IMAGE_PIXELS = decoding.MAX_PIXELS = MOST_PIXELS // 2  # as this child shall see it
    name = chance.choice(sorted(files()))
    suffix = Path(name if chance.random() < 0.8 else chance.choice(sorted(files()))).suffix
    file = folder / "data" / f"a{suffix}"
    file.parent.mkdir()
    file.write_bytes(damaged(chance, files()[name]))
    readers = (_watch, _look, _trained, _sent, _uploaded, _text)
    words = [_said(reader, file) for reader in readers]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    return "read" if "read" in words else "refused"


def whole_case(chance: random.Random, folder: Path) -> str:
    """Every file is read as long as it is whole."""
    for name, data in files().items():
        file = folder / "data" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        assert "read" in (_said(_watch, file), _said(_look, file)), name
    return "read"


def _said(reader, file: Path) -> str:
    """What became of it; only an error of one line that names the file is as it should be."""
    try:
        reader(file)
    except (ValueError, OSError, ApiError) as error:
        text = str(getattr(error, "message", error))
        assert text and "\n" not in text, repr(error)
        if reader in (_watch, _look, _trained, _text):
            assert str(file.parent) in text, repr(error)
        else:
            assert str(file.parent) not in text, repr(error)
        return "refused"
    return "read"


def _watch(file: Path) -> None:
    reader, left = VideoReader(file), MOST_PIXELS
    for frame in reader:
        assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3, frame.shape
        left -= frame.size
        if left < 0:
            return
    assert reader.fps is None or 0.01 <= reader.fps <= 1000, reader.fps


def _look(file: Path) -> None:
    assert min(read_picture(file).size) > 0


def _trained(file: Path) -> None:
    if _small(file):
        found = read_folder(file.parent, 2, 16)
        assert found.clips.shape[1:] == (2, 16, 16, 3)


def _small(file: Path) -> bool:
    """Whether its frames are few and small enough to be read again and again."""
    try:
        _, *sizes = (frame.size for frame in VideoReader(file))
    except ValueError:
        return True
    return sum(sizes) < MOST_PIXELS


def _sent(file: Path) -> None:
    assert read_source(file, 24, 16, 10.0).shape[1:] == (16, 24, 3)


def _uploaded(file: Path) -> None:
    target = file.parent.parent / "upload"
    info = SimpleNamespace(width=24, height=16)
    store_picture(io.BytesIO(file.read_bytes()), info, target)
    assert Image.open(target).size == (24, 16)


def _text(file: Path) -> None:
    assert isinstance(read_metadata(file), str | None)


if __name__ == "__main__":
    files()
    sys.exit(main({"media": case}, ["media", *sys.argv[1:]]))
