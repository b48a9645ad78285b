"""Pictures and videos that clients send, within limits.

Pictures are decoded here, by Pillow, and written again at the model's size: nothing but their
pixels gets to an engine. Videos are written as they are; an engine decodes them, within limits of
its own.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import shutil
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..files import replacing
from ..media.pictures import fitted
from .bodies import Body
from .errors import ApiError, bad, shown
from .model_info import ModelInfo

MAX_PIXELS = 50_000_000  # of a picture; 4 bytes each while it is decoded, 16 if it is transparent
MAX_SIDE = 30_000
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40}(;[a-z0-9=-]{1,40})*;base64,", re.IGNORECASE)
_VIDEOS = (b"ftyp", b"\x1aE\xdf\xa3", b"WEBP", b"GIF8")  # mp4 and mov, webm and mkv, webp, gif
_one_at_a_time = threading.Lock()  # so that decoded pictures do not fill the memory
# Pillow's blocks of 16 MiB stay with malloc once they are free, in a pool of each thread's own.
# Larger ones go back to the system.
Image.core.set_block_size(64 * 2**20)


def picture_source(body: Body) -> BinaryIO | None:
    """The bytes of `input_reference`, a file or a data: URL; None if there is none.

    Raises ApiError for other URLs, none of which is fetched, and for ids of files.
    """
    reference = body.values.get("input_reference")
    if "input_reference" in body.files:
        return body.files["input_reference"].file
    if reference is None:
        return None
    name = "input_reference"
    if not isinstance(reference, dict) or set(reference) - {"image_url", "file_id"}:
        message = 'input_reference must be a file or {"image_url": "data:image/png;base64,..."}'
        raise bad(message, name)
    if reference.get("file_id") is not None:
        message = "there are no file ids here: send the picture as a file or as a data: URL"
        raise bad(message, "input_reference.file_id", "unsupported")
    url = reference.get("image_url")
    if not isinstance(url, str):
        raise bad(f"image_url must be a data: URL, got {shown(url)}", "input_reference.image_url")
    start = _DATA_URL.match(url)
    if start is None:
        message = "image_url must begin with data:image/...;base64, as no other URL is fetched"
        raise bad(f"{message}; got {shown(url)}", "input_reference.image_url")
    try:
        return io.BytesIO(base64.b64decode(url[start.end() :], validate=True))
    except (binascii.Error, ValueError) as error:
        message = f"image_url is not base64 ({error})"
        raise bad(message, "input_reference.image_url") from error


def store_picture(source: BinaryIO, info: ModelInfo, file: Path) -> None:
    """Decodes a picture and writes it as PNG, cropped and resized to the model's frames.

    The first frame of several is taken. Raises ApiError for what is no picture, is cut off, or has
    more pixels than MAX_PIXELS.
    """
    with _one_at_a_time:
        picture = _decoded(source, info)
    picture.info.clear()  # no profile or text of the sender's goes into the file
    with replacing(file) as temporary:
        picture.save(temporary, "PNG")


def _decoded(source: BinaryIO, info: ModelInfo) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large and of odd files; the limits are ours
            with Image.open(source, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                    message = f"a picture may have {MAX_PIXELS // 10**6} million pixels at most"
                    raise bad(f"{message}, this one is {width}x{height}", "input_reference")
                ImageOps.exif_transpose(image, in_place=True)
                return fitted(image, 3, info.height, info.width).copy()
    except (ApiError, MemoryError):
        raise
    except Exception as error:  # Pillow raises of almost any kind for broken files
        reason = shown(str(error))
        if isinstance(error, UnidentifiedImageError):  # which says where in memory the file is
            reason = f"it is no {', '.join(_FORMATS)}"
        message = f"input_reference is no picture that can be read ({reason})"
        raise bad(message, "input_reference", "invalid_image") from error


# -- videos ----------------------------------------------------------------------------------------


def video_id(body: Body) -> str | None:
    """The id in `video`, if it names one."""
    video = body.values.get("video")
    if video is None:
        return None
    if not isinstance(video, dict) or set(video) != {"id"} or not isinstance(video["id"], str):
        raise bad('video must be a file or {"id": "video_..."}', "video")
    return video["id"]


def store_video(source: BinaryIO, file: Path) -> None:
    """Writes a video as it came. Raises ApiError for what does not begin as a video does."""
    head = source.read(16)
    if not any(mark in head[:12] for mark in _VIDEOS):
        raise bad("video is no mp4, webm, webp or gif", "video", "invalid_video")
    with replacing(file) as temporary, temporary.open("wb") as target:
        target.write(head)
        shutil.copyfileobj(source, target)
