"""Pictures on their way in and out: a file to the networks' -1..1, sampled clips to frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


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
    """The picture, cropped in the middle and resized: fp32 [1, C, H, W] in -1..1.

    channels: 3 for RGB (transparent parts on black), 1 for grey; ValueError for any other, and for
              a picture that has not 8 bits a channel, or colours that are not of a screen
    """
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
    image = image.convert(modes[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.array(image).reshape(height, width, channels)
    return pixels_to_network(torch.from_numpy(pixels))[None].contiguous()


def pixels_to_network(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W, C] to fp32 [..., C, H, W] in -1..1, the networks' range; not contiguous."""
    return pixels.movedim(-1, -3).float().div(127.5).sub(1)


def network_to_pixels(video: Tensor) -> Tensor:
    """[..., C, H, W] in -1..1, or beyond, to uint8 [..., H, W, C]; not contiguous."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in 0..1, any shape, rounded to uint8 0..255."""
    return (frames * 255.0).round().astype(np.uint8)


def to_frames(video: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[Image.Image]]:
    """[B, N, C, H, W] in -1..1 to the asked form, in 0..1 (see `VideoFusionOutput`)."""
    video = (video * 0.5 + 0.5).clamp(0.0, 1.0)
    if output_type == "pt":
        return video
    frames = video.permute(0, 1, 3, 4, 2).cpu().numpy()  # [B, N, H, W, C]
    if output_type == "np":
        return np.ascontiguousarray(frames)
    pictures = to_uint8(frames)
    pictures = pictures[..., 0] if pictures.shape[-1] == 1 else pictures
    return [[Image.fromarray(picture) for picture in clip] for clip in pictures]
