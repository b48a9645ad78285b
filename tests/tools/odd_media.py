"""Videos as cameras, phones and other programs write them: turned, stretched, with covers."""

from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition


class Place(NamedTuple):
    """One of the eight ways to show a picture; matrix: a, b, c, d of a display matrix."""

    exif: int
    matrix: tuple[int, int, int, int]
    dihedral: tuple[bool, bool, bool]  # swap the sides, then mirror x, then y

    def shows(self, pixels):
        """uint8 [H, W, 3] as it is shown."""
        swap, x, y = self.dihedral
        pixels = pixels.swapaxes(0, 1) if swap else pixels
        return pixels[:: -1 if y else 1, :: -1 if x else 1]


EIGHT = (
    Place(1, (1, 0, 0, 1), (False, False, False)),
    Place(2, (-1, 0, 0, 1), (False, True, False)),
    Place(3, (-1, 0, 0, -1), (False, True, True)),
    Place(4, (1, 0, 0, -1), (False, False, True)),
    Place(5, (0, 1, 1, 0), (True, False, False)),
    Place(6, (0, 1, -1, 0), (True, True, False)),
    Place(7, (0, -1, -1, 0), (True, True, True)),
    Place(8, (0, -1, 1, 0), (True, False, True)),
)


def corners(height=32, width=48):
    """uint8 [H, W, 3], another colour in each quarter."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for k, colour in enumerate([(220, 40, 40), (40, 220, 40), (40, 40, 220), (230, 230, 60)]):
        top, left = k // 2 * (height // 2), k % 2 * (width // 2)
        pixels[top : top + height // 2, left : left + width // 2] = colour
    return pixels


def write_odd(
    path,
    frames,
    codec="libx264",
    form="yuv420p",
    aspect=None,
    ticks=None,
    cover=None,
    rate=10,
    **options,
):
    """Writes frames uint8 [N, H, W, 3] or [N, H, W, 4], `rate` a second.

    aspect: of a pixel; ticks: of each frame, of 1 / rate seconds; cover: a picture beside them
    """
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if cover is not None:
            beside = file.add_stream("png", rate=1)
            beside.height, beside.width, beside.pix_fmt = *cover.shape[:2], "rgb24"
            beside.disposition = Disposition.attached_pic.value  # PyAV 17.0 takes no flag
            picture = av.VideoFrame.from_ndarray(cover, format="rgb24")
            file.mux([*beside.encode(picture), *beside.encode()])
        kind = "rgba" if frames.shape[-1] == 4 else "rgb24"
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=kind)
            frame.pts, frame.time_base = k if ticks is None else ticks[k], Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def set_matrix(path, matrix):
    """Writes a, b, c, d into the display matrix of an mp4 or mov."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (number << 16 for number in matrix)
    numbers = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    path.write_bytes(data)


def cover_first(path):
    """Moves an mp4's user data, which a cover is in, ahead of its first track."""
    data = path.read_bytes()
    track, user = data.index(b"trak") - 4, data.rindex(b"udta") - 4
    end = user + int.from_bytes(data[user : user + 4], "big")
    path.write_bytes(data[:track] + data[user:end] + data[track:user] + data[end:])
