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
    folder, text = Path(folder), json.dumps(key, sort_keys=True)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"base cache {folder} is not a folder")
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if file.exists():
        path = BaseTrajectory.load(file)
        if path.metadata.get("cache_key") != text:
            raise ValueError(f"{file}: a base trajectory under another's name; remove it")
        return path
    path = sample_path()
    folder.mkdir(parents=True, exist_ok=True)
    path = replace(path, metadata={**path.metadata, "cache_key": text})
    path.save(file)
    return path
