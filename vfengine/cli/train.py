"""`python -m vfengine.train`: trains on rendered motion capture or a folder of videos.

With --objective vdm it trains VDM* instead: plain video diffusion, one network that denoises all
frames, which is what decomposed models are compared with. With --objective autoencoder or text it
trains a part of models on latents.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..names import AUTO, OBJECTIVES
from .ending import ended
from .flags import UsageError, flag
from .start import short_name
from .streams import say, tell
from .train_captioned import Captioned, encoded, read_captioned, tell_left_out
from .train_loop import Limit, run, tell_end
from .train_lora import lora_training
from .train_output import CHECKPOINT, LORA, Output, open_output
from .train_settings import FPS, TRAIN, read_settings
from .train_team import execution_of, opened, team_of_process

if TYPE_CHECKING:
    from ..training.batch import Latents
    from ..training.options import TrainingOptions
    from ..training.parts import Parts
    from ..training.published import PublishedParts
    from ..training.samples import Showcase
    from ..training.team import Team
    from ..training.text import TextTraining
    from ..training.trainer import Trainer


def main(argv: Sequence[str] | None = None, program: str = TRAIN) -> int:
    """Runs one command line; returns the exit status: that of ending.py, or 128 and the number of
    the signal that stopped a run, which is saved.

    program: how the command was called, for help and errors
    """
    team = team_of_process()
    return ended(
        lambda: _train(team, argv, program),
        short_name(program),
        less_memory="a smaller --batch-size, --accumulate or smaller networks",
        interrupted="interrupted; --resume goes on from the last saved state",
        speaks=team.speaks,
    )


def _train(team: Team, argv: Sequence[str] | None, program: str) -> int:
    with opened(team):
        settings = team.agreed(lambda: read_settings(argv, program))
        limit = Limit(settings, time.perf_counter())
        made, taken = (CHECKPOINT, "--model") if settings.lora is None else (LORA, "--lora")
        if team.restarted:
            begun = Output(settings.output, made, team).was_begun_by
            settings.resume = team.of_first(lambda: begun(team.run)) or settings.resume
        with open_output(settings.output, settings.resume, made, team) as output:
            _run(settings, output, limit)
        generates = settings.objective in (*OBJECTIVES, "distill")
        say(f"{output.checkpoint}" + f": generate with {taken} {output.checkpoint}" * generates)
    return 0 if limit.signal is None else 128 + limit.signal


def _run(settings: argparse.Namespace, output: Output, limit: Limit) -> None:
    training = output.team.agreed(lambda: _made(settings, output))
    tell(training.describe())
    if settings.rates is not None:
        tell(settings.rates)
    first = training.steps_done
    run(training, settings, output, limit)
    tell_end(training, first)


def _made(settings: argparse.Namespace, output: Output):
    """The training that the settings describe, at its first step or at that of its state."""
    from ..devices import usable_device
    from ..training.options import TrainingOptions

    team = output.team
    settings.device = team.device(settings.device)
    usable_device(settings.device)
    if settings.objective == "distill":
        _follow_teacher(settings)
    values = {field.name: getattr(settings, field.name) for field in fields(TrainingOptions)}
    options = TrainingOptions(**{**values, "precision": _precision(settings)})
    _check(settings)
    if team.size > 1 and settings.objective in ("autoencoder", "text"):
        raise UsageError(
            f"--objective {settings.objective} trains in one process, torchrun started {team.size}"
        )
    settings.execution = execution_of(settings, team)
    settings.execution.check(options)
    settings.rates = None  # of videos: what is said and logged of them
    made = _TRAININGS[settings.objective] if settings.lora is None else lora_training
    training = made(settings, options)
    if settings.resume:
        training.restore(output.state)
    else:
        _start(training, settings)
    return training


def _start(training, settings: argparse.Namespace) -> None:
    """Gives a new training the weights that it starts from, and names those that it has not."""
    sources = [(getattr(settings, "from"), {}), (settings.init_from, {})]
    if settings.residual_from:
        sources.append((settings.residual_from, {"only": "residual"}))
    for folder, which in sources:
        if folder:
            fresh = training.warm_start(folder, **which)
            tell(f"not in {folder}: {', '.join(fresh) or 'nothing'}")


# -- trainings -------------------------------------------------------------------------------------


def _on_pixels(settings: argparse.Namespace, options: TrainingOptions) -> Trainer:
    from ..training.recipes import Shape, pixel_model
    from ..training.trainer import Trainer

    clips, labels, names = _pixels(settings)
    config = pixel_model(Shape.of(settings), names, settings.objective)
    how = {"device": settings.device, "execution": settings.execution}
    return Trainer(config, options, clips, labels, **how)


def _decomposed(settings: argparse.Namespace, options: TrainingOptions) -> Trainer:
    on_latents = settings.autoencoder or settings.base
    return (_on_latents if on_latents else _on_pixels)(settings, options)


def _on_latents(settings: argparse.Namespace, options: TrainingOptions) -> Trainer:
    from ..training.recipes import Shape, latent_model
    from ..training.trainer import Trainer

    parts = _parts(settings, options)
    shape = replace(Shape.of(settings), fps=FPS)  # that of videos is not known yet
    latent_model(shape, parts, {}, 1.0)  # refused before clips are made
    told, latents, showcase = _latents(settings, parts)
    config = latent_model(Shape.of(settings), parts, told.prompts, _residual_std(settings, latents))
    how = {"device": settings.device, "execution": settings.execution}
    return Trainer(config, options, latents, parts=parts, showcase=showcase, **how)


def _follow_teacher(settings: argparse.Namespace) -> None:
    """Fills in what the teacher's checkpoint decides."""
    from ..formats.checkpoint import DecomposedConfig, read_config

    folder = getattr(settings, "from")
    config = read_config(folder)
    if not isinstance(config, DecomposedConfig):
        raise ValueError(f"{folder}: only decomposed models are distilled, not a VDM*")
    if config.published is not None:
        raise ValueError(f"{folder}: a model on a published base network cannot be distilled")
    settings.num_frames, settings.fps = config.num_frames, config.fps
    settings.size, width = config.picture_size
    if settings.size != width:
        raise ValueError(f"{folder}: clips to train on are square, its own {settings.size}x{width}")
    if settings.clean_share is None:
        settings.clean_share = config.clean_share
    if settings.clean_share is None:
        settings.clean_share = float(config.base_path == "clean")
    if settings.cell_weight is None:
        has_figures = config.autoencoder is not None and settings.data == "mocap"
        settings.cell_weight = 3.0 if has_figures else 1.0


def _distillation(settings: argparse.Namespace, options: TrainingOptions) -> Trainer:
    import numpy as np
    import torch

    from ..formats.checkpoint import read_config
    from ..training.distillation import Distillation, Teacher, distilled_config
    from ..training.parts import Parts
    from ..training.trainer import Trainer

    folder = getattr(settings, "from")
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    teacher = Teacher(folder, options.teacher_steps, settings.device, dtype)
    names = teacher.config.networks if options.train == "both" else (options.train,)
    others = None if settings.init_from is None else read_config(settings.init_from)
    how = names, settings.student_steps, settings.guidance_range
    config = distilled_config(teacher.config, *how, others)
    how = {"device": settings.device, "execution": settings.execution}
    how["objective"] = partial(Distillation, teacher=teacher)
    if config.autoencoder is None:
        clips, labels, found = _pixels(settings)
        if unknown := sorted(set(found) - set(config.labels)):
            raise ValueError(f"{folder} knows no class {unknown[0]!r}")
        labels = np.array([config.labels.index(name) for name in found])[labels]
        return Trainer(config, options, clips, labels, **how)
    parts = Parts.read(folder, folder)
    _, latents, showcase = _latents(settings, parts)
    return Trainer(config, options, latents, parts=parts, showcase=showcase, **how)


def _latents(
    settings: argparse.Namespace, parts: Parts | PublishedParts
) -> tuple[Captioned, Latents, Showcase | None]:
    """Captioned clips, the same through the parts, and what samples show; latents are kept."""
    from ..training.parts import Coder
    from ..training.samples import Showcase

    told = read_captioned(settings)
    if told.rates is not None:
        _choose_fps(settings, told.rates)
    coder = Coder(parts, settings.device)
    team = settings.execution.team
    latents = team.in_turn(lambda: encoded(told, parts, coder, settings))
    showcase = None
    if settings.sample_every:
        source, numbers = told.shown()
        showcase = Showcase.of(source, coder, numbers)
    return told, latents, showcase


def _parts(settings: argparse.Namespace, options: TrainingOptions) -> Parts | PublishedParts:
    """What --autoencoder and --text-encoder hold, or --base, which also decides on --size."""
    if settings.base is None:
        from ..training.parts import Parts

        return Parts.read(settings.autoencoder, settings.text_encoder)
    from ..training.published import PublishedParts

    parts = PublishedParts.read(settings.base, options.train != "residual")
    if settings.size is None:
        sides = {side * parts.autoencoder.scale for side in parts.model.sample_size}
        if len(sides) > 1:
            raise ValueError(f"{settings.base} makes pictures that are not square: give --size")
        settings.size = sides.pop()
    return parts


def _residual_std(settings: argparse.Namespace, latents: Latents) -> float:
    """That of the weights that the residual network starts from, which rely on it; or measured.

    Raises ValueError for weights of both networks that were trained on different latents.
    """
    from ..formats.checkpoint import read_config
    from ..training.latents import residual_std

    checkpoint = settings.output / CHECKPOINT
    if settings.resume and checkpoint.exists():  # else as the run began
        return read_config(checkpoint).residual_std
    folders = [folder for folder in (settings.init_from, settings.residual_from) if folder]
    configs = [read_config(folder) for folder in folders]
    if len({(config.latent_mean, config.latent_std) for config in configs}) > 1:
        names = " and ".join(map(str, folders))
        raise ValueError(f"{names} are of different latents, and cannot be one model")
    on_latents = [config for config in configs if config.autoencoder is not None]
    return on_latents[-1].residual_std if on_latents else residual_std(latents)


def _autoencoder(settings: argparse.Namespace, options: TrainingOptions):
    import torch
    from tqdm import tqdm

    from ..training.autoencoder import AutoencoderTraining, frame_pool
    from ..training.mocap import VERSION

    device = torch.device(settings.device)
    shape = f"{settings.size}-drawn{VERSION}"
    name = f"frames-{shape}-seed{settings.seed}-{settings.num_clips}.npy"
    folder = settings.clips_cache or settings.output
    with tqdm(total=settings.num_clips, desc="rendering", unit="clip", disable=None) as progress:
        frames = frame_pool(
            settings.num_clips,
            settings.seed,
            settings.size,
            device,
            folder / name,
            progress.update,
        )
    return AutoencoderTraining(options, frames, settings.device, keep_encoder=settings.keep_encoder)


def _text(settings: argparse.Namespace, options: TrainingOptions) -> TextTraining:
    from ..training.teacher import Teacher, teacher_folder
    from ..training.text import TextTraining

    teacher = Teacher(teacher_folder(), settings.device, options.precision == "bf16")
    return TextTraining(options, teacher, settings.device)


_TRAININGS = {
    "decomposed": _decomposed,
    "vdm": _on_pixels,
    "distill": _distillation,
    "autoencoder": _autoencoder,
    "text": _text,
}


# -- settings --------------------------------------------------------------------------------------


def _check(settings: argparse.Namespace) -> None:
    """ValueError for numbers out of range and impossible networks, before clips are rendered."""
    counts = ("num_clips", "num_frames", "size", "frame_stride", "patch_size", "captions")
    for name in (*counts, "save_every", "log_every"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {value}")
    for name in ("sample_every", "base_images"):
        value = getattr(settings, name)
        if value is not None and value < 0:
            raise ValueError(f"{flag(name)} must not be negative, got {value}")
    if settings.fps is not None and not 0 < settings.fps < float("inf"):
        raise ValueError(f"--fps must be positive, got {settings.fps}")
    lam = settings.lam
    if lam is not None and not 0 <= lam < 1:  # at 1 no frame has noise of its own to estimate
        raise ValueError(f"--lam must be at least 0 and below 1, got {lam}")
    if settings.objective in OBJECTIVES and not (settings.autoencoder or settings.base):
        from ..training.recipes import Shape, pixel_model

        shape = replace(Shape.of(settings), fps=FPS)  # that of videos is not known yet
        config = pixel_model(shape, ("any",), settings.objective)
        multiple = getattr(config, config.networks[0]).size_multiple
        if settings.size % multiple:
            raise ValueError(f"--size must be a multiple of {multiple}, got {settings.size}")


def _precision(settings: argparse.Namespace) -> str:
    """The precision; auto is bf16 if the device computes in it, fp32 if it would emulate it."""
    import torch

    if settings.precision != AUTO:
        return settings.precision
    if settings.device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo")
    native = flags.exists() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16"))
    return "bf16" if native else "fp32"


def _pixels(settings: argparse.Namespace):
    """uint8 clips [M, N, H, W, 3], int64 labels [M] and the class names; kept ones are made once.

    Of several processes the first makes them, and the others find them.
    """
    return settings.execution.team.in_turn(lambda: _read_pixels(settings))


def _read_pixels(settings: argparse.Namespace):
    from tqdm import tqdm

    if settings.data == "mocap":
        from ..training.mocap import ACTIONS, VERSION, render_clips

        shape = f"{settings.num_frames}x{settings.size}-drawn{VERSION}"
        name = f"mocap-{shape}-seed{settings.seed}-{settings.num_clips}.npy"
        file = (settings.clips_cache or settings.output) / name
        total = settings.num_clips
        with tqdm(total=total, desc="rendering", unit="clip", disable=None) as progress:
            clips, labels = render_clips(
                settings.num_clips,
                settings.seed,
                file=file,
                size=settings.size,
                num_frames=settings.num_frames,
                progress=progress.update,
            )
        return clips, labels, ACTIONS
    from ..training.folder import read_folder

    with tqdm(desc="reading", unit="file", disable=None) as progress:
        found = read_folder(
            settings.data,
            settings.num_frames,
            settings.size,
            settings.frame_stride,
            settings.seed,
            on_file=lambda _: progress.update(),
        )
    tell_left_out(found.skipped, found.truncated)
    _choose_fps(settings, found.rates)
    return found.clips, found.labels, found.label_names


def _choose_fps(settings: argparse.Namespace, rates: Sequence[float | None]) -> None:
    """Fills in --fps with the rate of the videos' clips, and settings.rates with what to say of it.

    A run that goes on keeps the rate that it began with.
    """
    from ..formats.checkpoint import read_config
    from ..training.folder import rate_of

    rate, found = rate_of(rates)
    checkpoint = settings.output / CHECKPOINT
    if settings.fps is None and settings.resume and checkpoint.exists():
        settings.fps = read_config(checkpoint).fps
    elif settings.fps is None:
        settings.fps = rate or FPS
    settings.rates = f"{found}; generated clips play at {settings.fps:g}"
