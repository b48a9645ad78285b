"""`vfengine bench`: measures a model on this machine, and prints a table.

Networks stay in memory between clips, as in a server; `generate` of one clip frees the base network
on a CPU. Every clip has seeds of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .ending import begun, ended
from .flags import Failure, Kind, Parser, Setting, add_flags, one_line, text, whole
from .settings import SETTINGS as GENERATE_SETTINGS
from .start import short_name
from .streams import say

if TYPE_CHECKING:
    from ..pipelines.pipeline import Pipeline, VideoFusionOutput

BENCH = "python -m vfengine.bench"
_PROMPT = "a person walking"  # for models that have no labels


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if not all(1 <= size <= 1024 for size in sizes) or len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(
            f"expected different whole numbers from 1 to 1024, as in 1,2,4, got {text!r}"
        )
    return sizes


_FROM_GENERATE = (
    *("model", "label", "prompt", "num_inference_steps", "num_frames", "solver"),
    *("lora", "device", "dtype", "no_capture"),
)
SETTINGS = (
    *(setting for setting in GENERATE_SETTINGS if setting.name in _FROM_GENERATE),
    Setting(
        "batch_sizes",
        "how",
        Kind("whole numbers", {"metavar": "N,N,…", "type": _sizes}),
        "clips that are made at a time",
        (1,),
    ),
    Setting("repeats", "how", whole(1, 10_000), "warm clips, or batches of them, of each size", 5),
    Setting("json", "where to", text("FILE"), "write all figures to this file as well"),
)


def bench_parser(program: str = BENCH) -> Parser:
    """All flags, with their defaults."""
    parser = Parser(
        prog=program,
        description="Measure a model on this machine: seconds to load, of the first clip and of "
        "warm ones, by phase; clips a second; another motion of a base frame; memory.",
        allow_abbrev=False,
    )
    add_flags(parser, SETTINGS)
    parser.set_defaults(**{setting.name: setting.default for setting in SETTINGS})
    return parser


def main(
    argv: Sequence[str] | None = None, started: float | None = None, program: str = BENCH
) -> int:
    """Runs one command line; returns the exit status.

    started: `time.perf_counter()` at the moment that times count from; None is now
    program: how the command was called, for help and errors
    """
    started = time.perf_counter() if started is None else started

    def run() -> None:
        settings = bench_parser(program).parse_args(argv)
        result = measure(settings, started)
        try:
            if settings.json is not None:
                _write_json(Path(settings.json), result)
        finally:
            say(table(result))

    return ended(run, short_name(program), less_memory="fewer frames or --dtype bf16")


# -- measuring -------------------------------------------------------------------------------------


def measure(settings: argparse.Namespace, started: float) -> dict[str, Any]:
    """All figures, as JSON values: seconds, and bytes of memory.

    Raises ValueError or OSError for bad input, Failure for what goes wrong later.
    """
    from ..files import check_writable

    if settings.json is not None:
        check_writable(settings.json)
    from ..devices import is_out_of_memory
    from .job import open_pipeline
    from .settings import read_settings

    generate = argparse.Namespace(**{**vars(read_settings([])), **_model_settings(settings)})
    loading = time.perf_counter()
    pipe = open_pipeline(generate)
    pipe.keep_parts()
    opening = time.perf_counter() - loading
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(settings, pipe, Path(folder))
        first = bench.clip(1)
        seconds = {
            "start": loading - started,
            "load": opening + first["phases"].pop("load", 0.0),
            "first_clip": first["seconds"] + opening,
        }
        batches = []
        for size in settings.batch_sizes:
            try:
                batches.append(bench.batch(size))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                batches.append({"batch_size": size, "error": "not enough memory"})
        motion = bench.other_motion()
    return {
        **_machine(pipe),
        "settings": bench.values,
        "repeats": settings.repeats,
        "seconds": seconds,
        "batches": batches,
        "other_motion": motion,
    }


def _model_settings(settings: argparse.Namespace) -> dict[str, Any]:
    """Those that say which model is opened, as `generate` has them."""
    from ..names import DTYPE_NAMES

    values = {name: getattr(settings, name) for name in ("model", "lora", "device", "no_capture")}
    return {**values, "dtype": DTYPE_NAMES.get(settings.dtype, settings.dtype)}


class _Bench:
    """Clips of one model, each made with other seeds, and their times."""

    def __init__(self, settings: argparse.Namespace, pipe: Pipeline, folder: Path) -> None:
        from ..pipelines.request import field_names

        self.pipe, self.folder, self.repeats = pipe, folder, settings.repeats
        self.fields = field_names(pipe.request_type)
        self.seed = 0
        names = ("label", "prompt", "num_inference_steps", "num_frames", "solver")
        values = {name: getattr(settings, name) for name in names}
        if values["label"] is None and values["prompt"] is None:
            shown = {"label": pipe.labels[0]} if pipe.labels else {"prompt": _PROMPT}
            values.update(shown if "label" in self.fields else {"prompt": _PROMPT})
        given = [name for name, value in values.items() if value is not None]
        pipe.check_fields([name for name in given if name in ("label", "prompt")])
        self.values = {name: values[name] for name in given}
        filled = pipe.fill_defaults(pipe.request_type(**self.values))
        self.values |= {
            name: getattr(filled, name) for name in ("num_frames", "num_inference_steps", "solver")
        }

    def clip(self, size: int, **changes: Any) -> dict[str, Any]:
        """One batch: its seconds, and those of its phases; the output under "output"."""
        self.seed += 2
        seeds = {"seed": self.seed, "base_seed": self.seed, "residual_seed": self.seed + 1}
        values = {**self.values, **seeds, "offload_base": False, "num_videos": size, **changes}
        own = {name: value for name, value in values.items() if name in self.fields}
        started = time.perf_counter()
        output = self.pipe.sample(self.pipe.request_type(**own))
        writing = time.perf_counter()
        if not changes.get("preview"):
            self._write(output)
        ended = time.perf_counter()
        phases = {**output.timings, "write": ended - writing}
        return {"seconds": ended - started, "phases": phases, "output": output}

    def batch(self, size: int) -> dict[str, Any]:
        """The figures of one batch size; its first batch, which makes plans, is left out."""
        self.clip(size)
        figures = self._figures(lambda: self.clip(size))
        return {"batch_size": size, **figures, "clips_per_second": size / figures["median"]}

    def other_motion(self) -> dict[str, Any] | None:
        """The figures of further clips of one base path; None for models that have none."""
        if "trajectory" not in self.fields:
            return None
        path = self.clip(1, preview=True, num_frames=None, offload_base=None)["output"].trajectory
        self.clip(1, trajectory=path)  # reads what the preview has freed
        return self._figures(lambda: self.clip(1, trajectory=path))

    def _figures(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        made = [make() for _ in range(self.repeats)]
        seconds = [clip["seconds"] for clip in made]
        phases = {
            name: statistics.median(clip["phases"].get(name, 0.0) for clip in made)
            for name in made[0]["phases"]
        }
        return {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "seconds": seconds,
            "phases": {name: value for name, value in phases.items() if value},
            "peak_memory": _peak_memory(self.pipe),
        }

    def _write(self, output: VideoFusionOutput) -> None:
        from ..media.pictures import to_uint8
        from ..media.video import write_video

        for number, frames in enumerate(to_uint8(output.frames)):
            with begun():
                write_video(self.folder / f"{number}.mp4", frames, self.pipe.config.fps)


def _peak_memory(pipe: Pipeline) -> dict[str, int | None]:
    """Bytes, the largest of this process so far."""
    import torch

    from .output import peak_process_memory

    cuda = torch.cuda.max_memory_allocated(pipe.device) if pipe.device.type == "cuda" else None
    return {"process": peak_process_memory(), "cuda": cuda}


def _machine(pipe: Pipeline) -> dict[str, Any]:
    import torch

    cuda = pipe.device.type == "cuda"
    return {
        "version": __version__,
        "model": str(pipe.folder),
        "model_fingerprint": pipe.fingerprint,
        "device": str(pipe.device),
        "device_name": torch.cuda.get_device_name(pipe.device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    """The processor's name on Linux; elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _write_json(file: Path, result: dict[str, Any]) -> None:
    from ..files import replacing

    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Failure(f"{file}: cannot be written ({one_line(error)})") from error


# -- the table -------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The figures in words: a line about the machine and the model, then one a measurement."""
    settings, seconds = result["settings"], result["seconds"]
    shown = settings.get("label") or settings.get("prompt") or "no label"
    lines = [
        f"{result['device_name']}, {result['threads']} threads, {result['dtype']} on "
        f"{result['device']}; torch {result['torch']}, vfengine {result['version']}",
        f"{result['model']}: {shown!r}, {settings['num_frames']} frames, "
        f"{settings['num_inference_steps']} steps of {settings['solver']}",
        f"start {seconds['start']:.2f} s, load {seconds['load']:.2f} s, "
        f"first clip {seconds['first_clip']:.2f} s (loading included)",
        "",
        f"{'median of ' + str(result['repeats']):<22}{'s':>8}  {'least to most':<16}"
        f"{'clips/s':>8}  {'peak MB':>8}  phases",
    ]
    for batch in result["batches"]:
        size = batch["batch_size"]
        name = "warm clip" if size == 1 else f"batch of {size}"
        lines.append(f"{name:<22}{batch['error']}" if "error" in batch else _line(name, batch))
    if result["other_motion"] is not None:
        lines.append(_line("another motion", result["other_motion"]))
    return "\n".join(lines)


def _line(name: str, figures: dict[str, Any]) -> str:
    spread = f"{figures['least']:.3f} to {figures['most']:.3f}"
    memory = figures["peak_memory"]
    peak = memory["process"] if memory["cuda"] is None else memory["cuda"]
    peak = "" if peak is None else f"{peak / 1e6:.0f}"
    rate = figures.get("clips_per_second", 1 / figures["median"])
    phases = ", ".join(f"{name} {value:.3f}" for name, value in figures["phases"].items())
    return f"{name:<22}{figures['median']:>8.3f}  {spread:<16}{rate:>8.2f}  {peak:>8}  {phases}"
