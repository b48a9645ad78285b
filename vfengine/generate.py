"""Generate clips: python -m vfengine.generate --label cartwheel --output cartwheel.mp4

Settings come from flags, then from --config FILE, then from the checkpoint. Everything is checked
before sampling begins; torch is imported once the command line has been understood. The exit status
is 0, 2 for bad input (one line on stderr, nothing written), 1 for a failure later on, 130 when
interrupted; files that were complete by then are named, and nothing is left half-written.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .generate_settings import DEFAULTS, UsageError, one_line, read_settings

if TYPE_CHECKING:
    import numpy as np

    from .pipeline import VideoFusionPipeline
    from .trajectory import BaseTrajectory

PROGRAM = "vfengine.generate"


class Failure(RuntimeError):
    """Something that went wrong after all input had been accepted, in one line."""


@dataclass
class Run:
    """What has happened so far: written so that an error or an interrupt can name it."""

    started: float
    files: list[Path] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, timings: Mapping[str, float]) -> None:
        for name, seconds in timings.items():
            self.timings[name] = self.timings.get(name, 0.0) + seconds


def generate(settings: argparse.Namespace, run: Run) -> None:
    """Does what the settings ask for; ValueError or OSError for bad input, Failure for the rest."""
    if settings.output is not None:
        _targets(Path(settings.output), settings.num_videos)  # before torch is imported
    _check_trajectory_file(settings)

    pipe = _open_pipeline(settings)
    if settings.list_labels:
        print(json.dumps({"labels": pipe.labels}) if settings.json else "\n".join(pipe.labels))
        return
    if settings.label not in pipe.labels:
        problem = "no --label" if settings.label is None else f"unknown label {settings.label!r}"
        raise UsageError(f"{problem}, expected one of: {', '.join(pipe.labels)}")
    if pipe.config.channels != 3:
        raise UsageError(f"{pipe.folder}: clips of {pipe.config.channels} channels are not RGB")
    if settings.output is None:
        settings.output = f"{settings.label}.mp4"
    targets = _targets(Path(settings.output), settings.num_videos)
    given = _read_trajectory(settings, pipe)

    walked = _sample_and_write(settings, pipe, given, targets, run)
    if walked:
        _write_trajectory(Path(settings.base_trajectory), walked)
    run.timings["total"] = time.perf_counter() - run.started
    if settings.json:
        print(json.dumps(_record(settings, pipe, given, run)))
    elif not settings.quiet:
        print(_summary(settings, run))


def _targets(output: Path, count: int) -> list[Path]:
    """The files to be written, name-000.mp4 … when there are several, each found possible."""
    from .video_io import check_target

    if count == 1:
        return [check_target(output)]
    digits = max(3, len(str(count - 1)))
    names = [f"{output.stem}-{k:0{digits}d}{output.suffix}" for k in range(count)]
    return [check_target(output.with_name(name)) for name in names]


def _open_pipeline(settings: argparse.Namespace) -> VideoFusionPipeline:
    import torch

    from .pipeline import VideoFusionPipeline

    return VideoFusionPipeline.from_pretrained(
        settings.model,
        device=settings.device,
        dtype=getattr(torch, settings.dtype),
        keep_base=settings.num_videos > settings.batch_size,
    )


def _check_trajectory_file(settings: argparse.Namespace) -> None:
    from .video_io import check_writable

    if settings.base_trajectory is None:
        return
    file = Path(settings.base_trajectory)
    if file.suffix != ".safetensors":
        raise UsageError(f"--base-trajectory {file}: expected a .safetensors file")
    if not file.exists():
        check_writable(file)


def _walk(settings: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_inference_steps": settings.num_inference_steps,
        "solver": settings.solver,
        "eta": settings.eta,
        "base_path": settings.base_path,
    }


def _read_trajectory(
    settings: argparse.Namespace, pipe: VideoFusionPipeline
) -> BaseTrajectory | None:
    """The base path in --base-trajectory, if the file exists and this run can follow it."""
    if settings.base_trajectory is None or not Path(settings.base_trajectory).exists():
        return None
    from .trajectory import BaseTrajectory

    file = Path(settings.base_trajectory)
    trajectory = BaseTrajectory.load(file, device=pipe.device)
    try:
        pipe.check_trajectory(trajectory, settings.num_videos, **_walk(settings))
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    seed = trajectory.metadata.get("base_seed")
    if settings.base_seed_is_asked and seed not in (None, str(settings.base_seed)):
        raise UsageError(
            f"{file}: the base trajectory was made with base seed {seed}, but "
            f"{settings.base_seed} is asked for"
        )
    settings.base_seed = None if seed is None else int(seed)
    return trajectory


def _sample_and_write(
    settings: argparse.Namespace,
    pipe: VideoFusionPipeline,
    given: BaseTrajectory | None,
    targets: Sequence[Path],
    run: Run,
) -> list[BaseTrajectory]:
    """Batch after batch; returns the base paths walked, where they are to be kept."""
    from .pipeline import to_uint8

    if settings.fps is None:
        settings.fps = pipe.config.fps
    if settings.num_frames is None:
        settings.num_frames = pipe.config.num_frames
    walked = []
    with _progress(settings, phases=1 if given else 2) as bar:

        def on_step(phase: str, done: int, total: int) -> None:
            run.timings.setdefault("startup", time.perf_counter() - run.started)
            bar.set_description(phase, refresh=False)
            bar.update(1 if done else 0)

        for first in range(0, len(targets), settings.batch_size):
            batch = targets[first : first + settings.batch_size]
            try:
                out = pipe(
                    settings.label,
                    num_videos=len(batch),
                    num_frames=settings.num_frames,
                    guidance_scale=settings.guidance_scale,
                    base_seed=settings.base_seed or 0,
                    residual_seed=settings.residual_seed,
                    trajectory=_part(given, first, len(batch)),
                    sample_offset=first,
                    callback=on_step,
                    **_walk(settings),
                )
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise Failure(
                    "not enough memory: try fewer frames, a smaller --batch-size or --dtype bf16"
                ) from error
            run.add(out.timings)
            if settings.base_trajectory is not None and given is None:
                walked.append(out.trajectory)
            started = time.perf_counter()
            for target, frames in zip(batch, to_uint8(out.frames), strict=True):
                _write(target, frames, settings)
                run.files.append(target)
            run.add({"write": time.perf_counter() - started})
    return walked


def _part(trajectory: BaseTrajectory | None, first: int, count: int) -> BaseTrajectory | None:
    """The base paths of clips first … first + count - 1; a path of one clip serves them all."""
    if trajectory is None or trajectory.final.shape[0] == 1:
        return trajectory
    return replace(trajectory, states=trajectory.states[:, first : first + count])


def _write(target: Path, frames: np.ndarray, settings: argparse.Namespace) -> None:
    import av

    from .video_io import enlarge, write_video

    try:
        write_video(target, enlarge(frames, settings.scale, settings.scale_filter), settings.fps)
    except (OSError, av.FFmpegError) as error:
        raise Failure(f"{target}: cannot be written ({one_line(error)})") from error


def _write_trajectory(file: Path, walked: Sequence[BaseTrajectory]) -> None:
    import torch

    states = torch.cat([part.states for part in walked], dim=1)
    try:
        replace(walked[0], states=states).save(file)
    except OSError as error:
        raise Failure(f"{file}: cannot be written ({one_line(error)})") from error


def _progress(settings: argparse.Namespace, phases: int) -> Any:
    """One bar over all batches and phases; on a terminal only."""
    from tqdm import tqdm

    batches = -(-settings.num_videos // settings.batch_size)
    return tqdm(
        total=batches * phases * settings.num_inference_steps,
        disable=True if settings.quiet else None,  # None: shown if stderr is a terminal
        ncols=_terminal_columns(),
        nrows=20,  # as with columns, a terminal that states 0 would show nothing
        leave=False,
        unit="step",
    )


def _terminal_columns() -> int:
    """Of the terminal at stderr; 80 when it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, or no file behind stderr
        return 80


# -- what is said about it -------------------------------------------------------------------------


def _summary(settings: argparse.Namespace, run: Run) -> str:
    files = [str(file) for file in run.files]
    names = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}: {len(files)} clips"
    seconds = {name: f"{value:.1f} s" for name, value in run.timings.items()}
    return (
        f"{names}: {settings.num_frames} frames, {settings.num_inference_steps} steps, "
        f"{seconds['total']} (start {seconds['startup']}, base {seconds['base']}, "
        f"residual {seconds['residual']})"
    )


def _record(
    settings: argparse.Namespace,
    pipe: VideoFusionPipeline,
    given: BaseTrajectory | None,
    run: Run,
) -> dict[str, Any]:
    """The line of --json; times in seconds, memory in bytes."""
    import torch

    from . import __version__

    said_elsewhere = ("list_labels", "json", "quiet", "base_seed", "residual_seed")
    asked = {name: getattr(settings, name) for name in DEFAULTS if name not in said_elsewhere}
    asked["base_path"] = settings.base_path or (
        "clean" if given is not None and given.base_path == "clean" else pipe.config.base_path
    )
    asked["model"] = str(pipe.folder)
    cuda = pipe.device.type == "cuda"
    return {
        "files": [str(file) for file in run.files],
        "base_seed": settings.base_seed,
        "residual_seed": settings.residual_seed,
        "timings": {name: round(seconds, 4) for name, seconds in run.timings.items()},
        "peak_memory": {
            "process": _peak_process_memory(),
            "cuda": torch.cuda.max_memory_allocated(pipe.device) if cuda else None,
        },
        "base_trajectory_read": given is not None,
        "model_fingerprint": pipe.config.fingerprint(),
        "threads": torch.get_num_threads(),
        "version": __version__,
        "settings": asked,
    }


def _peak_process_memory() -> int | None:
    """Largest resident size of this process in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _seconds_since_process_start() -> float:
    """On Linux; elsewhere 0, and times count from the import of this module."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return uptime - started / os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Runs one command line; returns the exit status.

    argv:    without the program's name; None is the process's own
    started: `time.perf_counter()` at the moment that times count from; None is now
    """
    run = Run(time.perf_counter() if started is None else started)
    try:
        generate(read_settings(sys.argv[1:] if argv is None else argv), run)
    except (ValueError, OSError, Failure) as error:
        status = 1 if isinstance(error, Failure) else 2
        message = f"error: {one_line(error)}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    else:
        return 0
    if run.files:
        message += f" (complete: {', '.join(str(file) for file in run.files)})"
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds, so that temporary files go


if __name__ == "__main__":
    process_start = time.perf_counter() - _seconds_since_process_start()
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main(started=process_start))
