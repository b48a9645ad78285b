"""Output of `python -m vfengine.generate`: clips, base paths, progress, a summary.

Torch is imported only where it is needed, so that bad names are refused at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .flags import Failure, UsageError, one_line
from .settings import DEFAULTS

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ..diffusion.base_path import BaseTrajectory
    from ..media.codecs import Encoding
    from ..pipelines.batches import Steps
    from ..pipelines.pipeline import Pipeline
    from ..pipelines.request import TextRequest, VideoRequest


LESS_MEMORY = "fewer frames, a smaller --batch-size or --dtype bf16"


class Job(NamedTuple):
    """One command line on its model: the settings, complete, and the request made of them."""

    settings: argparse.Namespace
    pipe: Pipeline
    request: VideoRequest | TextRequest

    @property
    def trajectory(self) -> BaseTrajectory | None:
        """The base path that was read from a file."""
        return getattr(self.request, "trajectory", None)

    @property
    def keeps_paths(self) -> bool:
        """Whether the base paths go to a file."""
        return self.settings.base_trajectory is not None and self.trajectory is None


@dataclass
class Record:
    """The files and timings so far; an error or an interrupt names the files.

    timings: seconds; "startup" is there once sampling has begun
    """

    started: float
    files: list[Path] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """Whether sampling has begun."""
        return "startup" in self.timings

    def begin(self) -> None:
        """Notes when sampling begins; later calls change nothing."""
        self.timings.setdefault("startup", time.perf_counter() - self.started)

    def add(self, timings: Mapping[str, float]) -> None:
        for name, seconds in timings.items():
            self.timings[name] = self.timings.get(name, 0.0) + seconds


# -- files -----------------------------------------------------------------------------------------


def output_files(output: Path, count: int) -> list[Path]:
    """The files of so many clips; several are name-000.mp4 …"""
    if count == 1:
        return [output]
    digits = max(3, len(str(count - 1)))
    names = [f"{output.stem}-{k:0{digits}d}{output.suffix}" for k in range(count)]
    return [output.with_name(name) for name in names]


def check_outputs(output: Path, count: int, makes_folders: bool = False) -> list[Path]:
    """`output_files`, once they can be written; makes_folders: or could be, in a new folder."""
    from ..media.video import check_target

    files = output_files(output, count)
    for file in files:
        if makes_folders and not file.parent.exists():
            there = next(folder for folder in file.absolute().parents if folder.exists())
            check_target(there / file.name)
        else:
            check_target(file)
    return files


def encoding_of(
    settings: argparse.Namespace, output: str, size: tuple[int, int] | None = None
) -> Encoding:
    """How a file is encoded, its defaults filled in; UsageError for what it does not take.

    size: height and width of the frames, to try the encoder on
    """
    from ..media.codecs import check_encoding

    asked = (settings.codec, settings.crf, settings.chroma)
    try:
        return check_encoding(Path(output).suffix, *asked, size=size)
    except ValueError as error:
        raise UsageError(f"{output}: {error}") from error


def check_base_files(settings: argparse.Namespace) -> None:
    """UsageError or OSError where a base path cannot be written."""
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


def write_clip(
    target: Path, frames: np.ndarray, settings: argparse.Namespace, metadata: str | None
) -> None:
    """metadata: a text for the file to carry"""
    import av

    from ..media.pictures import enlarge
    from ..media.video import write_video

    frames = enlarge(frames, settings.scale, settings.scale_filter)
    encoding = {name: getattr(settings, name) for name in ("codec", "crf", "chroma")}
    try:
        write_video(target, frames, settings.fps, metadata=metadata, **encoding)
    except (OSError, av.FFmpegError) as error:
        raise Failure(f"{target}: cannot be written ({one_line(error)})") from error


def write_trajectory(file: Path, paths: Sequence[BaseTrajectory]) -> None:
    """Writes the base paths of all batches to one file."""
    import torch

    states = torch.cat([path.states for path in paths], dim=1)
    try:
        replace(paths[0], states=states).save(file)
    except OSError as error:
        raise Failure(f"{file}: cannot be written ({one_line(error)})") from error


# -- progress --------------------------------------------------------------------------------------


class Progress:
    """One bar over all batches and phases; on a terminal only.

    total: steps that are to come
    """

    def __init__(self, total: int, quiet: bool, record: Record) -> None:
        self.record = record
        self.bar = progress_bar(total, quiet, unit="step")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, steps: Steps) -> None:
        self.record.begin()
        self.bar.total = steps.total
        self.bar.set_description(steps.phase, refresh=False)
        self.bar.update(steps.done - self.bar.n)

    def expect(self, total: int) -> None:
        """Corrects the total: a base path from the cache takes no steps."""
        self.bar.total = total


def progress_bar(total: int | None, quiet: bool, **options: str) -> tqdm:
    """A bar on stderr if that is a terminal; total: None is unknown."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        disable=True if quiet else None,  # None: shown if stderr is a terminal
        ncols=_terminal_columns(),
        nrows=20,  # a terminal may report 0 rows, with which no bar is shown
        leave=False,
        **options,
    )


def _terminal_columns() -> int:
    """The width of the terminal at stderr; 80 if it is unknown."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, or no file behind stderr
        return 80


# -- reports ---------------------------------------------------------------------------------------


def summary(job: Job, record: Record) -> str:
    """The line on stdout of a run that went well."""
    settings, request = job.settings, job.request
    files = [str(file) for file in record.files]
    kind = "pictures" if settings.preview else "clips"
    names = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}: {len(files)} {kind}"
    frames = "base frame" if settings.preview else f"{request.num_frames} frames"
    seconds = ", ".join(
        f"{words} {record.timings[name]:.1f} s"
        for words, name in {"start": "startup", **_timed_phases(job, record)}.items()
    )
    sampled = job.pipe.phases(request) != ("decode",)
    steps = f"{request.num_inference_steps} steps, " if sampled else ""
    devices = on_devices(settings.device, settings.base_device)
    return (
        f"{names}: {frames}, {steps}"
        f"{settings.dtype} on {devices}, {record.timings['total']:.1f} s ({seconds})"
    )


def on_devices(device: str, base_device: str | None) -> str:
    """The devices of a run, in words."""
    return device if base_device is None else f"{base_device} (base) and {device}"


def _timed_phases(job: Job, record: Record) -> dict[str, str]:
    """The names of the phases' timings, by the summary's names of the phases."""
    phases = job.pipe.phases(job.request)
    if job.settings.preview:
        sampled = {"base": "base"}
    elif job.settings.overlap_phases:
        sampled = {"both phases": "residual"}
    elif "video" in phases:
        sampled = {"sampling": "video" if "video" in record.timings else "residual"}
    else:
        sampled = {"base": "base", "residual": "residual"} if "residual" in phases else {}
    text = {"text": "text"} if "text" in phases else {}
    return text | sampled | ({"decoding": "decode"} if "decode" in phases else {})


def json_line(job: Job, record: Record) -> dict[str, Any]:
    """The line of --json; times in seconds, memory in bytes."""
    import torch

    from .. import __version__

    pipe, cached = job.pipe, job.settings.base_cache is not None
    cuda = [place for place in {pipe.device, pipe.place("base")} if place.type == "cuda"]
    return {
        "files": [str(file) for file in record.files],
        **_seeds(job),
        "timings": {name: round(seconds, 4) for name, seconds in record.timings.items()},
        "peak_memory": {
            "process": peak_process_memory(),
            "cuda": sum(map(torch.cuda.max_memory_allocated, cuda)) if cuda else None,
            # includes the memory that graphs keep
            "cuda_reserved": sum(map(torch.cuda.max_memory_reserved, cuda)) if cuda else None,
        },
        "base_trajectory_read": job.trajectory is not None,
        "base_cache_hit": record.timings["base"] == 0.0 if cached else None,  # for every batch
        "model_fingerprint": pipe.fingerprint,
        "threads": torch.get_num_threads(),
        "version": __version__,
        "settings": _settings_in_use(job),
    }


def _seeds(job: Job) -> dict[str, int | None]:
    """The seeds in use, by name."""
    if hasattr(job.request, "seed"):
        return {"seed": None if job.settings.latents is not None else job.request.seed}
    residual_seed = None if job.settings.preview else job.request.residual_seed
    return {"base_seed": _base_seed(job), "residual_seed": residual_seed}


def _base_seed(job: Job) -> int | None:
    """The seed of the base frame; None where none is drawn, or a file does not name it."""
    if job.trajectory is not None:
        seed = str(job.trajectory.metadata.get("base_seed"))
        return int(seed) if seed.isdecimal() else None
    return job.request.base_seed if "base" in job.pipe.phases(job.request) else None


def _settings_in_use(job: Job) -> dict[str, Any]:
    """The settings, with what the request has filled in."""
    of_output = {"prompts", "resume", "dry_run", "list_labels", "json", "quiet"}
    of_output |= {"ray", "base_workers", "residual_workers"}
    elsewhere = of_output | {"base_seed", "residual_seed"}
    values = {name: getattr(job.settings, name) for name in DEFAULTS if name not in elsewhere}
    filled = ("num_frames", "height", "width", "guidance_scale", "base_path", "offload_base")
    for name in (*filled, "window", "window_overlap"):
        values[name] = getattr(job.request, name, None)
    if job.settings.preview:
        values["num_frames"] = 1
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """A value for JSON; of a flag that was used several times, a list of texts."""
    return list(map(str, value)) if isinstance(value, list) else value


def peak_process_memory() -> int | None:
    """Largest resident size of this process in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
