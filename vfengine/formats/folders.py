"""A model's folder: config.json, and files whose SHA-256 it records.

A folder is written whole or not at all. A file is compared with its SHA-256 when it is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..files import open_tensors, parse_tensors, replacing_folder, write_tensors
from .weights import hash_files


@dataclass(frozen=True)
class Linked:
    """Files of another model's folder, which are to lie in a subfolder of this name too."""

    name: str
    files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """Of the files' names and contents."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            hash_files(digest, [file])
        return digest.hexdigest()

    def place(self, folder: Path) -> None:
        """Writes the subfolder: hard links where the file system allows them, else copies."""
        (folder / self.name).mkdir()
        for file in self.files:
            target = folder / self.name / file.name
            try:
                os.link(file.resolve(), target)
            except OSError:
                shutil.copyfile(file, target)


# weights, written as .safetensors; the text of a .json file; or files in a subfolder
Part = Mapping[str, Tensor] | str | Linked


def write_folder(
    folder: str | Path,
    parts: Mapping[str, Part],
    config_text: Callable[[dict[str, str]], str],
    dtype: torch.dtype,
) -> dict[str, str]:
    """Writes parts and config.json, and returns the parts' SHA-256 by name.

    An interrupted write leaves the old folder.

    parts:       by their files' names without the ending
    config_text: what config.json says, of the parts' SHA-256 by name
    dtype:       in which weights are written

    Raises ValueError rather than replace a folder or file that is no model.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as fresh:
        digests = {}
        for name, part in parts.items():
            if isinstance(part, Linked):
                part.place(fresh)
                digests[name] = part.sha256
                continue
            if isinstance(part, str):
                file = fresh / f"{name}.json"
                file.write_text(part, encoding="utf-8")
            else:
                file = fresh / f"{name}.safetensors"
                write_tensors(file, {key: value.to("cpu", dtype) for key, value in part.items()})
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        text = config_text(digests) + "\n"
        (fresh / "config.json").write_text(text, encoding="utf-8")
    return digests


def check_replaceable(folder: Path) -> None:
    """ValueError for a folder or file that is no model, and would be lost."""
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()
    ):
        raise ValueError(f"{folder} exists and is no checkpoint: it is not overwritten")


def folder_digest(folder: Path) -> str:
    """A hash of the files in a model's folder, their names included; of none where there is none.

    Hidden files do not count.
    """
    files = sorted(file for file in folder.glob("[!.]*") if file.is_file())
    digests = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:32]


def read_tensors(folder: Path, name: str, sha256: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of `name`.safetensors, as stored, once found whole.

    Raises FileNotFoundError without the file, ValueError for a damaged or exchanged one.
    """
    file = folder / f"{name}.safetensors"
    return parse_tensors(_read(file, sha256.get(name)), file)


def read_text(folder: Path, name: str, sha256: Mapping[str, str]) -> str:
    """The text of `name`.json; raises what `read_tensors` does."""
    file = folder / f"{name}.json"
    try:
        return _read(file, sha256.get(name)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error})") from error


def _read(file: Path, sha256: str | None) -> bytes:
    """sha256: None: it is not known"""
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {file.parent} has no {file.name}")
    data = file.read_bytes()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{file} is truncated or not the file its config.json was written with")
    return data


def stored_weights(place: Path) -> int:
    """Numbers in a .safetensors file, or in those of a folder; headers are read alone."""
    files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
    count = 0
    for file in files:
        with open_tensors(file) as tensors:
            for name in list(tensors.keys()):
                count += math.prod(tensors.get_slice(name).get_shape())
    return count
