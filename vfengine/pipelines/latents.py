"""Finished latents in a file, so that a clip outlives an error while it is decoded.

A .safetensors file with "latents", fp32 [B, N, C, h, w], and the request in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..files import check_writable, open_tensors, parse_json, write_tensors

FORMAT = "vfengine-latents-1"


@dataclass
class LatentsFile:
    """A file that holds the finished clips of a request so far, whole after each batch.

    Raises ValueError for a name that does not end in .safetensors, OSError for a place where no
    file can be written.
    """

    path: Path
    _clips: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if self.path.suffix != ".safetensors":
            raise ValueError(f"latents {self.path}: expected a .safetensors file")
        check_writable(self.path)

    @property
    def num_clips(self) -> int:
        """How many clips the file holds; 0 before it is written."""
        return sum(map(len, self._clips))

    def add(self, latents: Tensor, notes: Mapping[str, object]) -> None:
        """Writes the file anew, with these clips [B, N, C, h, w] after those of earlier batches."""
        self._clips.append(latents.detach().float().cpu())
        metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in notes.items()}}
        write_tensors(self.path, {"latents": torch.cat(self._clips)}, metadata)


def read_latents(file: str | Path) -> tuple[Tensor, dict[str, object]]:
    """The latents of a `LatentsFile`, fp32 [B, N, C, h, w], and the notes in its metadata.

    Raises FileNotFoundError without the file, ValueError for one of another format.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file of latents")
    with open_tensors(file, "file of latents") as opened:
        metadata = opened.metadata() or {}
        if metadata.pop("format", None) != FORMAT or list(opened.keys()) != ["latents"]:
            raise ValueError(f"{file} is not a file of latents ({FORMAT})")
        latents = opened.get_tensor("latents")
    if latents.dtype != torch.float32 or latents.dim() != 5 or not latents.numel():
        found = f"{latents.dtype} {list(latents.shape)}"
        raise ValueError(f"{file}: latents must be float32 [B, N, C, h, w], got {found}")
    try:
        return latents, {name: parse_json(value) for name, value in metadata.items()}
    except ValueError as error:
        raise ValueError(f"{file}: its metadata is not JSON ({error})") from error
