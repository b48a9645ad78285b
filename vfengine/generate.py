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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

    from .pipeline import VideoFusionPipeline
    from .trajectory import BaseTrajectory

PROGRAM = "vfengine.generate"
SOLVERS = ("ddim", "ddpm", "dpmsolver")
BASE_PATHS = ("stepwise", "clean")
FILTERS = ("nearest", "lanczos")
DTYPES = {
    **{name: name for name in ("float32", "bfloat16", "float16")},
    **{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}
DEFAULTS = {
    "label": None,
    "list_labels": False,
    "num_frames": None,
    "num_inference_steps": 50,
    "guidance_scale": 2.0,
    "base_seed": 0,
    "residual_seed": 1,
    "solver": "ddim",
    "eta": 0.0,
    "num_videos": 1,
    "batch_size": 1,
    "fps": None,
    "output": None,
    "scale": 1,
    "scale_filter": "nearest",
    "model": None,
    "base_trajectory": None,
    "base_path": None,
    "device": "cpu",
    "dtype": "float32",
    "quiet": False,
    "json": False,
}


class UsageError(ValueError):
    """Bad input, in one line."""


# -- settings --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limit = "2^64-1" if high == 2**64 - 1 else high
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {limit}, got {text!r}"
            )
        return value

    return convert


def _number(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # also refuses NaN
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to {high:g}, got {text!r}"
            )
        return value

    return convert


def _parser() -> _Parser:
    """All flags, each absent from the result unless given."""
    parser = _Parser(
        prog=f"python -m {PROGRAM}",
        description="Generate clips with a decomposed video diffusion model (VideoFusion).",
        epilog="Flags may be written with hyphens or underscores.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    seed = _whole(0, 2**64 - 1)

    what = parser.add_argument_group("what")
    what.add_argument("--label", metavar="NAME", help="what to show; see --list-labels")
    what.add_argument("--list-labels", action="store_true", help="print the labels and stop")
    what.add_argument(
        "--num-frames", type=_whole(1, 1024), metavar="N", help="default: as the model was trained"
    )
    what.add_argument("--num-videos", type=_whole(1, 100_000), metavar="N", help="default: 1")
    what.add_argument(
        "--seed", type=_whole(0, 2**64 - 2), metavar="S",
        help="short for --base-seed S --residual-seed S+1",
    )  # fmt: skip
    what.add_argument("--base-seed", type=seed, metavar="S", help="of the base frame; default: 0")
    what.add_argument("--residual-seed", type=seed, metavar="S", help="of the motion; default: 1")

    how = parser.add_argument_group("how")
    how.add_argument("--model", metavar="DIR", help="checkpoint folder; default: the shipped one")
    how.add_argument(
        "--num-inference-steps", type=_whole(1, 100_000), metavar="N", help="default: 50"
    )
    how.add_argument(
        "--guidance-scale", type=_number(0, 100), metavar="S",
        help="of classifier-free guidance, 1 is off; default: 2",
    )  # fmt: skip
    how.add_argument("--solver", choices=SOLVERS, help="default: ddim")
    how.add_argument("--eta", type=_number(0, 1), help="noise that ddim adds; default: 0")
    how.add_argument(
        "--base-path", choices=BASE_PATHS,
        help="follow the base network step by step, or finish the base frame and animate it; "
        "default: what the checkpoint names",
    )  # fmt: skip
    how.add_argument(
        "--base-trajectory", metavar="FILE",
        help="a .safetensors file: read the base path if it exists, write it otherwise",
    )  # fmt: skip
    how.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 …; default: cpu")
    how.add_argument("--dtype", choices=tuple(DTYPES), help="of the networks; default: float32")
    how.add_argument(
        "--batch-size", type=_whole(1, 4096), metavar="N", help="videos at a time; default: 1"
    )
    how.add_argument("--config", metavar="FILE", help="YAML or JSON of these settings")

    where = parser.add_argument_group("where to")
    where.add_argument(
        "--output", metavar="FILE",
        help=".mp4, .webm, .gif, .webp, or .png for a sheet of all frames; several videos are "
        "numbered; default: LABEL.mp4",
    )  # fmt: skip
    where.add_argument("--fps", type=_number(0.1, 1000), help="default: the model's")
    where.add_argument(
        "--scale", type=_whole(1, 64), metavar="N", help="enlarge N times; default: 1"
    )
    where.add_argument("--scale-filter", choices=FILTERS, help="default: nearest")
    where.add_argument("--quiet", action="store_true", help="print nothing but errors")
    where.add_argument("--json", action="store_true", help="print one machine-readable line")
    return parser


def read_settings(argv: Sequence[str]) -> argparse.Namespace:
    """Flags over --config FILE over `DEFAULTS`, whose keys the result has as attributes.

    Its base_seed_is_asked tells whether the base seed was given as such. Raises UsageError for
    whatever is not understood.
    """
    parser = _parser()
    flags = _parse(parser, argv)
    file = flags.pop("config", None)
    config = {} if file is None else _read_config_file(parser, Path(file))
    return argparse.Namespace(**{**DEFAULTS, "base_seed_is_asked": False, **config, **flags})


def _parse(parser: _Parser, tokens: Sequence[str]) -> dict[str, Any]:
    """What the tokens ask for, and nothing else; --seed already in two."""
    values = vars(parser.parse_args([_with_hyphens(token) for token in tokens]))
    if "seed" in values or "base_seed" in values:
        values["base_seed_is_asked"] = "base_seed" in values
    if "seed" in values:
        seed = values.pop("seed")
        values = {"base_seed": seed, "residual_seed": seed + 1, **values}
    if "dtype" in values:
        values["dtype"] = DTYPES[values["dtype"]]
    return values


def _with_hyphens(token: str) -> str:
    """--num_frames=4 as --num-frames=4; values stay as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token


def _read_config_file(parser: _Parser, file: Path) -> dict[str, Any]:
    """The file's entries, put through the same checks as flags."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        entries = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: of JSON, or text that is not UTF-8
        raise UsageError(f"--config {file}: cannot be read ({_one_line(error)})") from error
    if entries is None:
        entries = {}
    if not isinstance(entries, dict):
        raise UsageError(f"--config {file}: expected names and values, got {_one_line(entries)}")
    known = {*DEFAULTS, "seed"} - {"list_labels"}
    tokens = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(
                f"--config {file}: unknown entry {key!r}, expected some of "
                f"{', '.join(sorted(known))}"
            )
        if name in tokens:
            raise UsageError(f"--config {file}: {name} is there twice")
        switch = DEFAULTS.get(name) is False
        if switch is not isinstance(value, bool) or isinstance(value, (dict, list)):
            wanted = "true or false" if switch else "one value"
            raise UsageError(f"--config {file}: {name} must be {wanted}, got {_one_line(value)}")
        if value is not False and value is not None:
            tokens[name] = f"--{name}" if switch else f"--{name}={value}"
    try:
        return _parse(parser, list(tokens.values()))
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error


# -- one run ---------------------------------------------------------------------------------------


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
        raise Failure(f"{target}: cannot be written ({_one_line(error)})") from error


def _write_trajectory(file: Path, walked: Sequence[BaseTrajectory]) -> None:
    import torch

    states = torch.cat([part.states for part in walked], dim=1)
    try:
        replace(walked[0], states=states).save(file)
    except OSError as error:
        raise Failure(f"{file}: cannot be written ({_one_line(error)})") from error


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


def _one_line(thing: object) -> str:
    return " ".join(str(getattr(thing, "strerror", None) or thing).split())


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
        message = f"error: {_one_line(error)}"
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
