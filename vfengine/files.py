"""Atomic writes, JSON, and .safetensors files.

A file is written under a temporary name in its own folder and renamed when it is complete. An error
or an interrupt leaves the old file, and nothing else. A process that is killed leaves a hidden
folder, which the next process that writes beside it removes. Torch is imported only where tensors
are written or read.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {  # torch's names: those in files, in the order in which they lie there
    **{"int64": "I64", "float64": "F64", "float32": "F32", "int32": "I32", "bfloat16": "BF16"},
    **{"float16": "F16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}
# What no input is to blame for; SQLite has words alone before Python 3.11.
_OF_THE_MACHINE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE)
    + (errno.EMFILE, errno.ENFILE)
)
_OF_SQLITE = re.compile("disk is full|disk I/O error|readonly database|unable to open database")


def is_of_the_machine(error: BaseException) -> bool:
    """Whether no input is to blame for an error, such as where a disk is full or read-only."""
    if type(error).__module__ == "sqlite3":  # which not every Python has
        return _OF_SQLITE.search(str(error)) is not None
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; renames it to path on success, removes it otherwise."""
    path = Path(path)
    with _folder_beside(path) as temporary:
        file = temporary / "new"
        yield file
        os.replace(file, path)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new folder; it takes path's place on success, and is removed otherwise.

    At no moment is path missing. Only where the file system cannot exchange two names is the old
    folder moved aside first, and moved back if the second step fails.
    """
    path = Path(path)
    with _folder_beside(path) as temporary:
        fresh = temporary / "new"
        fresh.mkdir()
        yield fresh
        if path.exists():
            if _exchanged(fresh, path):
                return
            (temporary / "old").mkdir()
            os.replace(path, temporary / "old" / path.name)
        os.replace(fresh, path)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


# -- temporary folders -----------------------------------------------------------------------------


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder in path's own that no other process or thread uses, locked until it goes."""
    sweep(os.path.abspath(path.parent))
    temporary = lock = None
    while lock is None:  # a process that sweeps may be faster than the lock
        temporary = path.with_name(f".{path.name[:200]}.{os.urandom(8).hex()}.part")
        temporary.mkdir()
        lock = _locked(temporary, without=True)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


@functools.lru_cache(64)
def sweep(folder: str) -> None:
    """Removes what killed processes have left in a folder; the next calls do nothing.

    Every write sweeps its folder first. A run that may find nothing left to write calls this.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(r"\..+\.[0-9a-f]{16}\.part", entry.name):
                lock = _locked(Path(entry.path))
                if lock is not None:
                    _remove(Path(entry.path))
                    os.close(lock)


def _locked(folder: Path, without: bool = False) -> int | None:
    """A descriptor that locks a folder for as long as it is open; None if another's does.

    The system releases it when its process ends, however it ends.

    without: whether a file system that knows no locks is good enough
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):  # just removed, or a file of earlier releases
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or not without:
            os.close(descriptor)
            return None
    if folder.exists():
        return descriptor
    os.close(descriptor)
    return None


def _remove(temporary: Path) -> None:
    """Removes a temporary folder; what was moved aside into it, and not replaced, goes back."""
    for old in temporary.glob("old/*"):
        path = temporary.parent / old.name
        if not path.exists():
            os.replace(old, path)
    shutil.rmtree(temporary, ignore_errors=True)


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


# -- JSON ------------------------------------------------------------------------------------------


def sha256_of(*files: Path) -> str:
    """The SHA-256 of the bytes of files, one after the other, in hex; raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for any other text, however deep it is nested."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# -- tensors ---------------------------------------------------------------------------------------


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file atomically, with the permissions of any other new file.

    tensors: by name, on any device; memory formats such as channels_last are not kept

    The same content makes the same bytes: those of safetensors, with the metadata in order. Its own
    writer leaves that in any order, and ends the process where memory is short.

    Raises OSError where the file cannot be written, ValueError for another dtype.
    """
    import torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is {dtype}, expected one of: {', '.join(_DTYPES)}")
    order = sorted(tensors, key=lambda name: (list(_DTYPES).index(dtypes[name]), name))
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in order:
                    file.write(tensors[name].reshape(-1).view(torch.uint8).numpy())
        except OSError as error:
            reason = error.strerror or error
            raise OSError(error.errno, f"{path}: cannot be written ({reason})") from error


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
        told = _of_system(error, path)
        if told is not None and told.errno in (errno.EIO, errno.ENOMEM):  # not the file's fault
            raise told from error
        raise ValueError(f"{path} is not a complete {what}: {error}") from error


def _of_system(error: SafetensorError, path: str | Path) -> OSError | None:
    """The system's error that safetensors tells in words; None for one of its own."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None
