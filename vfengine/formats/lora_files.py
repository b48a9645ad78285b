"""Which files a LoRA is: its name, how much of it is added, its SHA-256. No torch here.

A LoRA is a file of weights, or the folder of a PEFT adapter. A PEFT adapter has its settings in a
file beside its weights, which count as a part of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..arguments import as_float

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class LoraFile(NamedTuple):
    """A LoRA on disk; scale: what it is multiplied by before it is added."""

    path: Path
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"


def parse_lora(text: str) -> LoraFile:
    """The LoRA that "FILE" or "FILE:SCALE" names; ValueError for neither."""
    path, _, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        path, scale = text, 1.0
    if not path or not math.isfinite(scale):
        raise ValueError(f"expected FILE or FILE:SCALE with a finite number, got {text!r}")
    return LoraFile(Path(path), scale)


def lora_files(given: Any) -> tuple[LoraFile, ...]:
    """Those of a Python argument: None, a path, (path, scale), or a list of these.

    Raises TypeError for anything else, ValueError for a scale that is not finite.
    """
    files = []
    for one in given if isinstance(given, list) else [] if given is None else [given]:
        path, scale = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        number = as_float(scale)
        if not isinstance(path, (str, Path)) or number is None:
            raise TypeError(f"lora must be a path, (path, scale) or a list of these, got {one!r}")
        if not math.isfinite(number):
            raise ValueError(f"lora: the scale of {path} must be finite, got {number}")
        files.append(LoraFile(Path(path), number))
    return tuple(files)


def lora_parts(path: Path) -> tuple[Path, Path | None]:
    """The file of weights of a LoRA, and that of its settings, if it has one.

    Raises FileNotFoundError, naming it, for what is missing.
    """
    weights = path
    if path.is_dir():
        there = [path / name for name in _ADAPTER_WEIGHTS if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"no LoRA in {path}: it has no {_ADAPTER_WEIGHTS[0]}")
        weights = there[0]
    elif not path.is_file():
        raise FileNotFoundError(f"no LoRA {path}: there is no such file")
    config = weights.with_name(ADAPTER_CONFIG)
    named = weights.name in _ADAPTER_WEIGHTS and config.is_file()
    return weights, config if named else None


def lora_record(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a LoRA that a clip is made with; raises OSError."""
    from ..files import sha256_of  # with safetensors, which --help does without

    sha256 = sha256_of(*filter(None, lora_parts(path)))
    return {"name": path.name or path.resolve().name, "sha256": sha256}
