"""Images in and out: files to a network's pixels, sampled clips to frames and sheets.

A network's pixels are in -1..1. Frames are in 0..1, or uint8. Torch is imported only where an image
becomes a network's input.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..names import FILTERS

if TYPE_CHECKING:
    from torch import Tensor

SHEET_COLUMNS = 16
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


# -- in --------------------------------------------------------------------------------------------


def read_picture(file: str | Path) -> Image.Image:
    """An image file, turned as its EXIF says, decoded to the end.

    Raises FileNotFoundError; ValueError, one line, for what is no image or is cut off.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such image")
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not an image that can be read ({error})") from error


def to_network(image: Image.Image, channels: int, height: int, width: int) -> Tensor:
    """The image, cropped in the middle and resized: fp32 [1, C, H, W] in -1..1.

    channels: 3 for RGB (transparent parts on black), 1 for grey

    Raises ValueError for other channels, and for an image whose mode is not one of _MODES.
    """
    import torch

    image = fitted(image, channels, height, width)
    pixels = np.array(image).reshape(height, width, channels)
    return pixels_to_network(torch.from_numpy(pixels))[None].contiguous()


def fitted(image: Image.Image, channels: int, height: int, width: int) -> Image.Image:
    """The image as `to_network` reads it, which a second time changes nothing; raises as that."""
    modes = {1: "L", 3: "RGB"}
    if image.mode not in _MODES:
        raise ValueError(
            f"expected a picture of 8 bits a channel in grey or colour, its mode is {image.mode}"
        )
    if channels not in modes:
        raise ValueError(f"a picture has 1 or 3 channels, the model's clips have {channels}")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(ground, image)
    if image.mode != modes[channels]:
        image = image.convert(modes[channels])
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
    if type(factor) is not int or factor < 1:
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
