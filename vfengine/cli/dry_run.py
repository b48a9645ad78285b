"""`generate --dry-run`: what would be made, as text or JSON; no weights are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import UsageError
from .job import Task, check_files, open_pipeline, prepare, teller, try_encoder
from .output import Job, on_devices, peak_process_memory
from .streams import say

if TYPE_CHECKING:
    from ..pipelines.forecast import Forecast


def dry_run(settings: argparse.Namespace) -> None:
    """Prints what `generate` would make; ValueError or OSError for what it would refuse."""
    check_files(settings)
    pipe = open_pipeline(settings)
    if settings.list_labels:
        raise UsageError("--dry-run cannot go with --list-labels, which makes nothing")
    told = describe(prepare(settings, pipe))
    if settings.json:
        say(json.dumps(told))
    elif not settings.quiet:
        say(words(told))


def describe(task: Task, base_needed_again: bool = False) -> dict[str, Any]:
    """What a task would make, as JSON values: times in seconds, memory in bytes.

    Raises ValueError or OSError for what sampling would refuse.
    """
    from ..pipelines.forecast import forecast

    settings, pipe, request, targets = task
    found = forecast(pipe, request, settings.batch_size, base_needed_again)
    request = found.request
    job = Job(settings, pipe, request)
    try_encoder(job)
    teller(job)
    frames = 1 if settings.preview else request.num_frames
    height, width = (side * settings.scale for side in found.size)
    memory = found.memory
    return {
        "files": list(map(str, targets)),
        "exist": sum(Path(target).exists() for target in targets),
        "width": width,
        "height": height,
        "frames": frames,
        "fps": settings.fps,
        "seconds": round(frames / settings.fps, 3),
        "windows": _windows(found, frames),
        "batches": found.batches,
        "steps": found.steps,
        "calls": found.calls,
        "base_path": _base_path(task, found),
        "device": settings.device,
        "base_device": settings.base_device,
        "dtype": settings.dtype,
        "model": settings.model,
        "model_fingerprint": pipe.fingerprint,
        "memory_estimate": {
            "process": peak_process_memory(),
            "weights": memory.weights,
            "activations": memory.activations,
            "clips": memory.clips,
            "devices": memory.peaks,
            "peak": memory.peak + (peak_process_memory() or 0),
        },
    }


def _windows(found: Forecast, frames: int) -> dict[str, Any] | None:
    """Where windows begin; None without windows."""
    window = getattr(found.request, "window", None)
    if not window or frames == 1:
        return None
    length = min(window, frames)
    overlap = found.request.window_overlap
    starts, loop = list(found.starts), found.request.loop
    return {"length": length, "overlap": overlap, "starts": starts, "loop": loop}


def _base_path(task: Task, found: Forecast) -> dict[str, Any] | None:
    """Where base paths come from; None for a model without them."""
    request = found.request
    if not hasattr(request, "base_path"):
        return None
    if request.trajectory is not None:
        source = "file"
    elif request.image is not None:
        source = "picture"
    else:
        source = "cache" if found.base_paths and "base" not in found.steps else "network"
    return {"kind": request.base_path, "from": source, "batches_in_cache": found.base_paths}


# -- text ------------------------------------------------------------------------------------------


def words(told: dict[str, Any]) -> str:
    """What would be made, in lines of text."""
    files, memory = told["files"], told["memory_estimate"]
    names = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}"
    there = f", {told['exist']} of which exist" if told["exist"] else ""
    frames = "1 frame" if told["frames"] == 1 else f"{told['frames']} frames"
    lines = [
        f"{names}: {len(files)} of {told['width']} x {told['height']} pixels, {frames}, "
        f"{told['seconds']:g} s at {told['fps']:g} frames a second{there}",
        f"  model     {told['model']}, {told['dtype']} on "
        + on_devices(told["device"], told["base_device"]),
    ]
    windows = told["windows"]
    if windows is not None:
        starts = ", ".join(map(str, windows["starts"]))
        overlap = f", {windows['overlap']} shared with the next" if windows["overlap"] else ""
        loop = " around a loop" if windows["loop"] else ""
        shape = f"of {windows['length']} frames{overlap}{loop}"
        lines.append(f"  windows   {shape}; they begin at {starts}")
    steps = ", ".join(f"{phase} {count}" for phase, count in told["steps"].items())
    calls = ", ".join(f"{phase} {count}" for phase, count in told["calls"].items())
    batches = "1 batch" if told["batches"] == 1 else f"{told['batches']} batches"
    lines += [f"  steps     {steps} ({batches})", f"  calls     {calls}"]
    if told["base_path"] is not None:
        base = told["base_path"]
        cached = base["batches_in_cache"]
        where = "" if cached is None else f" (in the cache: {cached} of {batches})"
        lines.append(f"  base path {base['kind'] or 'none'}, from {base['from']}{where}")
    weights = ", ".join(f"{phase} {_mega(size)}" for phase, size in memory["weights"].items())
    lines.append(
        f"  memory    about {_mega(memory['peak'])} MB at most, an estimate: weights {weights}; "
        f"largest activations {_mega(max(memory['activations'].values()))}; clips "
        f"{_mega(memory['clips'])}; process {_mega(memory['process'] or 0)}"
    )
    if told["base_device"] is not None:
        devices = ", ".join(f"{name} {_mega(size)}" for name, size in memory["devices"].items())
        lines.append(f"  devices   without the process: {devices} MB")
    return "\n".join(lines)


def _mega(size: int) -> str:
    return f"{size / 1e6:.0f}"
