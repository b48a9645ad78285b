"""python -m vfengine.train: train a decomposed model on rendered mocap or on a folder of videos.

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
from typing import NoReturn

from ..names import AUTO, BASE_PATHS, OBJECTIVES, PRECISIONS


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status: 2 for bad input, 1 for a loss gone to NaN."""
    try:
        return _train(_parser().parse_args(argv))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"vfengine.train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        message = "interrupted; --resume goes on from the last saved state"
        print(f"vfengine.train: {message}", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


# the training options that decomposed models alone have; those of a VDM* are zero
_DECOMPOSED_OPTIONS = ("extra_images", "clean_share", "base_jitter")
_DECOMPOSED_ONLY = "; not with --objective vdm"


def _parser() -> argparse.ArgumentParser:
    from ..training.options import TrainingOptions

    parser = _Parser("python -m vfengine.train", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="decomposed",
        help="a decomposed model (default), or VDM*, plain video diffusion on the base UNet",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for checkpoint, state, log and samples"
    )
    parser.add_argument(
        "--data", default="mocap", help='"mocap", or a folder of videos, its sub-folders as classes'
    )
    parser.add_argument("--num-clips", type=int, default=12_000, help="clips of mocap to render")
    parser.add_argument(
        "--clips-cache", type=Path, help="folder that keeps rendered clips (default: the output)"
    )
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="height and width")
    parser.add_argument("--frame-stride", type=int, default=1, help="of a folder of videos")
    parser.add_argument(
        "--fps", type=float, default=10.0, help="at which generated clips are to be played"
    )
    parser.add_argument(
        "--lam",
        type=float,
        help=f"share of the noise that the frames have in common, default 0.5{_DECOMPOSED_ONLY}",
    )
    parser.add_argument(
        "--base-channels",
        type=_ints,
        default=(80, 160, 272),
        help="per level, of the base network or of VDM*",
    )
    parser.add_argument(
        "--residual-channels", type=_ints, help=f"per level, default 64,96,112{_DECOMPOSED_ONLY}"
    )
    parser.add_argument("--layers-per-block", type=_ints, default=(0, 1, 1), help="per level")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument(
        "--base-path",
        choices=BASE_PATHS,
        help="default when sampling: clean, or stepwise with --clean-share 0" + _DECOMPOSED_ONLY,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="DIR",
        help="a checkpoint whose weights to start from; VDM* may start from a base network",
    )
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument(
        "--sample-every", type=int, default=2000, metavar="STEPS", help="0: no sample sheets"
    )
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    defaults = TrainingOptions()
    for option in fields(TrainingOptions):
        value = getattr(defaults, option.name)
        kind = {"type": type(value), "default": value}
        if option.name == "precision":
            value = AUTO
            kind = {"choices": (AUTO, *PRECISIONS), "default": value}
        text = f"default {value}"
        if option.name in _DECOMPOSED_OPTIONS:  # filled in by _settle
            kind["default"], text = None, text + _DECOMPOSED_ONLY
        parser.add_argument(f"--{option.name.replace('_', '-')}", help=text, **kind)
    return parser


def _settle(arguments: argparse.Namespace) -> None:
    """Fill in the flags that decomposed models alone have; ValueError where a VDM* is given one."""
    from ..training.options import TrainingOptions

    vdm = arguments.objective == "vdm"
    defaults = {"lam": 0.5, "residual_channels": (64, 96, 112), "base_path": None}
    defaults |= {name: getattr(TrainingOptions, name) for name in _DECOMPOSED_OPTIONS}
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif vdm:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --objective vdm")
    if vdm:
        for name in defaults:
            setattr(arguments, name, 0 if name in _DECOMPOSED_OPTIONS else None)
    elif arguments.base_path is None:
        arguments.base_path = "clean" if arguments.clean_share > 0 else "stepwise"


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _train(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from ..pipelines.videofusion import usable_device
    from ..training.options import TrainingOptions
    from ..training.trainer import Trainer

    output: Path = arguments.output
    state_file = output / "training.safetensors"
    if state_file.exists() and not arguments.resume:
        raise ValueError(
            f"{state_file} exists: pass --resume to go on from it, or another --output"
        )
    if arguments.resume and not state_file.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {state_file}")
    _settle(arguments)
    usable_device(arguments.device)
    values = {f.name: getattr(arguments, f.name) for f in fields(TrainingOptions)}
    options = TrainingOptions(**{**values, "precision": _precision(arguments)})
    _check(arguments)
    clips, labels, names = _data(arguments)
    trainer = Trainer(_config(arguments, names), options, clips, labels, arguments.device)
    if arguments.resume:
        trainer.restore(state_file)
    elif arguments.init_from:
        fresh = trainer.warm_start(arguments.init_from)
        print(f"not in {arguments.init_from}: {', '.join(fresh) or 'nothing'}", file=sys.stderr)
    output.mkdir(parents=True, exist_ok=True)
    sizes = [
        f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
        for name, net in trainer.networks.items()
    ]
    print(
        f"{len(clips)} clips of {len(names)} classes; {' and '.join(sizes)} parameters; "
        f"{options.precision} on {arguments.device}",
        file=sys.stderr,
    )
    record = {
        **vars(arguments),
        **asdict(options),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    with (output / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"start": trainer.steps_done, **record}, default=str) + "\n")
        progress = tqdm(total=options.steps, initial=trainer.steps_done, unit="step", disable=None)
        reports, since = [], time.perf_counter()
        while trainer.steps_done < options.steps:
            reports.append(trainer.step())
            step = trainer.steps_done
            progress.update()
            if step % arguments.log_every == 0 or step == options.steps:
                line = _summary(step, reports, options.batch_size, time.perf_counter() - since)
                log.write(json.dumps(line) + "\n")
                log.flush()
                shown = (*trainer.networks, "clips_per_second")
                progress.set_postfix({key: line[key] for key in shown})
                reports, since = [], time.perf_counter()
            if step % arguments.save_every == 0 or step == options.steps:
                trainer.save(state_file)
                trainer.export(output / "checkpoint")
            if arguments.sample_every and (
                step % arguments.sample_every == 0 or step == options.steps
            ):
                _sample_sheet(trainer, output / "samples" / f"step-{step:07d}.png")
                since = time.perf_counter()
        progress.close()
    print(f"{output / 'checkpoint'}: generate with --model {output / 'checkpoint'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for numbers out of range and networks that cannot be, before clips are made."""
    for name in ("num_clips", "num_frames", "size", "frame_stride", "patch_size", "save_every",
                 "log_every"):  # fmt: skip
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(arguments, name)}")
    if arguments.sample_every < 0:
        raise ValueError(f"--sample-every must not be negative, got {arguments.sample_every}")
    if not 0 < arguments.fps < float("inf"):
        raise ValueError(f"--fps must be positive, got {arguments.fps}")
    lam = arguments.lam
    if lam is not None and not 0 <= lam < 1:  # at 1 no frame has noise of its own to estimate
        raise ValueError(f"--lam must be at least 0 and below 1, got {lam}")
    config = _config(arguments, ("any",))
    multiple = getattr(config, config.networks[0]).size_multiple
    if arguments.size % multiple:
        raise ValueError(f"--size must be a multiple of {multiple}, got {arguments.size}")


def _precision(arguments: argparse.Namespace) -> str:
    """What "auto" means: bf16 where the device computes in it, fp32 where it would emulate it."""
    import torch

    if arguments.precision != AUTO:
        return arguments.precision
    if arguments.device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo")
    native = flags.exists() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16"))
    return "bf16" if native else "fp32"


def _data(arguments: argparse.Namespace):
    """uint8 clips [M, N, H, W, 3], int64 labels [M] and the class names."""
    from tqdm import tqdm

    if arguments.data == "mocap":
        from ..training.mocap import ACTIONS, render_clips

        shape = f"{arguments.num_frames}x{arguments.size}"
        name = f"mocap-{shape}-seed{arguments.seed}-{arguments.num_clips}.npy"
        file = (arguments.clips_cache or arguments.output) / name
        total = arguments.num_clips
        with tqdm(total=total, desc="rendering", unit="clip", disable=None) as progress:
            clips, labels = render_clips(
                arguments.num_clips,
                arguments.seed,
                file=file,
                size=arguments.size,
                num_frames=arguments.num_frames,
                progress=progress.update,
            )
        return clips, labels, ACTIONS
    from ..training.folder import read_folder

    with tqdm(desc="reading", unit="file", disable=None) as progress:
        found = read_folder(
            arguments.data,
            arguments.num_frames,
            arguments.size,
            arguments.frame_stride,
            arguments.seed,
            on_file=lambda _: progress.update(),
        )
    for path, reason in found.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    for path in found.truncated:
        print(f"truncated, read up to the fault: {path}", file=sys.stderr)
    return found.clips, found.labels, found.label_names


def _config(arguments: argparse.Namespace, labels: tuple[str, ...]):
    """The model: attention at the coarsest level, temporal convolutions one above it."""
    from ..diffusion.schedule import NoiseSchedule
    from ..formats.checkpoint import DecomposedConfig, PlainConfig
    from ..models import UNetConfig, vdm_config

    levels = len(arguments.layers_per_block)
    coarsest = tuple(level == levels - 1 for level in range(levels))
    base = UNetConfig(  # what comes out: see models/generators.py
        out_channels=4,
        block_out_channels=arguments.base_channels,
        layers_per_block=arguments.layers_per_block,
        patch_size=arguments.patch_size,
        spatial_attention=coarsest,
        temporal_attention=(False,) * levels,
        temporal_conv=(False,) * levels,
        head_dim=16,
        num_classes=len(labels),
        feed_forward_mult=0,
    )
    clips = {
        "num_frames": arguments.num_frames,
        "height": arguments.size,
        "width": arguments.size,
        "channels": 3,
        "labels": tuple(labels),
        "fps": arguments.fps,
        "schedule": NoiseSchedule.linear().to_dict(),
    }
    if arguments.objective == "vdm":
        return PlainConfig(**clips, video=vdm_config(base))
    residual = replace(
        base,
        in_channels=6,
        out_channels=6,
        block_out_channels=arguments.residual_channels,
        temporal_attention=coarsest,
        temporal_conv=tuple(level == levels - 2 for level in range(levels)),
        frame_embedding=True,
    )
    return DecomposedConfig(
        **clips,
        lam=arguments.lam,
        base=base,
        residual=residual,
        base_path=arguments.base_path,
        clean_share=arguments.clean_share,
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

    from ..media.pictures import network_to_pixels
    from ..media.video import sheet, write_video

    config = trainer.config
    labels = torch.arange(min(8, len(config.labels)), device=trainer.device)
    with torch.autocast(
        trainer.device.type, torch.bfloat16, enabled=trainer.options.precision == "bf16"
    ):
        video = trainer.objective.sample(trainer.averaged, labels, steps=25)
    pixels = network_to_pixels(video).cpu().numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_video(file, sheet(pixels, columns=config.num_frames)[None])
