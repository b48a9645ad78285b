"""What `python -m vfengine.generate` does.

Settings come from flags, then from --config FILE, then from the checkpoint. Everything is checked
before sampling begins; torch is imported once the command line has been understood. The exit status
is 0, 2 for bad input (one line on stderr, nothing written), 1 for a failure later on, 130 when
interrupted; files that were complete by then are named, and nothing is left half-written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import (
    Failure,
    Progress,
    Run,
    check_base_files,
    record,
    summary,
    targets,
    write_clip,
    write_trajectory,
)
from .settings import BASE_FLAGS, UsageError, asked_for, one_line, read_settings

if TYPE_CHECKING:
    from ..diffusion.base_path import BaseTrajectory
    from ..pipelines.videofusion import VideoFusionOutput, VideoFusionPipeline

PROGRAM = "vfengine.generate"


def generate(settings: argparse.Namespace, run: Run) -> None:
    """Does what the settings ask for; ValueError or OSError for bad input, Failure for the rest."""
    count = max(settings.num_videos, settings.num_residuals)
    if settings.output is not None:
        targets(Path(settings.output), count)  # before torch is imported
    check_base_files(settings)

    pipe = _open_pipeline(settings)
    if settings.list_labels:
        print(json.dumps({"labels": pipe.labels}) if settings.json else "\n".join(pipe.labels))
        return
    _check_model(settings, pipe)
    if settings.output is None:
        settings.output = settings.label + (".png" if settings.preview else ".mp4")
    files = targets(Path(settings.output), count)
    given = _read_trajectory(settings, pipe)
    _settle(settings, pipe, given)

    walked = _sample_and_write(settings, pipe, given, files, run)
    if walked:
        write_trajectory(Path(settings.base_trajectory), walked)
    run.timings["total"] = time.perf_counter() - run.started
    if settings.json:
        print(json.dumps(record(settings, pipe, given is not None, run)))
    elif not settings.quiet:
        print(summary(settings, pipe, run))


# -- before sampling -------------------------------------------------------------------------------


def _open_pipeline(settings: argparse.Namespace) -> VideoFusionPipeline:
    """The pipeline; settings then name the device and dtype that were chosen."""
    import torch

    from ..pipelines.videofusion import VideoFusionPipeline

    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    pipe = VideoFusionPipeline.from_pretrained(
        settings.model,
        device=settings.device,
        dtype=dtype,
        capture=not settings.no_capture,
        base_unet=settings.base_unet,
    )
    settings.device, settings.dtype = str(pipe.device), str(pipe.dtype).removeprefix("torch.")
    return pipe


def _check_model(settings: argparse.Namespace, pipe: VideoFusionPipeline) -> None:
    """UsageError for what this model cannot do; what the pipeline refuses is not repeated here."""
    if settings.label not in pipe.labels:
        problem = "no --label" if settings.label is None else f"unknown label {settings.label!r}"
        raise UsageError(f"{problem}, expected one of: {', '.join(pipe.labels)}")
    if pipe.config.channels != 3:
        raise UsageError(f"{pipe.folder}: clips of {pipe.config.channels} channels are not RGB")
    if pipe.config.objective == "vdm":
        unfit = [flag for flag in asked_for(settings) if flag in BASE_FLAGS]
        if unfit:
            raise UsageError(
                f"{pipe.folder}: a plain video model has no base path, so it takes no "
                f"{', '.join(unfit)}"
            )


def _walk(settings: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_inference_steps": settings.num_inference_steps,
        "solver": settings.solver,
        "eta": settings.eta,
    }


def _read_trajectory(
    settings: argparse.Namespace, pipe: VideoFusionPipeline
) -> BaseTrajectory | None:
    """The base path in --base-trajectory, if the file exists and this run can follow it."""
    if settings.base_trajectory is None or not Path(settings.base_trajectory).exists():
        return None
    from ..diffusion.base_path import BaseTrajectory

    file = Path(settings.base_trajectory)
    trajectory = BaseTrajectory.load(file, device=pipe.device)
    try:
        pipe.check_trajectory(
            trajectory, settings.num_videos, base_path=settings.base_path, **_walk(settings)
        )
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    notes = trajectory.metadata
    asked = {"labels": json.dumps([settings.label])}
    if "base_seed" in settings.given:
        asked["base_seed"] = str(settings.base_seed)
    if "guidance_scale" in settings.given:
        asked["guidance_scale"] = repr(float(settings.guidance_scale))
    for name, wanted in asked.items():
        if notes.get(name, wanted) != wanted:
            raise UsageError(
                f"{file}: the base trajectory was made with {name.replace('_', ' ')} "
                f"{one_line(notes[name])}, but {wanted} is asked for"
            )
    seed = notes.get("base_seed")
    settings.base_seed = int(seed) if str(seed).isdecimal() else None
    return trajectory


def _settle(
    settings: argparse.Namespace, pipe: VideoFusionPipeline, given: BaseTrajectory | None
) -> None:
    """Fills in what was left open, so that the settings say what is done; None has no part in it.

    A base network that a later batch needs is kept; otherwise the pipeline decides.
    """
    from ..sampling.windows import choose_windows

    config = pipe.config
    if settings.fps is None:
        settings.fps = config.fps
    if settings.preview:
        settings.num_frames, settings.residual_seed = 1, None
        return
    if settings.num_frames is None:
        settings.num_frames = config.num_frames
    if config.objective == "vdm":
        settings.base_seed = None
        return
    if settings.image is not None:
        settings.base_seed = None
    if settings.base_path is None:
        picture = settings.image is not None or (given is not None and given.base_path == "clean")
        settings.base_path = "clean" if picture else config.base_path
    sizes = (settings.num_frames, config.num_frames, settings.window, settings.window_overlap)
    settings.window, settings.window_overlap = choose_windows(*sizes) or (0, None)
    if settings.offload_base is None:
        later = settings.num_videos > settings.batch_size
        settings.offload_base = not settings.overlap_phases and pipe.lets_base_go(later)


# -- sampling --------------------------------------------------------------------------------------


def _sample_and_write(
    settings: argparse.Namespace,
    pipe: VideoFusionPipeline,
    given: BaseTrajectory | None,
    files: Sequence[Path],
    run: Run,
) -> list[BaseTrajectory]:
    """Batch after batch; returns the base paths walked, where they are to be kept."""
    from ..media.pictures import read_picture, to_uint8

    source = {"trajectory": given}
    if settings.image is not None:
        source["image"] = read_picture(settings.image)
    if settings.base_cache is not None:
        source["base_cache"] = settings.base_cache
    if settings.overlap_phases:
        source["overlap_phases"] = True
    keep = settings.base_trajectory is not None and given is None
    walked = []
    batches = range(0, len(files), settings.batch_size)
    with Progress(settings, _phases(settings, pipe, source, len(batches)), run) as progress:
        for first in batches:
            batch = files[first : first + settings.batch_size]
            with _explained(settings, run):
                out = _sample(settings, pipe, source, first, len(batch), progress)
            run.sampling()
            run.add(out.timings)
            progress.end_batch()
            if keep:
                walked.append(out.trajectory)
            if settings.num_residuals > 1:  # the other motions follow the first ones' path
                source, keep = {"trajectory": out.trajectory}, False
            started = time.perf_counter()
            for target, frames in zip(batch, to_uint8(out.frames), strict=True):
                write_clip(target, frames, settings)
                run.files.append(target)
            run.add({"write": time.perf_counter() - started})
    return walked


def _phases(
    settings: argparse.Namespace,
    pipe: VideoFusionPipeline,
    source: dict[str, Any],
    batches: int,
) -> list[int]:
    """How many phases each batch has."""
    if pipe.config.objective == "vdm":
        return [1] * batches
    base = 0 if source["trajectory"] is not None or "image" in source else 1
    if settings.preview:
        return [base] * batches
    if settings.num_residuals > 1:
        return [base + 1] + [1] * (batches - 1)
    return [base + 1] * batches


def _sample(
    settings: argparse.Namespace,
    pipe: VideoFusionPipeline,
    source: dict[str, Any],
    first: int,
    count: int,
    progress: Progress,
) -> VideoFusionOutput:
    """Clips first … first + count - 1, or their base frames; source: where the base path is from"""
    source = {**source, "trajectory": _part(source["trajectory"], first, count)}
    base = {
        "guidance_scale": settings.guidance_scale,
        "base_seed": settings.base_seed or 0,
        "sample_offset": first,
        "callback": progress,
        **_walk(settings),
    }
    if settings.preview:
        path = source.pop("trajectory")
        if path is not None:
            return _look(path, count)
        return pipe.preview(settings.label, num_videos=count, **source, **base)
    motions = settings.num_residuals > 1
    return pipe(
        settings.label,
        num_videos=1 if motions else count,
        num_residuals=count if motions else 1,
        num_frames=settings.num_frames,
        residual_seed=settings.residual_seed,
        base_path=settings.base_path,
        window=settings.window,
        window_overlap=settings.window_overlap,
        offload_base=settings.offload_base,
        **source,
        **base,
    )


def _part(trajectory: BaseTrajectory | None, first: int, count: int) -> BaseTrajectory | None:
    """The base paths of clips first … first + count - 1; a path of one clip serves them all."""
    if trajectory is None or trajectory.final.shape[0] == 1:
        return trajectory
    return replace(trajectory, states=trajectory.states[:, first : first + count])


def _look(path: BaseTrajectory, count: int) -> VideoFusionOutput:
    """The preview of a base path that is there already."""
    from ..media.pictures import to_frames
    from ..pipelines.videofusion import VideoFusionOutput

    frames = to_frames(path.final[:, None].expand(count, -1, -1, -1, -1), "np")
    return VideoFusionOutput(frames, path, {"load": 0.0, "base": 0.0, "residual": 0.0})


@contextmanager
def _explained(settings: argparse.Namespace, run: Run) -> Iterator[None]:
    """Failure for what may go wrong in sampling; an error before its first step is the input's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise Failure(
                "not enough memory: try fewer frames, a smaller --batch-size or --dtype bf16"
            ) from error
        if "cannot be captured" in str(error):
            raise Failure(f"{one_line(error)}: try --no-capture") from error
        raise
    except (ValueError, OSError) as error:
        if "startup" not in run.timings:
            raise
        cache = isinstance(error, OSError) and settings.base_cache is not None
        where = f"--base-cache {settings.base_cache}: " if cache else ""
        raise Failure(where + one_line(error)) from error


def _is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


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
