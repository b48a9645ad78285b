"""A text inside of a video or picture file: where each format keeps it, written and read.

    mp4        comment, in the user data of the movie (FFmpeg's "comment")
    webm, mkv  tag COMMENT
    gif        comment extension, ahead of the first picture
    webp       chunk EXIF, field ImageDescription
    png        chunk iTXt, keyword Comment

Common players and tools show it: ffprobe, exiftool, ImageMagick's identify. A file that is read
may come from anyone, so that a text is taken as it is found, and no more than `MAX_BYTES` of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 65_536  # of UTF-8
_HEAD = 4 * MAX_BYTES  # a text that is ahead of the pictures lies in here
_DESCRIPTION, _ASCII = 0x010E, 2  # a field of TIFF, and the type of its value
_KEYWORD = b"Comment"
_FORMATS = {".mp4": "mp4", ".webm": "matroska", ".mkv": "matroska"}  # of FFmpeg, to read


def check_metadata(text: str) -> bytes:
    """The text in UTF-8, once every format can hold it.

    Raises TypeError for what is no text; ValueError for one that is longer than `MAX_BYTES`, or
    that is empty or has a NUL in it.
    """
    if not isinstance(text, str):
        raise TypeError(f"metadata must be a text, got {type(text).__name__}")
    data = text.encode()
    if not data or b"\0" in data:
        raise ValueError("metadata must be a text without NUL, and not empty")
    if len(data) > MAX_BYTES:
        raise ValueError(f"metadata must be at most {MAX_BYTES} bytes long, got {len(data)}")
    return data


# -- writing ---------------------------------------------------------------------------------------


def gif_with_comment(gif: bytes, comment: bytes) -> bytes:
    """The file with a comment extension; behind that of the loop, whose place is the first."""
    at = _after_palette(gif)
    for label, _, end in _gif_extensions(gif, at):
        if label != 0xFF:
            break
        at = end
    pieces = [comment[i : i + 255] for i in range(0, len(comment), 255)]
    blocks = b"".join(bytes([len(piece)]) + piece for piece in pieces)
    return gif[:at] + b"\x21\xfe" + blocks + b"\0" + gif[at:]


def exif_with_description(text: bytes) -> bytes:
    """TIFF data, as Exif is, of one field."""
    value = text + b"\0"
    header = b"II*\0" + (8).to_bytes(4, "little") + (1).to_bytes(2, "little")
    field = b"".join(n.to_bytes(2, "little") for n in (_DESCRIPTION, _ASCII))
    field += len(value).to_bytes(4, "little")
    if len(value) <= 4:  # then it stands where its address would
        return header + field + value.ljust(4, b"\0") + bytes(4)
    address = len(header) + len(field) + 4 + 4  # after itself and the address of a next directory
    return header + field + address.to_bytes(4, "little") + bytes(4) + value


# -- reading ---------------------------------------------------------------------------------------


def read_metadata(path: str | Path) -> str | None:
    """The text that a file carries, whoever wrote it; None without one.

    Raises FileNotFoundError for a missing file; ValueError for a suffix or a content that is of no
    format in the module's table, for a text longer than `MAX_BYTES`, and for one that is not UTF-8.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if suffix in _FORMATS:
            data = _of_video(path, _FORMATS[suffix])
        elif suffix in _READERS:
            with path.open("rb") as file:
                data = _READERS[suffix](file)
        else:
            known = ", ".join((*_FORMATS, *_READERS))
            raise ValueError(f"unknown suffix {suffix!r}, expected one of {known}")
        if data is None:
            return None
        if len(data) > MAX_BYTES:
            raise ValueError(f"its text is longer than {MAX_BYTES} bytes")
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: its text is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _of_video(path: Path, format: str) -> bytes | None:
    import av

    try:  # the format is named: FFmpeg would also read a list of other files
        with av.open(str(path), format=format, metadata_errors="surrogateescape") as file:
            tags = {name.lower(): text for name, text in file.metadata.items()}
    except (av.FFmpegError, OSError) as error:
        raise ValueError("not a readable video") from error
    text = tags.get("comment")
    return None if text is None else text.encode(errors="surrogateescape")


def _of_gif(file: BinaryIO) -> bytes | None:
    head = file.read(_HEAD)
    if head[:6] not in (b"GIF87a", b"GIF89a"):
        raise ValueError("not a readable gif")
    for label, start, end in _gif_extensions(head, _after_palette(head)):
        if label == 0xFE:
            return b"".join(_gif_blocks(head[start:end]))
    return None


def _after_palette(gif: bytes) -> int:
    """The place behind the header and the palette of all pictures, if there is one."""
    flags = gif[10] if len(gif) > 10 else 0
    return 13 + (3 << (flags % 8 + 1) if flags & 0x80 else 0)


def _gif_extensions(gif: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Label, start of the blocks and end of each extension from a place on, up to a picture."""
    while gif[at : at + 1] == b"\x21" and at + 2 < len(gif):
        start = end = at + 2
        while end < len(gif) and gif[end]:
            end += 1 + gif[end]
        if end >= len(gif):
            return
        at = end + 1
        yield gif[start - 1], start, at


def _gif_blocks(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data) and data[at]:
        yield data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]


def _of_webp(file: BinaryIO) -> bytes | None:
    if (head := file.read(12))[:4] != b"RIFF" or head[8:] != b"WEBP":
        raise ValueError("not a readable webp")
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"EXIF":
            return _description(file.read(min(size, _HEAD)))
        file.seek(size + size % 2, 1)
    return None


def _description(exif: bytes) -> bytes | None:
    """The field ImageDescription of TIFF data, where its first directory has one."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    directory = number(4, 4)
    for index in range(number(directory, 2)):
        at = directory + 2 + 12 * index
        if at + 12 > len(exif):
            return None
        if (number(at, 2), number(at + 2, 2)) == (_DESCRIPTION, _ASCII):
            size = number(at + 4, 4)
            start = at + 8 if size <= 4 else number(at + 8, 4)
            return exif[start : start + size].rstrip(b"\0")
    return None


def _of_png(file: BinaryIO) -> bytes | None:
    head = file.read(_HEAD)
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a readable png")
    at = 8
    while at + 8 <= len(head) and (name := head[at + 4 : at + 8]) != b"IDAT":
        size = int.from_bytes(head[at : at + 4], "big")
        keyword, _, rest = head[at + 8 : at + 8 + size].partition(b"\0")
        if name == b"iTXt" and keyword == _KEYWORD and rest[:1] == b"\0":  # 1: compressed
            return rest[2:].split(b"\0", 2)[-1]  # after a language and a translated keyword
        at += 12 + size
    return None


_READERS = {".gif": _of_gif, ".webp": _of_webp, ".png": _of_png}
