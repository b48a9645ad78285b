"""Training steps replayed from a CUDA graph, against the same steps taken plainly.

Kernels of the way back may sum in another order from run to run, so losses and weights are compared
within what that rounds. On a CPU, where the bodies are only tried, both take plain steps.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_video_config
from torch import Tensor

from vfengine.training.options import TrainingOptions
from vfengine.training.team import Execution
from vfengine.training.trainer import Trainer

from .graphs import CYCLES, distance

STEPS = 6  # the first two are plain
TOLERANCES = {"fp32": 1e-4, "bf16": 0.03}
EXECUTION = {"accumulate", "checkpoint_activations"}  # of options, as they are given
CONFIGS = {"decomposed": tiny_config, "vdm": tiny_video_config}


def trainer(device: str, capture: bool, kind: str = "decomposed", **given) -> Trainer:
    """Of a tiny model, on noise as clips."""
    how = {name: given.pop(name) for name in EXECUTION & given.keys()}
    values = {"steps": 50, "batch_size": 4, "extra_images": 4, "warmup": 3, "precision": "fp32"}
    options = TrainingOptions(**{**values, "class_dropout": 0.3, **given})
    clips = np.random.default_rng(0).integers(0, 256, (6, 4, 16, 16, 3), dtype=np.uint8)
    execution = Execution(capture=capture and device != "cpu", **how)
    labels = np.arange(6, dtype=np.int64) % 3
    return Trainer(CONFIGS[kind](), options, clips, labels, device, execution=execution)


def losses_of(training: Trainer, steps: int = STEPS) -> list[list[float]]:
    reports = [training.step() for _ in range(steps)]  # read when all are on their way
    return [list(report.losses.values()) for report in reports]


def assert_near(ours: Trainer, plain: Trainer, tolerance: float) -> None:
    """What both go on from: weights, averages, and Adam's first moments."""

    def moved(training: Trainer, name: str) -> Tensor:
        own = getattr(training, name)
        if name == "parameters":
            own = [training.optimizer.state[weight]["exp_avg"] for weight in own]
        return torch.cat([values.detach().flatten() for values in own])

    for name in ("parameters", "averages"):
        assert distance(moved(ours, name), moved(plain, name)) <= 10 * tolerance, name


@contextlib.contextmanager
def nobody_waits(device: str) -> Iterator[None]:
    """An error wherever torch waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("decomposed", {}),
        ("decomposed", {"precision": "bf16"}),
        ("decomposed", {"accumulate": 2}),
        ("decomposed", {"checkpoint_activations": True}),
        ("decomposed", {"train": "residual", "clean_share": 1.0}),
        ("vdm", {}),
    ],
)
def test_captured_training_steps_are_the_plain_ones(kind, options, device):
    plain, ours = (trainer(device, capture, kind, **options) for capture in (False, True))
    tolerance = TOLERANCES[options.get("precision", "fp32")]
    np.testing.assert_allclose(losses_of(ours), losses_of(plain), rtol=tolerance)
    assert_near(ours, plain, tolerance)


@pytest.mark.parametrize("capture", [True, False])
def test_nobody_waits_for_a_training_step(capture, device):
    training = trainer(device, capture)
    losses_of(training, 3)
    with nobody_waits(device):
        reports = [training.step() for _ in range(3)]
    assert all(np.isfinite(list(report.losses.values())).all() for report in reports)


def test_captured_training_resumes(device, tmp_path):
    """In a process that captures and in one that does not."""
    whole, first = trainer(device, True), trainer(device, True)
    losses_of(whole, 4)
    losses_of(first, 4)
    first.save(tmp_path / "state")
    expected = losses_of(whole)
    for capture in (True, False):
        again = trainer(device, capture)
        again.restore(tmp_path / "state")
        assert again.steps_done == 4
        np.testing.assert_allclose(losses_of(again), expected, rtol=TOLERANCES["fp32"])
    first.restore(tmp_path / "state")  # in the memory that its graph reads
    np.testing.assert_allclose(losses_of(first), expected, rtol=TOLERANCES["fp32"])


@pytest.mark.parametrize("late", ["draws", "loads"])
def test_draws_that_are_late_are_waited_for(late, device, monkeypatch):
    """A batch drawn ahead is used once it is there, and replaced once it has been read."""
    plain, ours = trainer(device, False), trainer(device, True)
    if device != "cpu":
        owner, name = ours._captured, {"draws": "_sampler", "loads": "_load"}[late]
        whole = getattr(owner, name)

        def slowed(*given):
            torch.cuda._sleep(CYCLES)
            return whole(*given)

        monkeypatch.setattr(owner, name, slowed)
    np.testing.assert_allclose(losses_of(ours), losses_of(plain), rtol=TOLERANCES["fp32"])


def test_memory_of_a_captured_training_stays(device):
    """Replays allocate nothing that grows."""
    training = trainer(device, True)
    losses_of(training)
    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    losses_of(training, 10)
    after = torch.cuda.memory_allocated() if device != "cpu" else 0
    assert after == before
