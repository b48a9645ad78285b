"""python -m vfengine.train: train a decomposed model on rendered mocap or on a folder of videos."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NoReturn


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


def _parser() -> argparse.ArgumentParser:
    from .training import TrainingOptions

    parser = _Parser("python -m vfengine.train", description=__doc__.split(": ", 1)[1])
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
        "--lam", type=float, default=0.5, help="share of the noise that the frames have in common"
    )
    parser.add_argument("--base-channels", type=_ints, default=(80, 160, 272), help="per level")
    parser.add_argument("--residual-channels", type=_ints, default=(64, 96, 112), help="per level")
    parser.add_argument("--layers-per-block", type=_ints, default=(0, 1, 1), help="per level")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument(
        "--base-path", choices=("stepwise", "clean"), default="clean", help="default when sampling"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument(
        "--init-from", type=Path, metavar="DIR", help="a checkpoint whose weights to start from"
    )
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument(
        "--sample-every", type=int, default=2000, metavar="STEPS", help="0: no sample sheets"
    )
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    defaults = TrainingOptions()
    for option in fields(TrainingOptions):
        value = getattr(defaults, option.name)
        kind = {"type": type(value)}
        if option.name == "precision":
            value, kind = "auto", {"choices": ("auto", "bf16", "fp32")}
        parser.add_argument(
            f"--{option.name.replace('_', '-')}", default=value, help=f"default {value}", **kind
        )
    return parser


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _train(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from .pipeline import usable_device
    from .training import Trainer, TrainingOptions

    output: Path = arguments.output
    state_file = output / "training.safetensors"
    if state_file.exists() and not arguments.resume:
        raise ValueError(
            f"{state_file} exists: pass --resume to go on from it, or another --output"
        )
    if arguments.resume and not state_file.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {state_file}")
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
        sum(p.numel() for p in net.parameters()) / 1e6 for net in (trainer.base, trainer.residual)
    ]
    print(
        f"{len(clips)} clips of {len(names)} classes; base {sizes[0]:.2f} M and residual "
        f"{sizes[1]:.2f} M parameters; {options.precision} on {arguments.device}",
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
                progress.set_postfix({k: line[k] for k in ("base", "residual", "clips_per_second")})
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
    if not 0 <= arguments.lam < 1:  # at 1 no frame has noise of its own to estimate
        raise ValueError(f"--lam must be at least 0 and below 1, got {arguments.lam}")
    multiple = _config(arguments, ("any",)).base.size_multiple
    if arguments.size % multiple:
        raise ValueError(f"--size must be a multiple of {multiple}, got {arguments.size}")


def _precision(arguments: argparse.Namespace) -> str:
    """What "auto" means: bf16 where the device computes in it, fp32 where it would emulate it."""
    import torch

    if arguments.precision != "auto":
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
        from .data.mocap import ACTIONS, render_clips

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
    from .data.folder import read_folder

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
    from .checkpoint import CheckpointConfig
    from .models import UNetConfig
    from .schedule import NoiseSchedule

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
    residual = replace(
        base,
        in_channels=6,
        out_channels=6,
        block_out_channels=arguments.residual_channels,
        temporal_attention=coarsest,
        temporal_conv=tuple(level == levels - 2 for level in range(levels)),
        frame_embedding=True,
    )
    return CheckpointConfig(
        num_frames=arguments.num_frames,
        height=arguments.size,
        width=arguments.size,
        channels=3,
        lam=arguments.lam,
        labels=tuple(labels),
        fps=arguments.fps,
        schedule=NoiseSchedule.linear().to_dict(),
        base=base,
        residual=residual,
        base_path=arguments.base_path,
    )


def _summary(step: int, reports: list, batch_size: int, seconds: float) -> dict:
    """The log line of some steps: mean losses, those of each fifth of the schedule, the speed."""
    import warnings

    import numpy as np

    by_t = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a fifth without a sample is null
        for name in ("base", "residual"):
            means = np.nanmean([getattr(r, f"{name}_by_t") for r in reports], axis=0)
            by_t[name] = [None if np.isnan(v) else round(float(v), 4) for v in means]
    return {
        "step": step,
        "base": round(float(np.mean([r.base_loss for r in reports])), 4),
        "residual": round(float(np.mean([r.residual_loss for r in reports])), 4),
        "base_by_t": by_t["base"],
        "residual_by_t": by_t["residual"],
        "clips_per_second": round(len(reports) * batch_size / seconds, 2),
    }


def _sample_sheet(trainer, file: Path) -> None:
    """Eight classes, one clip a row, from the averaged weights in 25 steps."""
    import torch

    from .decompose import decomposed_noise
    from .sampling import sample
    from .video_io import sheet, write_video

    config = trainer.config
    labels = torch.arange(min(8, len(config.labels)), device=trainer.device)
    shape = (len(labels), config.num_frames, config.channels, config.height, config.width)
    noise = decomposed_noise(shape, base_seed=0, residual_seed=1, device=trainer.device)
    with torch.autocast(
        trainer.device.type, torch.bfloat16, enabled=trainer.options.precision == "bf16"
    ):
        video = sample(
            lambda z, t: trainer.averaged_base(z, t, class_labels=labels),
            lambda z, t: trainer.averaged_residual(z, t, class_labels=labels),
            noise.base,
            noise.residual,
            schedule=trainer.schedule,
            num_inference_steps=25,
            lam=config.lam,
            base_path=config.base_path,
        )
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(2, -1).cpu().numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_video(file, sheet(pixels, columns=config.num_frames)[None])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    sys.exit(main())
