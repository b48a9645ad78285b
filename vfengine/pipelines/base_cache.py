"""A folder of base paths, so that a look that was walked once is never walked again.

A path depends on the base weights, what they were asked for, and the solver; the name of its file
is a hash of all that, so that another model, label, seed or precision finds another file. Files are
those of `BaseTrajectory.save`, and can be used by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..diffusion.base_path import BaseTrajectory


def cached_path(
    folder: str | Path,
    key: Mapping[str, object],
    walk: Callable[[], BaseTrajectory],
) -> BaseTrajectory:
    """The path of this key, read from the folder, or walked and written there.

    key: all that the path depends on, as JSON values; kept in the file's metadata under "cache_key"

    Raises ValueError, before anything is walked, for a folder that cannot be one or a file in it
    that is no whole base path of this key; OSError, after the walk, where it cannot be written.
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
    path = walk()
    folder.mkdir(parents=True, exist_ok=True)
    path = replace(path, metadata={**path.metadata, "cache_key": text})
    path.save(file)
    return path
