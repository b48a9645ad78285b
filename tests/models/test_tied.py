"""Generators in a loop (vfengine/models/tied.py) estimate what their forward does, by two ops."""

import fake_cuda
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import solver_table
from vfengine.models import (
    BaseGenerator,
    PretrainedGenerator,
    ResidualGenerator,
    UNet,
    UNetConfig,
    VideoGenerator,
    tied,
)
from vfengine.plan.cuda import CudaUNet
from vfengine.sampling.guidance import ModelSpec
from vfengine.sampling.in_loop import Steps
from vfengine.sampling.two_phase import BaseSpec, Motion, PathSpec, ResidualSpec

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
STEPS = 4
CPU = torch.device("cpu")
SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": (1, 1),
    "spatial_attention": (False, True),
    "temporal_attention": (False, False),
    "temporal_conv": (False, False),
    "norm_groups": 4,
    "head_dim": 8,
    "num_classes": 5,
    "patch_size": 2,
}
OF_CLIPS = {"temporal_attention": (False, True), "frame_embedding": True}
PROMPTED = {"num_classes": None, "context_dim": 12, "patch_size": 1}
SHAPES = {
    "image": (2, 3, 12, 8),
    "clip": (2, 5, 3, 12, 8),
    "latent image": (2, 8, 6, 4),
    "latent clip": (2, 5, 8, 6, 4),
}
KINDS = {
    "base": ("image", lambda: BaseGenerator(network(out_channels=4), SCHEDULE)),
    "epsilon": ("image", lambda: PretrainedGenerator(network(patch_size=1), SCHEDULE)),
    "v": ("image", lambda: PretrainedGenerator(network(), SCHEDULE, "v_prediction")),
    "no_labels": ("image", lambda: PretrainedGenerator(network(num_classes=None), SCHEDULE)),
    "video": (
        "clip",
        lambda: VideoGenerator(
            network(out_channels=4, temporal_attention=(False, True), patch_size=1), SCHEDULE
        ),
    ),
    "residual": (
        "clip",
        lambda: ResidualGenerator(
            network(in_channels=6, out_channels=6, **OF_CLIPS), SCHEDULE, lam=0.5
        ),
    ),
    "told base": (
        "image",
        lambda: BaseGenerator(network(out_channels=4, guidance_embedding=True), SCHEDULE),
    ),
    "told residual": (
        "clip",
        lambda: ResidualGenerator(
            network(in_channels=6, out_channels=6, guidance_embedding=True, **OF_CLIPS),
            SCHEDULE,
            lam=0.5,
        ),
    ),
    "prompted base": (
        "latent image",
        lambda: BaseGenerator(network(in_channels=8, out_channels=9, **PROMPTED), SCHEDULE, 1.0),
    ),
    "prompted residual": (
        "latent clip",
        lambda: ResidualGenerator(
            network(in_channels=16, out_channels=11, **PROMPTED, **OF_CLIPS), SCHEDULE, lam=0.5
        ),
    ),
}
pytestmark = pytest.mark.usefixtures("references")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def references(monkeypatch):
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")


def network(**changes) -> UNet:
    """A UNet whose weights are all random, those of its last layer too."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**{**SMALL, **changes})).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return unet


def pair(kind: str, scale: float = 2.0, dtype: torch.dtype = torch.float32):
    """A guided generator, and the same with its UNet in the form for CUDA."""
    shape, make = KINDS[kind]
    told = {"guidance": scale} if "told" in kind else {}
    scale = 1.0 if told else scale
    given = torch.tensor([3, 1, *([5, 5] if scale != 1.0 else [])])
    lam = (0.25, 0.5, 1.0, 0.0, 1.0) if "residual" in kind else None
    prompted, models = "prompted" in kind, []
    rows = torch.randn(len(given), 7, 12, generator=torch.Generator().manual_seed(2))
    for fast in (False, True):
        generator = make()
        generator.unet = CudaUNet(generator.unet, dtype) if fast else generator.unet.to(dtype)
        labels = given if generator.takes_labels and not prompted else None
        spec = ModelSpec(generator, labels, scale, lam, rows if prompted else None, **told)
        models.append(spec.build(CPU))
    return SHAPES[shape], *models


def steps_of(shape, dtype=torch.float32) -> Steps:
    timesteps = solver_table("ddim", SCHEDULE, STEPS).timesteps
    return Steps(timesteps, torch.zeros(1, dtype=torch.int32), torch.Size(shape), dtype)


def noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@every_kind
@pytest.mark.parametrize("scale", [1.0, 2.0])
@torch.inference_mode()
def test_estimates_of_every_step_are_those_of_forward(kind, scale):
    shape, plain, fast = pair(kind, scale)
    steps = steps_of(shape)
    model = fast.in_loop(steps)
    assert plain.in_loop(steps) is None
    model.start()
    z = noise(shape)
    for row, timestep in enumerate(steps.timesteps):
        steps.counter.fill_(row)
        t = timestep.repeat(shape[0])
        out = model(z, t)
        assert out.shape == z.shape
        assert out.is_contiguous()
        assert_close(out, plain(z, t))


@torch.inference_mode()
def test_start_reads_the_labels_that_hold_now():
    shape, plain, fast = pair("residual")
    steps = steps_of(shape)
    model, z = fast.in_loop(steps), noise(shape)
    t = steps.timesteps[:1].repeat(2)
    results = []
    for labels in ((3, 1), (0, 4)):
        for guided in (plain, fast):
            guided.set_labels(torch.tensor([*labels, 5, 5]))
        model.start()
        results.append(model(z, t))
        assert_close(results[-1], plain(z, t))
    assert not torch.allclose(*results)


@pytest.mark.parametrize("kind", ["base", "residual"])
@torch.inference_mode()
def test_modulation_that_is_too_large_is_computed_step_by_step(kind, monkeypatch):
    shape, _, fast = pair(kind)
    steps, z = steps_of(shape), noise(shape)
    ahead = fast.in_loop(steps)
    ahead.start()
    monkeypatch.setattr(tied, "MAX_BYTES", ahead.modulation.nbytes - 1)
    model = fast.in_loop(steps)
    model.start()
    assert model.modulation is None
    for row in range(STEPS):
        steps.counter.fill_(row)
        t = steps.timesteps[row].repeat(shape[0])
        assert_close(model(z, t), ahead(z, t))


def test_clips_in_float64_and_other_networks_are_not_tied():
    shape, _, fast = pair("base")
    assert fast.in_loop(steps_of(shape, torch.float64)) is None
    assert ModelSpec(lambda z, t: z).build(CPU).in_loop(steps_of(shape)) is None


@every_kind
def test_clips_that_the_network_does_not_take_are_refused_as_by_forward(kind):
    shape, plain, fast = pair(kind)
    odd = (*shape[:-1], 7)
    with pytest.raises(ValueError, match="must be multiples of") as refused:
        plain(torch.zeros(odd), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be multiples of") as refused_too:
        fast.in_loop(steps_of(odd))
    assert str(refused.value) == str(refused_too.value)


# -- whole loops -----------------------------------------------------------------------------------


def loop_of(kind: str, model, shape, window=None, cycle=False, reuse_every=1):
    table, place = solver_table("ddim", SCHEDULE, STEPS), NoisePlace(0)
    start = noise(shape)
    with torch.inference_mode():
        how = {"reuse_every": reuse_every}
        if kind == "base":
            return BaseSpec.of(start, table, place, **how).build(model), start
        if kind == "video":
            return ResidualSpec.of(start, table, place, **how).build(model), start
        states = noise((STEPS + 1, shape[0], *shape[2:]))
        motion, path = Motion(0.5, window, loop=cycle), PathSpec.of(states, shared=True)
        spec = ResidualSpec.of(start, table, place, motion=motion, path=path, **how)
        return spec.build(model), start


@pytest.mark.parametrize(
    ("kind", "frames", "window", "cycle", "reuse_every"),
    [
        ("base", 0, None, False, 1),
        ("base", 0, None, False, 2),
        ("video", 5, None, False, 1),
        ("residual", 5, None, False, 1),
        ("residual", 8, (5, None), False, 1),
        ("residual", 8, (5, None), False, 2),
        ("residual", 8, (5, None), True, 1),
    ],
)
@torch.inference_mode()
def test_loops_give_the_results_of_generic_ones(kind, frames, window, cycle, reuse_every):
    shape, *models = pair(kind)
    shape = (shape[0], frames, *shape[2:]) if frames else shape
    results = []
    for model in models:
        loop, start = loop_of(kind, model, shape, window, cycle, reuse_every)
        for _ in range(2):  # the second run of the same loop is the first again
            loop.start(start)
            loop.run(loop.stepper(capture=False))
            results.append((loop.states if kind == "base" else loop.u).clone())
    assert torch.equal(results[2], results[3])
    assert_close(results[2], results[0])


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_captured_and_runs_three_ops_around_the_layers(kind, cuda_guard):
    shape, guided, _ = pair(kind)
    like = "residual" if "residual" in kind else "video" if len(shape) == 5 else "base"
    loop, _ = loop_of(like, lambda z, t: z, shape)
    generator, mode, memo = guided.network, FakeTensorMode(), {}
    if guided.context is not None:
        guided.context = guided.context.bfloat16()  # as the text encoder makes it there
    for part in (loop, guided, generator):
        fake_cuda.to_fake_cuda(part, mode, memo)
    with mode, torch.inference_mode():
        generator.unet = CudaUNet(generator.unet, torch.bfloat16)
        steps = Steps(loop.timesteps, loop.counter, torch.Size(shape), torch.float32)
        loop.model = guided.in_loop(steps)
        loop.model.start()
        loop.step()  # position biases are made once
    report = fake_cuda.audit(torch.inference_mode()(loop.step), vars(loop) | vars(loop.model))
    assert report.clean, report
    z, t = (loop.z.view(shape), loop.t) if like == "base" else (loop.u, loop.t)
    model = torch.inference_mode()(lambda: loop.model(z, t))
    launched = fake_cuda.launched(fake_cuda.audit(model, {"z": z}).ops[0])
    before, after = ["vfengine.model_input.default", "aten.index_select.default"], launched[-1]
    assert launched[:2] == before
    assert after == "vfengine.noise_estimate.default"
    of_context = {"aten.to.dtype", "aten.repeat_interleave.self_int"}  # its dtype; to all frames
    allowed = {"aten.cat.default"} | (of_context if "prompted" in kind else set())
    assert {op for op in launched[2:] if op.startswith("aten.")} <= allowed
