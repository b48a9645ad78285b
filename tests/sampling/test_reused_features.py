"""Loops that reuse features: which steps are whole, places of windows, graphs, phases at once."""

import fake_cuda
import numpy as np
import pytest
import torch
from held import loops_of, networks_of
from seeded import normal
from stub_cuda import OnTheCpu, pretended, stub_with_loops
from test_capture import (
    CONFIGS,
    STEPS,
    Networks,
    cuda_guard,  # noqa: F401  a fixture
    fake_loop,
    without_gradients,
)
from toy_models import SCHEDULE

from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.solvers import solver_table
from vfengine.pipelines.videofusion import VideoFusionPipeline
from vfengine.sampling.driver import Driver
from vfengine.sampling.features import Kept
from vfengine.sampling.guidance import ModelSpec
from vfengine.sampling.interleaved import InterleavedLoop, InterleavedSpec
from vfengine.sampling.loop import LoopSpec
from vfengine.sampling.run import Run
from vfengine.training.objectives import build_networks


def keeping(z, t, kept):
    """A network whose features are its input, as it was when they were kept."""
    keeping.calls.append(kept.shallow)
    return 0.5 * kept.exchange(z.clone())


def steps_of(reuse_every, shape=(1, 3, 1, 2, 2), **more):
    keeping.calls, model = [], ModelSpec(keeping).build(torch.device("cpu"))
    table = solver_table("ddim", SCHEDULE, 8)
    more["reuse_every"] = reuse_every
    out = Driver().video(model, normal(*shape), table, NoisePlace(0), Run(), **more)
    return out, keeping.calls


@pytest.mark.parametrize(
    ("every", "whole"), [(2, [0, 2, 4, 6]), (3, [0, 3, 6]), (8, [0]), (20, [0])]
)
def test_every_nth_step_is_whole(every, whole):
    _, calls = steps_of(every)
    assert [k for k, shallow in enumerate(calls) if not shallow] == whole
    assert len(calls) == 8


@pytest.mark.parametrize("loop", [False, True])
def test_each_window_keeps_its_own_features(loop):
    """A model of windows that mixes nothing gives every frame what it gives the whole clip."""
    shape = (1, 7, 1, 2, 2)
    windowed, calls = steps_of(3, shape, windows=(4, 2), loop=loop)
    whole, _ = steps_of(3, shape)
    assert len(calls) > 16
    assert torch.allclose(windowed, whole, atol=1e-5)


def test_models_that_keep_nothing_are_called_as_ever():
    noise, table = normal(1, 3, 1, 2, 2), solver_table("ddim", SCHEDULE, 4)
    Driver().video(lambda z, t: z, noise, table, NoisePlace(0), Run())
    with pytest.raises(ValueError, match="reuse_every must be an int of at least 1, got 0"):
        Driver().video(keeping, noise, table, NoisePlace(0), Run(), reuse_every=0)


def test_the_interleaved_method_refuses_it_by_name():
    noise = normal(1, 3, 1, 2, 2)
    given = noise, solver_table("ddim", SCHEDULE, 4), NoisePlace(0)
    more = {"base": LoopSpec.of(noise[:, 0], *given[1:]), "lam": 0.5, "reuse_every": 2}
    with pytest.raises(ValueError, match="the interleaved method reuses no features"):
        InterleavedLoop(keeping, keeping, InterleavedSpec.of(*given, **more))


# -- pipelines -------------------------------------------------------------------------------------

WALK = {"num_inference_steps": 6, "base_path": "stepwise"}
REUSE = {"base": 2, "residual": 3}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipe = VideoFusionPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)
    pipe.keep_parts()
    return pipe


def test_one_reuses_nothing(pipe):
    """The same programs, and so the same bits."""
    plain = pipe("walk", **WALK).frames
    programs = {name: list(network.unet._programs) for name, network in networks_of(pipe).items()}
    assert np.array_equal(pipe("walk", **WALK, reuse_every=1).frames, plain)
    for name, network in networks_of(pipe).items():
        assert list(network.unet._programs) == programs[name]
    assert not np.array_equal(pipe("walk", **WALK, reuse_every=2).frames, plain)


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_clips_do_not_depend_on_their_batch(pipe, solver):
    settings = {**WALK, "solver": solver, "reuse_every": REUSE}
    both = pipe("walk", num_videos=2, **settings).frames
    assert np.array_equal(pipe("walk", sample_offset=1, **settings).frames, both[1:])
    along = pipe("walk", num_residuals=2, **settings).frames
    assert np.array_equal(along[:1], both[:1])


def test_phases_at_once_reuse_as_they_do_one_after_the_other(pipe):
    plain = pipe("walk", **WALK, reuse_every=REUSE).frames
    assert np.array_equal(
        pipe("walk", **WALK, reuse_every=REUSE, overlap_phases=True).frames, plain
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_a_whole_and_a_shallow_graph_take_turns(monkeypatch, tiny_checkpoint, overlap):
    stub = stub_with_loops(monkeypatch)
    settings = {**WALK, "reuse_every": REUSE, "overlap_phases": overlap}
    pipe, plain = pretended(stub, tiny_checkpoint, "walk", **settings)
    settings["offload_base"] = False
    with OnTheCpu():
        for _ in range(2):
            assert np.array_equal(pipe("walk", **settings).frames, plain)
    assert stub.calls.count("capture thread_local") == 4
    assert [loops_of(pipe)[phase].reuse_every for phase in REUSE] == [2, 3]
    assert not stub.problems


def test_a_shallow_step_can_be_captured(cuda_guard):  # noqa: F811
    """It reads the features where the last whole step left them, window by window."""
    by_name = {"base": None, "video": None, **build_networks(CONFIGS["pixels"])}
    by_name["residual"].bfloat16().eval().requires_grad_(False)
    networks = Networks("pixels", by_name)
    loop, buffers = fake_loop("windows", networks, solver_table("ddim", SCHEDULE, STEPS))
    loop.kept = Kept()
    whole = fake_cuda.audit(without_gradients(loop.step), buffers, calls=1)
    buffers |= {f"deep.{k}": loop.kept.part(k).deep for k in range(2)}
    shallow = fake_cuda.audit(without_gradients(lambda: loop.step(shallow=True)), buffers, calls=2)
    assert shallow.clean, shallow
    assert shallow.ops[0] == shallow.ops[1]
    assert len(shallow.ops[0]) < len(whole.ops[0]) / 2
