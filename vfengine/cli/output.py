"""What `python -m vfengine.generate` writes and says: clips, base paths, progress, a summary.

Nothing here imports torch before it is needed, so that bad names are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import DEFAULTS, UsageError, one_line

if TYPE_CHECKING:
    import numpy as np

    from ..diffusion.base_path import BaseTrajectory
    from ..pipelines.videofusion import VideoFusionPipeline


class Failure(RuntimeError):
    """Something that went wrong after all input had been accepted, in one line."""


@dataclass
class Run:
    """What has happened so far: written so that an error or an interrupt can name it.

    timings: seconds; "startup" is there once sampling has begun
    """

    started: float
    files: list[Path] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, timings: Mapping[str, float]) -> None:
        for name, seconds in timings.items():
            self.timings[name] = self.timings.get(name, 0.0) + seconds

    def sampling(self) -> None:
        """Sampling has begun, if it had not before."""
        self.timings.setdefault("startup", time.perf_counter() - self.started)


# -- files -----------------------------------------------------------------------------------------


def targets(output: Path, count: int) -> list[Path]:
    """The files to be written, name-000.mp4 … when there are several, each found possible."""
    from ..media.video import check_target

    if count == 1:
        return [check_target(output)]
    digits = max(3, len(str(count - 1)))
    names = [f"{output.stem}-{k:0{digits}d}{output.suffix}" for k in range(count)]
    return [check_target(output.with_name(name)) for name in names]


def check_base_files(settings: argparse.Namespace) -> None:
    """Finds out whether base paths can be kept where they are asked to be."""
    from ..files import check_writable

    if settings.base_trajectory is not None:
        file = Path(settings.base_trajectory)
        if file.suffix != ".safetensors":
            raise UsageError(f"--base-trajectory {file}: expected a .safetensors file")
        if not file.exists():
            check_writable(file)
    if settings.base_cache is not None:
        folder = Path(settings.base_cache).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        check_writable(there / "a base path")  # folders between are made when they are needed


def write_clip(target: Path, frames: np.ndarray, settings: argparse.Namespace) -> None:
    import av

    from ..media.video import enlarge, write_video

    try:
        write_video(target, enlarge(frames, settings.scale, settings.scale_filter), settings.fps)
    except (OSError, av.FFmpegError) as error:
        raise Failure(f"{target}: cannot be written ({one_line(error)})") from error


def write_trajectory(file: Path, walked: Sequence[BaseTrajectory]) -> None:
    """The base paths of all batches in one file."""
    import torch

    states = torch.cat([part.states for part in walked], dim=1)
    try:
        replace(walked[0], states=states).save(file)
    except OSError as error:
        raise Failure(f"{file}: cannot be written ({one_line(error)})") from error


# -- progress --------------------------------------------------------------------------------------


class Progress:
    """One bar over all batches and phases; on a terminal only.

    phases: of each batch, how many are to come. A base path that is found in the cache takes no
            steps: the bar is then shorter than it was said to be.
    """

    def __init__(self, settings: argparse.Namespace, phases: Sequence[int], run: Run) -> None:
        from tqdm import tqdm

        self.steps, self.run = settings.num_inference_steps, run
        self.left = [*phases]
        self.bar = tqdm(
            total=sum(self.left) * self.steps,
            disable=True if settings.quiet else None,  # None: shown if stderr is a terminal
            ncols=_terminal_columns(),
            nrows=20,  # as with columns, a terminal that states 0 would show nothing
            leave=False,
            unit="step",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """The callback of a pipeline."""
        self.run.sampling()
        if done == 0 and phase != "base":
            self._expect(1)
        self.bar.set_description(phase, refresh=False)
        self.bar.update(1 if done else 0)

    def end_batch(self) -> None:
        self._expect(0)
        self.left.pop(0)

    def _expect(self, phases: int) -> None:
        """So many phases are left of this batch."""
        self.bar.total = self.bar.n + (phases + sum(self.left[1:])) * self.steps


def _terminal_columns() -> int:
    """Of the terminal at stderr; 80 when it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, or no file behind stderr
        return 80


# -- what is said about it -------------------------------------------------------------------------


def summary(settings: argparse.Namespace, pipe: VideoFusionPipeline, run: Run) -> str:
    files = [str(file) for file in run.files]
    kind = "pictures" if settings.preview else "clips"
    names = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}: {len(files)} {kind}"
    frames = "base frame" if settings.preview else f"{settings.num_frames} frames"
    times = {"start": "startup", "base": "base", "residual": "residual"}
    if settings.preview:
        del times["residual"]
    elif settings.overlap_phases or pipe.config.objective == "vdm":
        del times["base"], times["residual"]
        times["both phases" if settings.overlap_phases else "sampling"] = "residual"
    seconds = ", ".join(f"{said} {run.timings[name]:.1f} s" for said, name in times.items())
    return (
        f"{names}: {frames}, {settings.num_inference_steps} steps, "
        f"{settings.dtype} on {settings.device}, {run.timings['total']:.1f} s ({seconds})"
    )


def record(
    settings: argparse.Namespace, pipe: VideoFusionPipeline, trajectory_read: bool, run: Run
) -> dict[str, Any]:
    """The line of --json; times in seconds, memory in bytes."""
    import torch

    from .. import __version__

    said_elsewhere = ("list_labels", "json", "quiet", "base_seed", "residual_seed")
    asked = {name: getattr(settings, name) for name in DEFAULTS if name not in said_elsewhere}
    cuda = pipe.device.type == "cuda"
    cached = settings.base_cache is not None
    return {
        "files": [str(file) for file in run.files],
        "base_seed": settings.base_seed,
        "residual_seed": settings.residual_seed,
        "timings": {name: round(seconds, 4) for name, seconds in run.timings.items()},
        "peak_memory": {
            "process": _peak_process_memory(),
            "cuda": torch.cuda.max_memory_allocated(pipe.device) if cuda else None,
            # what graphs keep for themselves counts here alone
            "cuda_reserved": torch.cuda.max_memory_reserved(pipe.device) if cuda else None,
        },
        "base_trajectory_read": trajectory_read,
        "base_cache_hit": run.timings["base"] == 0.0 if cached else None,  # for every batch
        "model_fingerprint": pipe.config.fingerprint(),
        "threads": torch.get_num_threads(),
        "version": __version__,
        "settings": {**asked, "model": str(pipe.folder)},
    }


def _peak_process_memory() -> int | None:
    """Largest resident size of this process in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
