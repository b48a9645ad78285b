"""A folder of base paths, so that no path is sampled twice.

A path depends on the base network, its condition, its noise and the solver. Its file is named by a
hash of all these: another model, label, seed or precision has another file. The files are those of
`BaseTrajectory.save`, and can be used by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..diffusion.base_path import BaseTrajectory
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..formats.checkpoint import CheckpointConfig
from ..sampling.guidance import Condition, Prompts


def cache_key(
    config: CheckpointConfig,
    notes: Mapping[str, str],
    table: SolverTable,
    condition: Condition | Prompts,
    place: NoisePlace,
    dtype: torch.dtype,
) -> dict[str, object]:
    """Everything a base path depends on, as JSON values. A change here loses all cached paths.

    notes: the path's metadata: model, labels or prompts, seed, guidance scale
    dtype: of the base network
    """
    if isinstance(condition, Condition):
        shown = {"classes": condition.classes.tolist()}
    else:  # notes have the prompts; here is who reads them
        shown = {name: config.sha256.get(name) for name in ("text_encoder", "tokenizer")}
    return {
        **notes,
        "network": config.base.identity(),
        "base_std": config.base_std,
        "shape": [condition.batch, config.channels, config.height, config.width],
        **shown,
        "sample_offset": place.sample_offset,
        "schedule": config.noise_schedule().fingerprint(),
        "timesteps": table.timesteps.tolist(),
        "solver": table.solver,
        "eta": table.eta,
        "dtype": str(dtype),
    }


def cached_path(
    folder: str | Path,
    key: Mapping[str, object],
    sample_path: Callable[[], BaseTrajectory],
) -> BaseTrajectory:
    """The path of this key, read from the folder, or sampled and written there.

    key: of `cache_key`; kept in the file's metadata under "cache_key"

    Raises ValueError, before a path is sampled, if `folder` is no folder or its file is not a whole
    base path of this key; OSError, afterwards, if the path cannot be written.
    """
    path = find_path(folder, key)
    if path is None:
        path = keep_path(folder, key, sample_path())
    return path


def find_path(folder: str | Path, key: Mapping[str, object]) -> BaseTrajectory | None:
    """The path of this key in the folder, None without one; ValueError as `cached_path`."""
    folder, text = Path(folder), _text(key)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"base cache {folder} is not a folder")
    file = path_file(folder, key)
    try:
        path = BaseTrajectory.load(file)
    except FileNotFoundError:  # also where another process has just removed it
        return None
    if path.metadata.get("cache_key") != text:
        raise ValueError(f"{file}: a base trajectory under another's name; remove it")
    return path


def keep_path(
    folder: str | Path, key: Mapping[str, object], path: BaseTrajectory
) -> BaseTrajectory:
    """Writes a path to the folder, and gives it as it can be found there; OSError if it cannot."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = replace(path, metadata={**path.metadata, "cache_key": _text(key)})
    path.save(path_file(folder, key))
    return path


def path_file(folder: str | Path, key: Mapping[str, object]) -> Path:
    """The file of a key's path, which need not be there."""
    name = hashlib.sha256(_text(key).encode()).hexdigest()[:32]
    return Path(folder) / f"{name}.safetensors"


def _text(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)
