"""Atomic writes, and .safetensors files.

A file is written under a temporary name in its own folder and renamed when it is complete. An error
or an interrupt leaves the old file, and nothing else. Torch is imported only where tensors are
written or read.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside path; renames it to path on success, removes it otherwise."""
    path = Path(path)
    temporary = _beside(path, "part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new folder beside path; it takes path's place on success, and is removed otherwise.

    A folder cannot be replaced in one step. The old one is moved aside first, and moved back if
    the second step fails.
    """
    path = Path(path)
    fresh, old = _beside(path, "new"), _beside(path, "old")
    try:
        fresh.mkdir()
        yield fresh
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    """A hidden path in the same folder that no other process or thread uses."""
    return path.with_name(f".{path.name[:200]}.{os.urandom(8).hex()}.{ending}")


def check_writable(path: str | Path) -> Path:
    """path itself, once a file can be created or replaced there.

    Raises IsADirectoryError for a path that is a folder, FileNotFoundError or NotADirectoryError
    for its folder, PermissionError for a folder that cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a file name")
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: folder is not writable")
    return path


# -- tensors ---------------------------------------------------------------------------------------


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file atomically, with the permissions of any other new file.

    tensors: by name, on any device; memory formats such as channels_last are not kept

    Raises OSError where the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        temporary.chmod(mode)  # save_file makes it 0600


@contextmanager
def open_tensors(path: str | Path, what: str = "safetensors file") -> Iterator[safe_open]:
    """The tensors of a .safetensors file, to be read one by one (`safe_open`, on the CPU).

    what: the file's purpose, for the error text

    Raises FileNotFoundError without the file, ValueError for one that is cut off or of another
    format: the header is compared with the file's length.
    """
    with _complete(path, what), safe_open(str(path), "pt") as file:
        yield file


def parse_tensors(data: bytes, path: str | Path) -> dict:
    """The tensors in the bytes of a .safetensors file, by name; ValueError as `open_tensors`."""
    from safetensors.torch import load

    with _complete(path, "safetensors file"):
        return load(data)


@contextmanager
def _complete(path: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete {what}: {error}") from error
