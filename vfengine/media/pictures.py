"""Images in and out: files to a network's pixels, sampled clips to frames and sheets.

A network's pixels are in -1..1. Frames are in 0..1, or uint8. Torch is imported only where an image
becomes a network's input.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..arguments import as_int
from ..names import FILTERS

if TYPE_CHECKING:
    from torch import Tensor

Picture: TypeAlias = "Image.Image | str | Path | np.ndarray | Tensor"  # see `as_picture`

SHEET_COLUMNS = 16
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_BROKEN = "not an image that can be read"


# -- in --------------------------------------------------------------------------------------------


@contextmanager
def decoding(failure: str) -> Iterator[None]:
    """ValueError, one line that begins with `failure`, for all that Pillow raises of broken files.

    That is of almost any kind. A MemoryError is passed on.
    """
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # which names the file, or where in memory it is
        raise ValueError(f"{failure} (it is of no known format)") from error
    except Exception as error:
        raise ValueError(f"{failure} ({' '.join(str(error).split())})") from error


def read_picture(file: str | Path) -> Image.Image:
    """An image file, turned as its EXIF says, decoded to the end.

    Raises FileNotFoundError; ValueError, one line, for what is no image, is cut off, or is not of
    8 bits a channel.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such image")
    with decoding(f"{file}: {_BROKEN}"), Image.open(file) as image:
        return _of_8_bits(upright(image))


def as_picture(image: Picture) -> Image.Image:
    """What a caller may give as a picture, turned as its EXIF says.

    a path      is read by `read_picture`
    a PIL image may be of any mode of 8 bits a channel, or of 1 bit
    an array    is [H, W, C], as the frames of output type "np": floating point in 0..1, or uint8
    a tensor    is [C, H, W], as those of "pt": the same dtypes

    C is 1, 3, or 4 with opacity; an array of one channel may be [H, W]. Raises TypeError for
    anything else and for other dtypes, ValueError for shapes and values, and as `read_picture`.
    """
    if isinstance(image, str | os.PathLike):
        return read_picture(image)
    if isinstance(image, Image.Image):
        with decoding(f"{getattr(image, 'filename', '') or 'image'}: {_BROKEN}"):
            return _of_8_bits(upright(image))
    return Image.fromarray(_pixels(image))


def _pixels(image: np.ndarray | Tensor) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] of an array or a tensor; raises as `as_picture`."""
    shape = getattr(image, "shape", ())
    if hasattr(image, "detach"):  # a tensor; torch need not be loaded to tell
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        image, form = image.transpose(1, 2, 0) if image.ndim == 3 else image, "a tensor [C, H, W]"
    elif isinstance(image, np.ndarray):
        image, form = image[..., None] if image.ndim == 2 else image, "an array [H, W, C]"
    else:
        raise TypeError(
            "image must be a path, a PIL image, an array [H, W, C] or a tensor [C, H, W], got "
            f"{type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"image must be {form} with C = 1, 3 or 4, got {list(shape)}")
    if np.issubdtype(image.dtype, np.floating):
        low, high = image.min(), image.max()
        if not 0 <= low <= high <= 1:  # NaN neither
            raise ValueError(f"image must be in 0..1 in floating point, got {low:g}..{high:g}")
        image = to_uint8(image)
    if image.dtype != np.uint8:
        raise TypeError(f"image must be of floating point or uint8, got {image.dtype}")
    return np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image)


def upright(image: Image.Image) -> Image.Image:
    """A copy, turned and mirrored as its EXIF says, which a second time changes nothing."""
    return ImageOps.exif_transpose(image)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The image itself. ValueError for a mode that Pillow would turn white, black or wrong."""
    if image.mode not in _MODES:
        raise ValueError(
            f"expected a picture of 8 bits a channel in grey or colour, its mode is {image.mode}"
        )
    return image


def opaque(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """The image in another mode, "RGB" or "L", with what is transparent over black.

    Raises ValueError for an image whose mode is not one of _MODES.
    """
    _of_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(ground, image)
    return image if image.mode == mode else image.convert(mode)


def to_network(image: Picture, channels: int, height: int, width: int) -> Tensor:
    """The picture, cropped in the middle and resized: fp32 [1, C, H, W] in -1..1.

    image:    as `as_picture` takes it
    channels: 3 for RGB (transparent parts on black), 1 for grey

    Raises ValueError for other channels, and what `as_picture` does.
    """
    import torch

    image = fitted(as_picture(image), channels, height, width)
    pixels = np.array(image).reshape(height, width, channels)
    return pixels_to_network(torch.from_numpy(pixels))[None].contiguous()


def fitted(image: Image.Image, channels: int, height: int, width: int) -> Image.Image:
    """The image as `to_network` reads it, which a second time changes nothing; raises as that."""
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"a picture has 1 or 3 channels, the model's clips have {channels}")
    image = opaque(image, modes[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return image


def pixels_to_network(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W, C] to fp32 [..., C, H, W] in -1..1, the networks' range; not contiguous."""
    return pixels.movedim(-1, -3).float().div(127.5).sub(1)


def network_to_pixels(video: Tensor) -> Tensor:
    """[..., C, H, W] in -1..1, or beyond, to uint8 [..., H, W, C]; not contiguous."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1)


# -- out -------------------------------------------------------------------------------------------


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in 0..1, any shape, rounded to uint8 0..255."""
    return (frames * 255.0).round().astype(np.uint8)


def to_frames(video: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[Image.Image]]:
    """[B, N, C, H, W] in -1..1 to frames in 0..1, of an output type of `VideoFusionOutput`."""
    video = (video * 0.5 + 0.5).clamp(0.0, 1.0)
    if output_type == "pt":
        return video
    frames = video.permute(0, 1, 3, 4, 2).cpu().numpy()  # [B, N, H, W, C]
    if output_type == "np":
        return np.ascontiguousarray(frames)
    pictures = to_uint8(frames)
    pictures = pictures[..., 0] if pictures.shape[-1] == 1 else pictures
    return [[Image.fromarray(picture) for picture in clip] for clip in pictures]


def sheet(frames: np.ndarray, columns: int = SHEET_COLUMNS, gap: int = 1) -> np.ndarray:
    """All frames in one image, uint8 [rows (H + gap) - gap, columns (W + gap) - gap, 3].

    frames:  uint8 [N, H, W, 3], or several clips [B, N, H, W, 3], each starting a row
    columns: frames in a row at most; a longer clip goes on in the next row
    gap:     black pixels between neighbours

    Raises TypeError for another dtype, ValueError for a shape, columns < 1 or gap < 0.
    """
    clips = frames[None] if getattr(frames, "ndim", 0) == 4 else frames
    if getattr(clips, "ndim", 0) != 5 or len(clips) == 0:
        shape = list(getattr(frames, "shape", ()))
        raise ValueError(f"sheet: frames must be [N, H, W, 3] or [B, N, H, W, 3], got {shape}")
    check_clip("sheet", clips[0])
    if columns < 1 or gap < 0:
        raise ValueError(f"sheet: expected columns >= 1 and gap >= 0, got {columns} and {gap}")
    batch, count, height, width, _ = clips.shape
    columns = min(columns, count)
    rows_per_clip = -(-count // columns)
    picture = np.zeros(
        (batch * rows_per_clip * (height + gap) - gap, columns * (width + gap) - gap, 3), np.uint8
    )
    for b in range(batch):
        for i in range(count):
            top = (b * rows_per_clip + i // columns) * (height + gap)
            left = i % columns * (width + gap)
            picture[top : top + height, left : left + width] = clips[b, i]
    return picture


def enlarge(frames: np.ndarray, factor: int, filter: str = "nearest") -> np.ndarray:
    """The clip for viewing, uint8 [N, H factor, W factor, 3].

    frames: uint8 [N, H, W, 3];  factor: int >= 1
    filter: "nearest" keeps every pixel a square, "lanczos" smooths

    Raises TypeError for another dtype, ValueError for a shape, factor or filter.
    """
    check_clip("enlarge", frames)
    if (as_int(factor) or 0) < 1:
        raise ValueError(f"enlarge: factor must be an int >= 1, got {factor!r}")
    if filter not in FILTERS:
        raise ValueError(f"enlarge: filter must be 'nearest' or 'lanczos', got {filter!r}")
    if factor == 1:
        return frames
    if filter == "nearest":
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    size = (frames.shape[2] * factor, frames.shape[1] * factor)
    resample = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(f).resize(size, resample)) for f in frames])


def check_clip(name: str, frames: np.ndarray) -> None:
    """TypeError or ValueError for frames that are no clip; name: the calling function's."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise TypeError(f"{name}: frames must be a uint8 array, got {kind}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name}: frames must be [N, H, W, 3], got {list(frames.shape)}")
