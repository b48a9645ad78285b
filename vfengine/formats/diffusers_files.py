"""Where diffusers and transformers keep a network's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .published import read_json


def _files(safetensors: str, pickle: str) -> tuple[str, ...]:
    """Names of weight files by their stems; a half-precision variant counts where it is alone."""
    own = (f"{safetensors}.safetensors", f"{safetensors}.safetensors.index.json")
    own += (f"{pickle}.bin", f"{pickle}.bin.index.json")
    return (*own, f"{safetensors}.fp16.safetensors", f"{pickle}.fp16.bin")


FILES = _files("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS_FILES = _files("model", "pytorch_model")


# -- files -----------------------------------------------------------------------------------------


def locate(
    folder: Path, chosen: Path | None, names: Sequence[str] = FILES
) -> tuple[Path, list[Path]]:
    """The configuration and the weight files in a folder; chosen: one of them, or None.

    names: of weight files, the first that is there counts

    Raises FileNotFoundError where there is none, ValueError for an index that points elsewhere.
    """
    config = folder / "config.json"
    if chosen is None or chosen == config:
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")
        chosen = found[0]
    if not chosen.name.endswith(".index.json"):
        return config, [chosen]
    shards = read_json(chosen).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"{chosen}: its weight_map must name files beside it")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{chosen} names {file.name}, which is not there")
    return config, files


def read_scheduler(source: str | Path) -> dict[str, Any]:
    """The scheduler's configuration in a diffusers pipeline; {} for a network by itself.

    Looked for in the network's folder, in scheduler/ there, and in scheduler/ beside it.
    """
    source = Path(source)
    folder = source.parent if source.is_file() else source
    for place in (folder, folder / "scheduler", folder.parent / "scheduler"):
        if (file := place / "scheduler_config.json").is_file():
            return read_json(file)
    return {}
