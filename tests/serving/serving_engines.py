"""Engines for tests of the server, in this process."""

from pathlib import Path

import torch

from vfengine.pipelines.load import load_pipeline
from vfengine.serving import making
from vfengine.serving.engine import Engine
from vfengine.serving.store import Store


def engine_of(folder: Path, store: Store, **options) -> Engine:
    """An engine in this process, on a CPU in float32; `events` is what it says."""
    events: list[dict] = []
    pipe = load_pipeline(folder, device="cpu", dtype=torch.float32)
    engine = Engine(pipe, store, say=events.append, **options)
    engine.events = events
    return engine


def run_all(engine: Engine) -> int:
    """Makes all that is queued; returns the number of batches."""
    count = 0
    while engine.run_once():
        count += 1
    return count


def acting(monkeypatch, phase: str, count: int, act) -> list[tuple[str, int, int]]:
    """Has act() called at a step of a phase, before it is reported; the steps that are reported."""
    steps = []

    class Acting(making.Watch):
        def __call__(self, name, done, total):
            steps.append((name, done, total))
            if (name, done) == (phase, count):
                act()
            super().__call__(name, done, total)

    monkeypatch.setattr(making, "Watch", Acting)
    return steps
