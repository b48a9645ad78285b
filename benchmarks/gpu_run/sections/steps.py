"""Training steps of the default recipe on pixels: launched kernel by kernel, and replayed.

Both train on the same noise as clips, so they read and draw what a real training does. Losses of
the same steps may differ by what bf16 rounds. The first steps include the capture.
"""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import torch

from gpu_run.sections import DEVICE, DRY, emit, guarded, verdict
from vfengine.cli.train_settings import read_settings
from vfengine.training.options import TrainingOptions
from vfengine.training.recipes import Shape, pixel_model
from vfengine.training.team import Execution
from vfengine.training.trainer import Trainer

CASE = "default recipe"
FORMS = {"plain": False, "captured": True}
LABELS, CLIPS = tuple(map(str, range(15))), 256
FIRST = 3 if DRY else 5  # steps that are compared: two plain ones, the capture, two replays
SECONDS = 0.2 if DRY else 5.0
LARGEST = 0.05  # relative difference of a step's losses
SMALL = ("--size", "16", "--num-frames", "4", "--base-channels", "32,32", "--batch-size", "2")
SMALL += ("--residual-channels", "32,32", "--layers-per-block", "1,1", "--extra-images", "2")


def main() -> None:
    losses: dict[str, list[float]] = {}
    for form, graph in FORMS.items():
        place = {"contender": form, "dtype": "bf16", "graph": graph and not DRY}
        with guarded(CASE, **place):
            losses[form] = measure(graph and not DRY, place)
    if len(losses) == len(FORMS):
        ours, plain = (np.array(losses[form]) for form in ("captured", "plain"))
        largest = float(np.abs(ours / plain - 1).max())
        note = f"largest relative difference {largest:.3g}, may be {LARGEST:.3g}"
        verdict(CASE, largest <= LARGEST, note, contender="captured", dtype="bf16")


def measure(capture: bool, place: dict) -> list[float]:
    """The losses of the first steps; clips a second, and memory, of later ones."""
    settings = read_settings(["--output", "unused", *(SMALL if DRY else ())])
    values = {field.name: getattr(settings, field.name) for field in fields(TrainingOptions)}
    options = replace(TrainingOptions(**{**values, "precision": "bf16"}), steps=1_000_000)
    config = pixel_model(Shape.of(settings), LABELS, "decomposed")
    rng = np.random.default_rng(0)
    shape = (CLIPS, config.num_frames, config.height, config.width, config.channels)
    clips = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, len(LABELS), CLIPS)
    execution = Execution(capture=capture)
    training = Trainer(config, options, clips, labels, DEVICE, execution=execution)

    start = time.perf_counter()
    reports = [training.step() for _ in range(FIRST)]
    losses = [loss for report in reports for loss in report.losses.values()]
    metric, seconds = f"first {FIRST} steps", time.perf_counter() - start
    emit(CASE, metric=metric, value=seconds, unit="s", **place)

    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for _ in range(2 if DRY else 10):
            report = training.step()
            count += 1
        _ = report.losses  # waits for all of them
    seconds = (time.perf_counter() - start) / count
    rate = options.batch_size / seconds
    emit(CASE, metric="clips", value=rate, unit="1/s", n=count, **place)
    emit(CASE, metric="per step", value=seconds * 1e3, unit="ms", n=count, **place)
    if not DRY:
        peak = torch.cuda.max_memory_reserved() / 2**30
        emit(CASE, metric="reserved", value=peak, unit="GiB", **place)
    return losses


if __name__ == "__main__":
    main()
