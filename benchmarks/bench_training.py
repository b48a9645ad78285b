"""Training on this machine: clips a second, losses and memory, with our kernels and without.

The contenders take turns, a step each, and train on the same clips with the same noise:

vfengine           gradients from our kernels, one call of the base network a step
PyTorch's kernels  the same steps, with PyTorch's kernels throughout
vfengine, before   an older one, of --before, a checkout or a PYTHONPATH with one

Cases: the default recipe, on pixels, and that of the shipped model, on latents (random clips: their
content costs nothing). --processes: clips a second of torchrun's 1 and 2 processes, a thread each.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lib import child_environment
from lib.clip_turns import BEFORE, HERE, NOW, check_before
from lib.harness import Row, Target, main

import vfengine
import vfengine.models.layers as layers
from vfengine.cli.train_settings import read_settings
from vfengine.formats.checkpoint import DEFAULT
from vfengine.training.batch import Latents
from vfengine.training.mocap import ACTIONS
from vfengine.training.options import TrainingOptions
from vfengine.training.parts import Parts
from vfengine.training.recipes import Shape, latent_model, pixel_model
from vfengine.training.trainer import Trainer

PLAIN = "PyTorch's kernels"
RECIPES = {"pixels": [], "latents": ["--autoencoder", "parts", "--text-encoder", "parts"]}
TINY = [  # of --short
    *("--size", "16", "--num-frames", "3", "--patch-size", "2", "--batch-size", "2"),
    *("--extra-images", "2", "--layers-per-block", "1,1", "--base-channels", "16,32"),
    *("--residual-channels", "16,32"),
]
CLIPS = 64
SPEED, RATIO = "clips/s", "clips/s / theirs"
TARGETS = tuple(
    Target(f"pixels, {precision}, a step", other, RATIO, 1.5)
    for precision in ("bf16", "fp32")
    for other in (PLAIN, BEFORE)
)


def trainer(recipe: str, precision: str, more: Sequence[str] = ()) -> Trainer:
    """The default training of a recipe, on random clips."""
    given = ["--output", "none", "--precision", precision, *RECIPES[recipe], *more]
    settings = read_settings(given)
    values = {field.name: getattr(settings, field.name) for field in fields(TrainingOptions)}
    options, shape = TrainingOptions(**values), Shape.of(settings)
    random = np.random.default_rng(0)
    if recipe == "pixels":
        size = (CLIPS, settings.num_frames, settings.size, settings.size, 3)
        clips = random.integers(0, 256, size, dtype=np.uint8)
        labels = random.integers(0, len(ACTIONS), CLIPS)
        return Trainer(pixel_model(shape, ACTIONS, "decomposed"), options, clips, labels)
    parts = Parts.read(DEFAULT, DEFAULT)
    side = settings.size // parts.autoencoder.scale
    normal = torch.Generator("cpu").manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=normal).half()

    tokens, width = parts.text_encoder.max_length, parts.text_encoder.width
    latents = Latents(
        drawn(CLIPS, settings.num_frames, parts.autoencoder.latent_channels, side, side),
        drawn(CLIPS, settings.captions, tokens, width),
        drawn(tokens, width),
        drawn(CLIPS, settings.num_frames, 1, side, side).sigmoid(),
    )
    config = latent_model(shape, parts, {"any": "any"}, 0.5)
    return Trainer(config, options, latents, parts=parts)


class Worker:
    """A process that trains, a step for every call, with the vfengine found on `path`."""

    def __init__(self, path: str, case: Sequence[str], name: str, variables: Mapping[str, str]):
        environment = child_environment() | dict(variables)
        environment["PYTHONPATH"] = os.pathsep.join([path, environment["PYTHONPATH"]])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, *case],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._answer()["vfengine"]
        if not any(Path(found).is_relative_to(Path(part).resolve()) for part in path.split(":")):
            raise RuntimeError(f"vfengine was expected in {path} and found in {found}")

    def step(self) -> dict[str, float]:
        """Seconds, losses and the peak of memory so far, in MiB."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that trains ended with {self._process.wait()}")
        return json.loads(line)


def _work(name: str, recipe: str, precision: str, *more: str) -> None:
    """The worker: a JSON object for every line on stdin."""
    if name == PLAIN:
        layers.records_gradients = lambda *tensors: False
    training = trainer(recipe, precision, more)
    print(json.dumps({"vfengine": str(Path(vfengine.__file__).resolve())}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        report = training.step()
        told = {"seconds": time.perf_counter() - started, **report.losses}
        told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(told), flush=True)


def steps(
    recipe: str,
    precision: str,
    rounds: int,
    before: str | None = None,
    threads: int | None = None,
    more: Sequence[str] = (),
) -> list[Row]:
    """Medians of `rounds` steps of each contender, after two that are not counted."""
    paths = {NOW: HERE, PLAIN: HERE, **({BEFORE: before} if before else {})}
    variables = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    workers: dict[str, Worker] = {}
    told: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    try:
        for name, path in paths.items():
            workers[name] = Worker(path, (recipe, precision, *more), name, variables)
        for turn in range(-2, rounds):
            for name, worker in workers.items():
                found = worker.step()
                if turn >= 0:
                    told[name].append(found)
    finally:
        for worker in workers.values():
            worker.close()
    case = f"{recipe}, {precision}" + (", one thread" if threads == 1 else "") + ", a step"
    seconds = {name: statistics.median(step["seconds"] for step in told[name]) for name in paths}
    clips = read_settings(["--output", "none", *RECIPES[recipe], *more]).batch_size
    rows = []
    for name in paths:
        rows += [
            Row(case, name, "time", seconds[name], "s"),
            Row(case, name, SPEED, clips / seconds[name], ""),
            Row(case, name, "peak memory", told[name][-1]["peak"], "MiB"),
        ]
        if name != NOW:
            rows.append(Row(case, name, RATIO, seconds[name] / seconds[NOW], "x"))
            apart = max(
                abs(ours[loss] / theirs[loss] - 1)
                for ours, theirs in zip(told[NOW], told[name], strict=True)
                for loss in ("base", "residual")
            )
            rows.append(Row(case, name, "largest difference of losses", 100 * apart, "%"))
    return rows


def processes(
    counts: Sequence[int] = (1, 2), updates: int = 12, more: Sequence[str] = ()
) -> list[Row]:
    """Clips a second of torchrun with so many processes, of one thread each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            output = Path(folder) / str(count)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(count), "-m", "vfengine.train"]
            command += ["--output", str(output), "--clips-cache", folder, "--num-clips", "64"]
            command += ["--steps", str(updates), "--log-every", "1", "--sample-every", "0", *more]
            variables = child_environment() | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=variables, capture_output=True)
            lines = [json.loads(line) for line in (output / "log.jsonl").open()]
            speeds = [line["clips_per_second"] for line in lines if "step" in line]
            speed = statistics.median(speeds[len(speeds) // 3 :])  # past what warms up
            rows.append(Row("torchrun, pixels", f"{count} of one thread", SPEED, speed, ""))
    first = rows[0].value
    return rows + [
        Row(row.case, row.contender, "times one process", row.value / first, "x")
        for row in rows[1:]
    ]


def measure(rounds: int = 8, before: str | None = None, with_processes: bool = False) -> list[Row]:
    if with_processes:
        return processes()
    rows = []
    for recipe in RECIPES:
        for precision in ("bf16", "fp32"):
            rows += steps(recipe, precision, rounds, before)
    return rows + steps("pixels", "bf16", rounds, before, threads=1)


def bench_training_step(benchmark, short):
    """A step of the default recipe, beside PyTorch's kernels; with --short of a tiny model."""
    rows = steps("pixels", "fp32", 1 if short else 5, more=TINY if short else ())
    apart = [row.value for row in rows if row.metric == "largest difference of losses"]
    assert max(apart) < 0.1, f"losses differ by {max(apart)} %"
    training = trainer("pixels", "fp32", TINY if short else ())
    benchmark.pedantic(training.step, rounds=1)


def bench_torchrun(benchmark, short):
    """Two processes of a tiny model, or of the default one."""
    more = (*TINY, "--precision", "fp32") if short else ()
    counts = (2,) if short else (1, 2)
    run = partial(processes, counts, updates=3 if short else 12, more=more)
    benchmark.pedantic(run, rounds=1)


if __name__ == "__main__":
    if "--worker" in sys.argv[1:2]:
        _work(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--before", type=check_before, metavar="PATH", help="an older vfengine")
    parser.add_argument(
        "--rounds", type=int, default=8, metavar="N", help="steps of each contender"
    )
    parser.add_argument("--processes", action="store_true", help="torchrun, and nothing else")
    given, _ = parser.parse_known_args()
    run = partial(measure, given.rounds, given.before, given.processes)
    main(run, __doc__, () if given.processes else TARGETS, parser)
