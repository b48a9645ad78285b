"""`python -m vfengine.train`: trains on rendered motion capture or a folder of videos.

With --objective vdm it trains VDM* instead: plain video diffusion, one network that denoises all
frames, which is what decomposed models are compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..names import AUTO
from .flags import flag
from .train_settings import read_settings

if TYPE_CHECKING:
    from ..training.options import TrainingOptions
    from ..training.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status: 2 for bad input, 1 for a loss gone to NaN."""
    try:
        return _train(read_settings(argv))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"vfengine.train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        message = "interrupted; --resume goes on from the last saved state"
        print(f"vfengine.train: {message}", file=sys.stderr)
        return 130


def _train(settings: argparse.Namespace) -> int:
    from ..devices import usable_device
    from ..training.options import TrainingOptions

    state_file = settings.output / "training.safetensors"
    if state_file.exists() and not settings.resume:
        raise ValueError(
            f"{state_file} exists: pass --resume to go on from it, or another --output"
        )
    if settings.resume and not state_file.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {state_file}")
    usable_device(settings.device)
    values = {field.name: getattr(settings, field.name) for field in fields(TrainingOptions)}
    options = TrainingOptions(**{**values, "precision": _precision(settings)})
    _check(settings)
    trainer = _trainer(settings, options, state_file)
    settings.output.mkdir(parents=True, exist_ok=True)
    print(_describe(trainer, settings), file=sys.stderr)
    with (settings.output / "log.jsonl").open("a", encoding="utf-8") as log:
        _run(trainer, settings, log)
    checkpoint = settings.output / "checkpoint"
    print(f"{checkpoint}: generate with --model {checkpoint}")
    return 0


def _trainer(settings: argparse.Namespace, options: TrainingOptions, state_file: Path) -> Trainer:
    """The trainer on its clips, with the weights that it starts from."""
    from ..training.trainer import Trainer

    clips, labels, names = _data(settings)
    trainer = Trainer(_config(settings, names), options, clips, labels, settings.device)
    if settings.resume:
        trainer.restore(state_file)
    elif settings.init_from:
        fresh = trainer.warm_start(settings.init_from)
        print(f"not in {settings.init_from}: {', '.join(fresh) or 'nothing'}", file=sys.stderr)
    return trainer


def _describe(trainer: Trainer, settings: argparse.Namespace) -> str:
    """Clips, networks and device, in one line."""
    sizes = [
        f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
        for name, net in trainer.networks.items()
    ]
    return (
        f"{len(trainer.clips)} clips of {len(trainer.config.labels)} classes; "
        f"{' and '.join(sizes)} parameters; {trainer.options.precision} on {settings.device}"
    )


def _run(trainer: Trainer, settings: argparse.Namespace, log: TextIO) -> None:
    """All steps that are left, with their lines in the log, states, checkpoints and samples."""
    import torch
    from tqdm import tqdm

    options, output = trainer.options, settings.output
    record = {
        **vars(settings),
        **asdict(options),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    log.write(json.dumps({"start": trainer.steps_done, **record}, default=str) + "\n")
    progress = tqdm(total=options.steps, initial=trainer.steps_done, unit="step", disable=None)
    reports, since = [], time.perf_counter()
    while trainer.steps_done < options.steps:
        reports.append(trainer.step())
        step = trainer.steps_done
        progress.update()
        last = step == options.steps
        if step % settings.log_every == 0 or last:
            line = _summary(step, reports, options.batch_size, time.perf_counter() - since)
            log.write(json.dumps(line) + "\n")
            log.flush()
            shown = (*trainer.networks, "clips_per_second")
            progress.set_postfix({key: line[key] for key in shown})
            reports, since = [], time.perf_counter()
        if step % settings.save_every == 0 or last:
            trainer.save(output / "training.safetensors")
            trainer.export(output / "checkpoint")
        if settings.sample_every and (step % settings.sample_every == 0 or last):
            _sample_sheet(trainer, output / "samples" / f"step-{step:07d}.png")
            since = time.perf_counter()
    progress.close()


def _check(settings: argparse.Namespace) -> None:
    """ValueError for numbers out of range and impossible networks, before clips are rendered."""
    counts = ("num_clips", "num_frames", "size", "frame_stride", "patch_size")
    for name in (*counts, "save_every", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {getattr(settings, name)}")
    if settings.sample_every < 0:
        raise ValueError(f"--sample-every must not be negative, got {settings.sample_every}")
    if not 0 < settings.fps < float("inf"):
        raise ValueError(f"--fps must be positive, got {settings.fps}")
    lam = settings.lam
    if lam is not None and not 0 <= lam < 1:  # at 1 no frame has noise of its own to estimate
        raise ValueError(f"--lam must be at least 0 and below 1, got {lam}")
    config = _config(settings, ("any",))
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


def _data(settings: argparse.Namespace):
    """uint8 clips [M, N, H, W, 3], int64 labels [M] and the class names."""
    from tqdm import tqdm

    if settings.data == "mocap":
        from ..training.mocap import ACTIONS, render_clips

        shape = f"{settings.num_frames}x{settings.size}"
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
    for path, reason in found.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    for path in found.truncated:
        print(f"truncated, read up to the fault: {path}", file=sys.stderr)
    return found.clips, found.labels, found.label_names


def _config(settings: argparse.Namespace, labels: tuple[str, ...]):
    """The model: attention at the coarsest level, temporal convolutions one above it."""
    from ..diffusion.schedule import NoiseSchedule
    from ..formats.checkpoint import DecomposedConfig, PlainConfig
    from ..models import UNetConfig, vdm_config

    levels = len(settings.layers_per_block)
    coarsest = tuple(level == levels - 1 for level in range(levels))
    base = UNetConfig(  # for the output channels see models/denoisers.py
        out_channels=4,
        block_out_channels=settings.base_channels,
        layers_per_block=settings.layers_per_block,
        patch_size=settings.patch_size,
        spatial_attention=coarsest,
        temporal_attention=(False,) * levels,
        temporal_conv=(False,) * levels,
        head_dim=16,
        num_classes=len(labels),
        feed_forward_mult=0,
    )
    clips = {
        "num_frames": settings.num_frames,
        "height": settings.size,
        "width": settings.size,
        "channels": 3,
        "labels": tuple(labels),
        "fps": settings.fps,
        "schedule": NoiseSchedule.linear().to_dict(),
    }
    if settings.objective == "vdm":
        return PlainConfig(**clips, video=vdm_config(base))
    residual = replace(
        base,
        in_channels=6,
        out_channels=6,
        block_out_channels=settings.residual_channels,
        temporal_attention=coarsest,
        temporal_conv=tuple(level == levels - 2 for level in range(levels)),
        frame_embedding=True,
    )
    return DecomposedConfig(
        **clips,
        lam=settings.lam,
        base=base,
        residual=residual,
        base_path=settings.base_path,
        clean_share=settings.clean_share,
    )


def _summary(step: int, reports: list, batch_size: int, seconds: float) -> dict:
    """The log line of some steps: mean losses, those of each fifth of the schedule, the speed."""
    import warnings

    import numpy as np

    names = reports[0].losses
    by_t = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a fifth without a sample is null
        for name in names:
            means = np.nanmean([r.by_t[name] for r in reports], axis=0)
            by_t[name] = [None if np.isnan(v) else round(float(v), 4) for v in means]
    return {
        "step": step,
        **{name: round(float(np.mean([r.losses[name] for r in reports])), 4) for name in names},
        **{f"{name}_by_t": means for name, means in by_t.items()},
        "clips_per_second": round(len(reports) * batch_size / seconds, 2),
    }


def _sample_sheet(trainer, file: Path) -> None:
    """Eight classes, one clip a row, from the averaged weights in 25 steps."""
    import torch

    from ..media.pictures import network_to_pixels, sheet
    from ..media.video import write_video

    config = trainer.config
    labels = torch.arange(min(8, len(config.labels)), device=trainer.device)
    with torch.autocast(
        trainer.device.type, torch.bfloat16, enabled=trainer.options.precision == "bf16"
    ):
        video = trainer.objective.sample(trainer.averaged, labels, steps=25)
    pixels = network_to_pixels(video).cpu().numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_video(file, sheet(pixels, columns=config.num_frames)[None])
