"""Where diffusers and transformers keep a network's files.

Weights lie in one file, or in several that an index names; either may be a variant, such as "fp16",
whose name stands before or after the file's endings.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .published import read_json

# Stems and endings of the files, the first that is there counts: of one file before an index.
FILES = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))
TRANSFORMERS_FILES = (("model", "safetensors"), ("pytorch_model", "bin"))
_HALF = "fp16"  # the variant that is read where there are several
_SHARD = re.compile(r"-\d+-of-(\d+)")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx")


def locate(
    folder: Path, chosen: Path | None, names: Sequence[tuple[str, str]] = FILES
) -> tuple[Path, list[Path]]:
    """The configuration and the weight files in a folder; chosen: one of them, or None.

    names: stems and endings of weight files

    A variant is read where there is nothing else, and a UserWarning names it. Raises
    FileNotFoundError where there are no weights, or several variants without "fp16", ValueError for
    an index that points elsewhere, and for one file of several.
    """
    config = folder / "config.json"
    if chosen is None or chosen == config:
        chosen = _weights(folder, names)
    elif (part := _SHARD.search(chosen.name)) and int(part[1]) > 1:
        raise ValueError(f"{chosen} is one of {int(part[1])} files: name their index, or {folder}")
    if chosen.suffix != ".json":
        return config, [chosen]
    shards = read_json(chosen).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(name, str) and Path(name).name == name for name in shards.values())
    ):
        raise ValueError(f"{chosen}: its weight_map must name files beside it")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{chosen} names {file.name}, which is not there")
    return config, files


def _weights(folder: Path, names: Sequence[tuple[str, str]]) -> Path:
    """The file of weights in a folder, or the index of several."""
    there = sorted(file for file in folder.iterdir() if file.is_file())
    found: dict[str, dict[int, Path]] = {}  # by variant, then by rank
    for file in there:
        if (parsed := _parsed(file.name, names)) is not None:
            variant, rank = parsed
            found.setdefault(variant, {})[rank] = file
    if not found:
        wanted = ", ".join(f"{stem}.{ending}" for stem, ending in names)
        others = ", ".join(file.name for file in there if file.suffix in _ENDINGS)
        but = f", but {others}: a file of these weights can be named itself" if others else ""
        raise FileNotFoundError(f"{folder} has none of {wanted}{but}")
    best = {variant: ranked[min(ranked)] for variant, ranked in found.items()}
    variant = next((name for name in ("", _HALF) if name in best), None)
    if variant is None:
        variant, *more = best
        if more:
            listed = ", ".join(file.name for file in best.values())
            raise FileNotFoundError(
                f"{folder} has several variants and none without a name: {listed}; name one of the "
                f"files, or keep one"
            )
    if variant:
        words = f"{folder} holds no weights without a variant: {best[variant].name} is read"
        warnings.warn(words, stacklevel=1)  # of one place: it is said once
    return best[variant]


def _parsed(name: str, names: Sequence[tuple[str, str]]) -> tuple[str, int] | None:
    """The variant of a file's name, "" if it has none, and its rank among the variant's files.

    None: it is no file of weights, or one of several that an index names.
    """
    for rank, (stem, ending) in enumerate(names):
        words = name.removeprefix(f"{stem}.").split(".")
        index = words[-1] == "json" and "index" in words
        if not name.startswith(f"{stem}.") or _SHARD.search(name) or ending not in words:
            continue
        if index or words[-1] == ending:
            variant = [word for word in words if word not in (ending, "index", "json")]
            return ".".join(variant), 2 * rank + index
    return None


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
