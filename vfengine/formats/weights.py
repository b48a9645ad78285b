"""Weights in published files: safetensors, and torch pickles, whose code is not run."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..files import open_tensors

_MAPPED_BYTES = 64 * 2**20
_POINTER = b"version https://git-lfs"
# Linear layers that files may hold as 1x1 convolutions.
_PROJECTIONS = ("proj_in.weight", "proj_out.weight", "quant_conv.weight")
_PROJECTIONS += tuple(f"attention.to_{part}.weight" for part in ("q", "k", "v", "out"))


@dataclass(frozen=True)
class StoredWeights:
    """Weights on disk: their shapes, and a function that reads one by name, once.

    others: the dtypes of entries that hold no floats, where that is known, by name
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    others: Mapping[str, str] = field(default_factory=dict)

    def only(self, names: Iterable[str]) -> StoredWeights:
        """These of the weights."""
        return StoredWeights({name: self.shapes[name] for name in names}, self.read, self.others)


def open_weights(files: Iterable[Path]) -> StoredWeights:
    """The weights of all files together. Raises ValueError for a damaged one."""
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    others: dict[str, str] = {}
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{file} is not downloaded yet: it is a pointer of Git LFS")
        opened = _safetensors(file) if file.suffix == ".safetensors" else _pickle(file)
        shapes.update(opened.shapes)
        readers.update(dict.fromkeys(opened.shapes, opened.read))
        others.update(opened.others)
    return StoredWeights(shapes, lambda name: readers[name](name), others)


def _safetensors(file: Path) -> StoredWeights:
    mapping = ExitStack()
    opened, bytes_read = mapping.enter_context(open_tensors(file)), 0
    entries = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    shapes = {name: tuple(entry.get_shape()) for name, entry in entries.items()}
    kinds = {name: entry.get_dtype() for name, entry in entries.items()}

    def read(name: str) -> Tensor:
        """Maps the file again now and then: pages that were read count as the process's memory."""
        nonlocal opened, bytes_read
        if bytes_read > _MAPPED_BYTES:
            mapping.close()
            opened, bytes_read = mapping.enter_context(open_tensors(file)), 0
        tensor = opened.get_tensor(name)
        bytes_read += tensor.nbytes
        return tensor

    others = {name: kind for name, kind in kinds.items() if not kind.startswith(("F", "BF"))}
    return StoredWeights(shapes, read, others)


def _pickle(file: Path) -> StoredWeights:
    """A file of torch.save, by torch's reader that makes only tensors; mapped if possible."""
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        # torch's own words give the advice to run the file's code
        code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        why = f"it names {code[1]}, and code is not run" if code else "it is damaged, or no pickle"
        raise ValueError(f"{file} is not a file of weights alone: {why}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{file} is not a dict of tensors")
    for name, value in state.items():
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            kind = "no values" if value.is_meta else value.layout
            raise ValueError(f"{file} has weights that are no dense tensors: {name} of {kind}")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    others = {k: str(v.dtype) for k, v in state.items() if not v.is_floating_point()}
    return StoredWeights(shapes, state.pop, others)


def check_weights(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """ValueError unless a file holds all weights, in their shapes, and no others.

    shapes, names: the expected shapes, and the names in the file, by our names
    found:         the shapes in the file, by names in the file
    """
    expected = set(names.values())
    _refuse(file, "misses weights", sorted(expected - found.keys()))
    _refuse(file, "has weights of no known layer", sorted(found.keys() - expected))
    odd = []
    for ours, theirs in names.items():
        shape, other = shapes[ours], found[theirs]
        # linear layers may be written as 1x1 convolutions, and ours over frames are 2-D
        ones = 2 if ours.endswith(_PROJECTIONS) else 0
        ones = 1 if ".convs." in ours and ours.endswith("weight") else ones
        if other not in [shape + (1,) * extra for extra in range(ones + 1)]:
            odd.append(f"{theirs} {list(other)} instead of {list(shape)}")
    _refuse(file, "has weights of other shapes", odd)


def _refuse(file: Path, problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{file} {problem}: {', '.join(names[:4])}{more}")


def hash_files(digest: hashlib._Hash, files: Iterable[Path]) -> None:
    """Adds the contents of the files to a digest."""
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)


def hash_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Adds names, dtypes and contents of tensors to a digest, in their order."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
