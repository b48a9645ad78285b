"""Both phases in one graph: nothing that one branch reads is still to be written by the other.

The stub's streams run a graph as badly as its waits allow: one branch as far ahead of the other as
it can be, or in any order.
"""

import random
from collections import defaultdict, deque

import pytest
import torch
from stub_cuda import CUDA, StubCuda
from test_overlap import loops_of
from toy_models import SCHEDULE, WALK, base_model, noise_of, residual_model

from vfengine.diffusion.solvers import solver_table
from vfengine.sampling.api import sample
from vfengine.sampling.overlap import run_overlapped


class Branching(StubCuda):
    """Captured steps, records and waits are kept by stream; a replay runs them in some order.

    order: of two streams, which goes first where both can: their names, or a seed
    """

    def __init__(self, monkeypatch, order):
        super().__init__(monkeypatch)
        self.order, self.random = order, random.Random(0)
        self.recorded, self.events = None, 0  # of the capture underway: (stream, kind, what)

    class Stream(StubCuda.Stream):
        def record_event(self):
            if self.stub.capturing is None:
                return self
            self.stub.events += 1
            self.stub.recorded.append((self.name, "record", self.stub.events))
            return self.stub.events

        def wait_event(self, event):
            self.stub.recorded.append((self.name, "wait", event))

        def wait_stream(self, other):
            if self.stub.capturing is not None:
                self.stub.recorded.append((self.name, "wait", other.record_event()))

    class Graph(StubCuda.Graph):
        def replay(self):
            self.stub.run(self.recorded)

    def launches(self, loop):
        """The loop's steps, in a capture, are kept with the stream that they are launched on."""
        step = loop.step

        def launch():
            if self.capturing is None:
                step()
            else:
                self.recorded.append((self.here(), "step", step))

        loop.step, loop.device = launch, CUDA
        return loop

    def _recording(self, record):
        def call(graph, stream, steps, pool=None):
            graph.recorded = self.recorded = []
            record(graph, stream, steps, pool)

        return call

    def run(self, recorded):
        streams, done = defaultdict(deque), set()
        for stream, *task in recorded:
            streams[stream].append(task)
        while streams:
            names = sorted(streams, reverse=self.order == "residual first")
            if self.order == "any":
                self.random.shuffle(names)
            ready = [n for n in names if streams[n][0][0] != "wait" or streams[n][0][1] in done]
            kind, what = streams[ready[0]].popleft()
            if kind == "step":
                what()
            elif kind == "record":
                done.add(what)
            if not streams[ready[0]]:
                del streams[ready[0]]


def clip(streams, steps):
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    table = solver_table("unipc", SCHEDULE, steps)
    reports = []
    with torch.inference_mode():
        base, residual = loops_of(noise, table, shared=True)
        for loop in (base, residual):
            streams.launches(loop)
        run_overlapped(base, residual, *noise, True, lambda *report: reports.append(report))
    walk = {**WALK, "num_inference_steps": steps, "solver": "unipc"}
    return residual.u, sample(base_model, residual_model, *noise, **walk), reports


@pytest.mark.parametrize("order", ["base first", "residual first", "any"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 12, 25])
def test_branches_give_the_bits_of_one_phase_after_the_other(steps, order, monkeypatch):
    out, expected, reports = clip(Branching(monkeypatch, order), steps)
    assert torch.equal(out, expected)
    for phase in ("base", "residual"):
        told = [report for report in reports if report[0] == phase]
        assert told == [(phase, k + 1, steps) for k in range(steps)]
    assert all(
        reports.index(("base", min(k + 2, steps), steps))
        < reports.index(("residual", k + 1, steps))
        for k in range(steps)
    )


def test_a_missing_wait_is_seen(monkeypatch):
    monkeypatch.setattr(Branching.Stream, "wait_event", lambda *_: None)
    out, expected, _ = clip(Branching(monkeypatch, "residual first"), 8)
    assert not torch.equal(out, expected)
