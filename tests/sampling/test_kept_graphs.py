"""Which calls of a pipeline capture graphs, and which replay those of the call before.

On the stub of torch.cuda, whose graphs run on the CPU; tests/gpu/test_capture.py counts on a GPU.
"""

import gc

import numpy as np
import pytest
import torch
from held import loops_of, networks_of
from stub_cuda import OnTheCpu, pretended, stub_with_loops
from torch import nn

SETTINGS = {"num_inference_steps": 4, "base_path": "stepwise", "output_type": "np"}
BOTH, RESIDUAL, NOTHING = 2, 1, 0  # graphs


@pytest.fixture
def stub(monkeypatch):
    """With as much memory free as a GPU has."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 36, 1 << 36))
    return stub_with_loops(monkeypatch)


class Counted:
    """A pipeline on the stub; a call returns its frames and how many graphs it captured."""

    def __init__(self, stub, checkpoint):
        self.stub = stub
        self.pipe, _ = pretended(stub, checkpoint, "walk", num_inference_steps=1)

    def __call__(self, label="walk", **settings):
        before = self.stub.calls.count("captured")
        with OnTheCpu():
            frames = self.pipe(label, **{**SETTINGS, **settings}).frames
        assert not self.stub.problems
        return frames, self.stub.calls.count("captured") - before


@pytest.fixture
def pipe(stub, tiny_checkpoint):
    return Counted(stub, tiny_checkpoint)


def test_a_graph_is_kept_for_other_noise_labels_and_callbacks(pipe):
    """One label a call, and offload_base as it is by default."""
    frames, made = pipe()
    assert made == BOTH
    for other in ({"base_seed": 7, "residual_seed": 8}, {"label": "jump"}, {"sample_offset": 3}):
        out, made = pipe(**other)
        assert made == NOTHING, other
        assert not np.array_equal(out, frames), other
    out, made = pipe(callback=lambda *_: None)
    assert made == NOTHING
    assert np.array_equal(out, frames)


def test_a_graph_is_captured_anew_for_what_is_in_it(pipe):
    settings = {"guidance_scale": 2.0}
    assert pipe(**settings)[1] == BOTH
    for change, graphs in (
        ({"num_inference_steps": 5}, BOTH),
        ({"guidance_scale": 3.0}, BOTH),
        ({"solver": "unipc"}, BOTH),
        ({"num_residuals": 2}, RESIDUAL),
        ({"num_frames": 3}, RESIDUAL),
        ({"lam": 0.25}, RESIDUAL),
        ({"base_path": "clean"}, RESIDUAL),
        ({"num_residuals": 1, "num_videos": 2}, BOTH),
    ):
        settings |= change
        assert pipe(**settings)[1] == graphs, change
        assert pipe(**settings)[1] == NOTHING, change


def test_previews_and_paths_of_a_call_before_keep_the_graphs(pipe):
    """The base phase alone, then the residual phase along its path."""
    frames, made = pipe()
    assert made == BOTH
    with OnTheCpu():
        path = pipe.pipe.walk_base("walk", num_inference_steps=4)
    assert pipe.stub.calls.count("captured") == BOTH
    followed, made = pipe(trajectory=path)
    assert made == NOTHING
    assert np.array_equal(followed, frames)


def test_overlapped_phases_keep_their_graphs(pipe):
    """Of each phase and of both; one after the other, the residual phase reads another path."""
    frames, made = pipe(overlap_phases=True)
    assert made == 3
    other, made = pipe("jump", overlap_phases=True, base_seed=5)
    assert made == NOTHING
    again, made = pipe(overlap_phases=True)
    assert made == NOTHING
    assert np.array_equal(again, frames)
    assert not np.array_equal(other, frames)
    assert pipe()[1] == RESIDUAL


def test_both_phases_graph_goes_with_the_base_network(pipe):
    """It reads that network's weights, and must not outlive them."""
    pipe(overlap_phases=True)
    loops = loops_of(pipe.pipe)
    (both,) = loops["residual"].beside.values()
    both.graph.call = None  # the stub's graph holds the loops, a real one their addresses
    pipe.pipe._session.release("base")
    del loops["base"]
    gc.collect()
    assert len(loops["residual"].beside) == 0
    assert pipe(overlap_phases=True)[1] == 3


def test_replaced_weights_and_switches_are_captured_anew(pipe, monkeypatch):
    assert pipe()[1] == BOTH
    layer = networks_of(pipe.pipe)["residual"].unet
    layer = getattr(layer, "unet", layer).time_embedding[-1]
    layer.bias = nn.Parameter(layer.bias + 0.5, requires_grad=False)
    assert pipe()[1] == RESIDUAL
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "cpu")
    assert pipe()[1] == BOTH


def test_a_base_network_that_is_let_go_is_captured_again(pipe):
    assert pipe(offload_base=True)[1] == BOTH
    assert pipe(offload_base=True)[1] == 1
