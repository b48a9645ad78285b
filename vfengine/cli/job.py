"""One job of `python -m vfengine.generate`: settings to a request, its batches to files.

Everything is checked before sampling begins; torch is imported once the command line has been
understood.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..pipelines.request import TextRequest, VideoRequest, field_names
from .flags import Failure, UsageError, flag, one_line
from .output import (
    Job,
    Progress,
    Record,
    check_base_files,
    check_outputs,
    encoding_of,
    json_line,
    summary,
    write_clip,
    write_trajectory,
)
from .prompt_lines import slug
from .replay import check_clip, input_files
from .settings import written_settings
from .streams import say

if TYPE_CHECKING:
    from ..diffusion.base_path import BaseTrajectory
    from ..pipelines.batches import Batch
    from ..pipelines.pipeline import Pipeline


def generate(settings: argparse.Namespace, started: float, files: list[Path]) -> None:
    """Makes the clips and reports them.

    started: `time.perf_counter()` at the moment that times count from
    files:   a list, to which complete files are added

    Raises ValueError or OSError for bad input, Failure for what goes wrong later.
    """
    record = Record(started, files)
    check_files(settings)
    pipe = open_pipeline(settings)
    if settings.list_labels:
        if _takes_text(pipe):
            raise UsageError(f"{pipe.folder}: {pipe.lacks}: --prompt says what to show")
        say(json.dumps({"labels": pipe.labels}) if settings.json else "\n".join(pipe.labels))
        return
    job = make_clips(prepare(settings, pipe), record)
    if settings.json:
        say(json.dumps(json_line(job, record)))
    elif not settings.quiet:
        say(summary(job, record))


# -- from settings to a request --------------------------------------------------------------------


class Task(NamedTuple):
    """What is about to be made: a request that its model can take, and its files.

    settings: complete
    """

    settings: argparse.Namespace
    pipe: Pipeline
    request: VideoRequest | TextRequest
    targets: list[Path]

    @property
    def is_done(self) -> bool:
        """Whether all that it writes is there: the base paths too, which later lines may follow."""
        path = self.settings.base_trajectory
        files = self.targets if path is None else [*self.targets, Path(path)]
        return all(file.is_file() for file in files)


def check_files(settings: argparse.Namespace) -> None:
    """ValueError or OSError for files that cannot be written, before torch is imported."""
    if settings.output is not None:
        check_outputs(Path(settings.output), max(settings.num_videos, settings.num_residuals))
        encoding_of(settings, settings.output)
    check_base_files(settings)


def prepare(settings: argparse.Namespace, pipe: Pipeline, makes_folders: bool = False) -> Task:
    """The task that settings are; ValueError or OSError for what the model cannot take.

    makes_folders: whether missing folders of its files are made later
    """
    _check_model(settings, pipe)
    settings = _complete(settings, pipe)
    request = (_text_request if _takes_text(pipe) else _request)(settings, pipe)
    targets = check_outputs(Path(settings.output), request.num_clips, makes_folders)
    if settings.base_cache is not None:
        folder = Path(settings.base_cache).absolute()
        for target in targets:
            if target.absolute() in (folder, *folder.parents):
                raise UsageError(f"{target}: cannot be a clip and hold --base-cache {folder.name}")
    return Task(settings, pipe, request, targets)


def open_pipeline(settings: argparse.Namespace) -> Pipeline:
    import torch

    from ..formats.tokenizer import MissingPackage
    from ..pipelines.load import load_pipeline

    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        pipe = load_pipeline(
            settings.model,
            device=settings.device,
            dtype=dtype,
            capture=not settings.no_capture,
            base_unet=settings.base_unet,
            lora=settings.lora,
            base_device=settings.base_device,
            residual_device=settings.residual_device,
        )
    except MissingPackage as error:
        raise UsageError(str(error)) from error
    check_clip(settings, pipe)
    return pipe


def _check_model(settings: argparse.Namespace, pipe: Pipeline) -> None:
    """ValueError for settings that this model cannot take; the pipeline checks their values."""
    written = written_settings(settings)

    def spell(name: str) -> str:
        return flag(name, False if written[name] is False else None)

    if _takes_text(pipe):
        pipe.check_fields(written, spell)
        if settings.prompt is None and settings.latents is None:
            raise UsageError("no --prompt, which says what to show, and no --latents to decode")
        return
    if settings.prompt is not None:
        pipe.check_fields(["prompt"], spell)
    elif settings.label not in pipe.labels:
        problem = "no --label" if settings.label is None else f"unknown label {settings.label!r}"
        prompts = pipe.config.text_encoder is not None and settings.label is None
        problem = f"no --prompt, and {problem}" if prompts else problem
        raise UsageError(f"{problem}, expected one of: {', '.join(pipe.labels)}")
    if pipe.config.picture_channels != 3:
        channels = pipe.config.picture_channels
        raise UsageError(f"{pipe.folder}: clips of {channels} channels are not RGB")
    pipe.check_fields(written, spell)


def _takes_text(pipe: Pipeline) -> bool:
    return pipe.request_type is TextRequest


def _complete(settings: argparse.Namespace, pipe: Pipeline) -> argparse.Namespace:
    """The settings with output, its encoding, fps, model, device and dtype filled in."""
    output = _default_output(settings) if settings.output is None else settings.output
    base = pipe.place("base")
    filled = {
        **encoding_of(settings, output)._asdict(),
        "output": output,
        "fps": pipe.config.fps if settings.fps is None else settings.fps,
        "model": str(pipe.folder),
        "device": str(pipe.device),
        "base_device": None if base == pipe.device else str(base),
        "residual_device": None if base == pipe.device else str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    return argparse.Namespace(**{**vars(settings), **filled})


def _default_output(settings: argparse.Namespace) -> str:
    """A name after the label, the first words of the prompt, or the file of latents."""
    if settings.latents is not None:
        return Path(settings.latents).stem + ".mp4"
    name = settings.label if settings.prompt is None else slug(settings.prompt)
    return name + (".png" if settings.preview else ".mp4")


def _read_trajectory(settings: argparse.Namespace, pipe: Pipeline) -> BaseTrajectory | None:
    """The base path in --base-trajectory, if the file exists and this run can follow it."""
    if settings.base_trajectory is None or not Path(settings.base_trajectory).exists():
        return None
    from ..diffusion.base_path import BaseTrajectory

    file, count = Path(settings.base_trajectory), settings.num_videos
    path, first = BaseTrajectory.load(file, device=pipe.device), settings.base_offset
    if first is not None:
        if first + count > path.final.shape[0]:
            raise UsageError(
                f"{file}: holds {path.final.shape[0]} base paths, but --base-offset {first} and "
                f"{count} clips ask for more"
            )
        path = replace(path, states=path.states[:, first : first + count])
    try:
        pipe.check_trajectory(
            path,
            count,
            num_inference_steps=settings.num_inference_steps,
            solver=settings.solver,
            eta=settings.eta,
            base_path=settings.base_path,
        )
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    shown = {name: getattr(settings, name) for name in ("label", "prompt", "negative_prompt")}
    wanted = pipe.shown(pipe.request_type(**shown))
    if settings.clip is not None and "base_trajectory" not in settings.clip.flags:
        return path  # of the content that the clip was made of
    if "negative_prompt" not in settings.given:
        wanted.pop("negative_prompts", None)
    if "base_seed" in settings.given:
        wanted["base_seed"] = str(settings.base_seed)
    if "guidance_scale" in settings.given:
        wanted["guidance_scale"] = repr(float(settings.guidance_scale))
    for name, value in wanted.items():
        if path.metadata.get(name, value) != value:
            raise UsageError(
                f"{file}: the base trajectory was made with {name.replace('_', ' ')} "
                f"{one_line(path.metadata[name])}, but {value} is asked for"
            )
    return path


def _request(settings: argparse.Namespace, pipe: Pipeline) -> VideoRequest:
    """The request that the settings make, with the files that they name read."""
    from ..media.pictures import read_picture

    values = {**vars(settings), "trajectory": _read_trajectory(settings, pipe)}
    if settings.image is not None:
        values["image"] = read_picture(settings.image)
    names = field_names(pipe.request_type) & values.keys()
    return pipe.request_type(**{name: values[name] for name in names})


def _text_request(settings: argparse.Namespace, pipe: Pipeline) -> TextRequest:
    """The request that the settings make of a text-to-video model."""
    if settings.latents is not None:
        from ..pipelines.latents import read_latents

        if "seed" in settings:
            raise UsageError("--latents cannot go with --seed: the latents are finished")
        latents, first = read_latents(settings.latents)[0], settings.sample_offset
        if first >= len(latents):
            raise UsageError(
                f"--latents {settings.latents}: holds {len(latents)} clips, but --sample-offset is "
                f"{first}"
            )
        last = first + settings.num_videos if "num_videos" in settings.given else None
        return TextRequest(finished=latents[first:last], sample_offset=first)
    names = field_names(TextRequest) & settings.given
    seed = {"seed": settings.seed} if "seed" in settings else {}
    return TextRequest(**{name: getattr(settings, name) for name in names}, **seed)


# -- sampling --------------------------------------------------------------------------------------


def make_clips(
    task: Task,
    record: Record,
    show: Callable[[int], Progress] | None = None,
    base_needed_again: bool = False,
) -> Job:
    """Samples and writes batch after batch, and the base paths if they are to be kept.

    show:              progress of so many steps; None is a bar of its own
    base_needed_again: whether later tasks need the base network

    Raises ValueError or OSError for bad input, Failure for what goes wrong later.
    """
    from ..media.pictures import to_uint8
    from ..pipelines.batches import Batches

    settings, pipe, request, targets = task
    batches = Batches(pipe, request, settings.batch_size, base_needed_again)
    job = Job(settings, pipe, batches.request)
    try_encoder(job)
    tell = teller(job)
    paths = []
    total = batches.steps.total
    with (
        Progress(total, settings.quiet, record) if show is None else show(total) as progress,
        _naming_latents(job.request, record),
    ):
        for batch in _explained(batches.run(progress), settings, record):
            record.begin()
            record.add(batch.output.timings)
            progress.expect(batch.steps.total)
            if job.keeps_paths and not (paths and job.request.shares_path):
                paths.append(batch.output.trajectory)
            started = time.perf_counter()
            for number, frames in enumerate(to_uint8(batch.output.frames), batch.first):
                write_clip(targets[number], frames, settings, tell(number))
                record.files.append(targets[number])
            record.add({"write": time.perf_counter() - started})
    if paths:
        write_trajectory(Path(settings.base_trajectory), paths)
    record.timings["total"] = time.perf_counter() - record.started
    return job


def try_encoder(job: Job) -> None:
    """UsageError where an encoder that was asked for does not take frames of this size."""
    settings, config = job.settings, job.pipe.config
    if not settings.given & {"codec", "chroma"}:
        return
    text = _takes_text(job.pipe)
    size = (job.request.height, job.request.width) if text else config.picture_size
    sides = tuple(side * settings.scale for side in size)
    encoding_of(settings, settings.output, sides)


def teller(job: Job, device: str | None = None) -> Callable[[int], str | None]:
    """What each clip's file tells of it, by the clip's number; ValueError for what is too long.

    device: where it is made, if the pipeline is elsewhere
    """
    from ..media.metadata import check_metadata
    from ..pipelines.clip_settings import clip_settings, settings_text

    settings = job.settings
    if settings.no_metadata:
        return lambda number: None
    files = input_files(settings)
    names = ("fps", "scale", "scale_filter", "codec", "crf", "chroma")
    written = {name: getattr(settings, name) for name in names}

    def tell(number: int) -> str:
        record = clip_settings(job.pipe, job.request, number, files=files, **written)
        return settings_text(record if device is None else {**record, "device": device})

    try:
        check_metadata(tell(0))
    except ValueError as error:
        raise UsageError(f"{one_line(error)}: --no-metadata leaves it out") from error
    return tell


@contextmanager
def _naming_latents(request: VideoRequest | TextRequest, record: Record) -> Iterator[None]:
    """Counts the file of latents among the complete ones if the `with` block fails."""
    try:
        yield
    except BaseException:
        file = getattr(request, "save_latents", None)
        if file is not None and file.num_clips:
            record.files.append(file.path)
        raise


def _explained(
    batches: Iterable[Batch], settings: argparse.Namespace, record: Record
) -> Iterator[Batch]:
    """The batches; raises Failure for errors that may occur once sampling has begun."""
    try:
        yield from batches
    except RuntimeError as error:
        if "cannot be captured" in str(error):
            raise Failure(f"{one_line(error)}: try --no-capture") from error
        raise
    except (ValueError, OSError) as error:
        if not record.has_begun:
            raise  # before the first step it is an error of the input
        cache = isinstance(error, OSError) and settings.base_cache is not None
        where = f"--base-cache {settings.base_cache}: " if cache else ""
        raise Failure(where + one_line(error)) from error
