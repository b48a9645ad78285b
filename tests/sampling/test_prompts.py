"""Networks under prompts (sampling/guidance.py): guidance, kept loops, and the form for CUDA."""

import fake_cuda
import pytest
import torch
from seeded import filled, normal
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import solver_table
from vfengine.models import PretrainedGenerator, UNet, UNetConfig
from vfengine.plan.cuda import CudaUNet
from vfengine.plan.network import PlannedUNet
from vfengine.sampling.driver import Driver
from vfengine.sampling.guidance import ModelSpec, prompted
from vfengine.sampling.in_loop import Steps
from vfengine.sampling.reuse import KeptLoops
from vfengine.sampling.run import Run
from vfengine.sampling.two_phase import Motion, ResidualSpec

SCHEDULE = NoiseSchedule.scaled_linear(1000)
CPU = torch.device("cpu")
SHAPE = (2, 5, 4, 8, 8)
CONFIG = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=(1, 1),
    spatial_attention=(True, False),
    temporal_attention=(True, False),
    temporal_conv=(True, True),
    norm_groups=4,
    head_dim=8,
    num_classes=None,
    patch_size=1,
    context_dim=12,
    needs_context=True,
)


def network(prediction_type="epsilon", form=None) -> PretrainedGenerator:
    """A generator of clips under a context; form: what takes its UNet's place."""
    unet = filled(UNet(CONFIG)).requires_grad_(False)
    unet = unet if form is None else form(unet, torch.float32)
    return PretrainedGenerator(unet, SCHEDULE, prediction_type).eval()


def prompts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(2, 7, 12, seed=seed), normal(2, 7, 12, seed=seed + 1)


@pytest.mark.parametrize("form", [None, PlannedUNet])
@torch.inference_mode()
def test_guidance_is_its_formula(form):
    generator, z, t = network(form=form), normal(*SHAPE), torch.tensor([500, 20])
    context, negative = prompts(3)
    with_prompt, without = (generator(z, t, context=c) for c in (context, negative))
    out = prompted(generator, context, negative, 9.0).build(CPU)(z, t)
    assert not torch.allclose(with_prompt, without)
    torch.testing.assert_close(out, without + 9.0 * (with_prompt - without), rtol=1e-4, atol=1e-4)
    if form is PlannedUNet:  # one call on a doubled batch has the bits of two calls
        assert torch.equal(out, torch.lerp(without, with_prompt, 9.0))


@torch.inference_mode()
def test_nothing_is_guided_at_scale_one():
    generator, z, t = network(), normal(*SHAPE), torch.tensor([500, 20])
    context, negative = prompts(3)
    spec = prompted(generator, context, negative, 1.0)
    assert spec.scale == 1.0
    assert torch.equal(spec.build(CPU)(z, t), generator(z, t, context=context))


def test_prompts_of_other_shapes_are_refused():
    context, negative = prompts(3)
    with pytest.raises(ValueError, match=r"negative must be \[2, 7, 12\] as context"):
        prompted(network(), context, negative[:1], 9.0)


def test_models_are_told_apart_by_all_but_the_contexts_values():
    generator, (context, negative) = network(), prompts(3)
    spec = prompted(generator, context, negative, 9.0)
    assert spec == prompted(generator, *prompts(5), 9.0)
    for other in (
        prompted(generator, context, negative, 8.0),
        prompted(generator, context[:, :6], negative[:, :6], 9.0),
        prompted(generator, context.double(), negative.double(), 9.0),
        ModelSpec(generator, scale=9.0),
    ):
        assert other != spec


@torch.inference_mode()
def test_velocity_of_clips_becomes_noise():
    """v = √ᾱ ε - √(1-ᾱ) x, and so ε = √ᾱ v + √(1-ᾱ) z."""
    z, t, context = normal(*SHAPE), torch.tensor([500, 20]), prompts(3)[0]
    a = SCHEDULE.alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
    v = network()(z, t, context=context)
    found = network("v_prediction")(z, t, context=context)
    torch.testing.assert_close(found, a.sqrt() * v + (1 - a).sqrt() * z)


@pytest.mark.parametrize("windows", [None, (4, 2)])
def test_kept_loops_read_the_prompt_that_holds_now(windows):
    generator, loops, results = network(form=PlannedUNet), KeptLoops(), []
    table, noise = solver_table("ddim", SCHEDULE, 3, steps_offset=1), normal(*SHAPE)
    for seed in (3, 5, 3):
        spec = prompted(generator, *prompts(seed), 9.0)
        kept = Driver(loops=loops).video(spec, noise, table, NoisePlace(0), Run(), windows)
        model = spec.build(CPU)
        new = Driver().video(model, noise, table, NoisePlace(0), Run(), windows)
        assert torch.equal(kept, new)
        results.append((kept, loops.kept["video"].loop))
    assert results[0][1] is results[1][1] is results[2][1]
    assert torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][0], results[1][0])


# -- the form for CUDA -----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 9.0])
@torch.inference_mode()
def test_estimates_of_every_step_are_those_of_forward(scale, prediction_type, monkeypatch):
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")
    table, z = solver_table("ddim", SCHEDULE, 3), normal(*SHAPE)
    steps = Steps(table.timesteps, torch.zeros(1, dtype=torch.int32), z.shape, z.dtype)
    plain, fast = (
        prompted(network(prediction_type, form), *prompts(3), scale).build(CPU)
        for form in (None, CudaUNet)
    )
    tied = fast.in_loop(steps)
    tied.start()
    for seed in (3, 5):  # a prompt that comes later needs no new start
        for model in (plain, fast):
            model.set_context(torch.cat(prompts(seed)) if scale != 1.0 else prompts(seed)[0])
        for row, t in enumerate(table.timesteps):
            steps.counter.fill_(row)
            expected = plain(z, t.repeat(2))
            size = float(expected.abs().max())
            torch.testing.assert_close(tied(z, t.repeat(2)), expected, rtol=1e-4, atol=1e-4 * size)


def test_a_context_of_another_width_is_refused_as_by_forward(monkeypatch):
    wide = normal(2, 7, 13)
    model = ModelSpec(network(form=CudaUNet), context=wide).build(CPU)
    steps = Steps(torch.tensor([5]), torch.zeros(1, dtype=torch.int32), torch.Size(SHAPE), None)
    with pytest.raises(ValueError, match="given to a UNet with context_dim=12"):
        model.in_loop(steps)


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@pytest.mark.parametrize("windows", [None, (4, 2)])
@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_whole_loop_can_be_captured(solver, windows, cuda_guard):
    """No wait, no host copy, and on every step the same ops, with the context where it lies."""
    table = solver_table(solver, SCHEDULE, 3, steps_offset=1, set_alpha_to_one=False)
    generator = network()
    context = (prompt.bfloat16() for prompt in prompts(3))
    model = prompted(generator, *context, 9.0).build(CPU)
    spec = ResidualSpec.of(normal(*SHAPE), table, NoisePlace(0), motion=Motion(0.0, windows))
    with torch.inference_mode():
        loop = spec.build(model)
    mode, memo = FakeTensorMode(), {}
    for part in (loop, loop.model, model, generator):
        fake_cuda.to_fake_cuda(part, mode, memo)
    with mode, torch.inference_mode():
        generator.unet = CudaUNet(generator.unet, torch.bfloat16)
        frames = SHAPE[1] if windows is None else windows[0]
        shape = torch.Size((SHAPE[0], frames, *SHAPE[2:]))
        tied = model.in_loop(Steps(loop.timesteps, loop.counter, shape, torch.float32))
        tied.start()
        if windows is None:
            loop.model = tied
        else:
            loop.model.model = tied
        loop.step()  # what is made once and kept
    buffers = vars(loop) | {"context": model.context, "modulation": tied.modulation}
    buffers.pop("mix")
    report = fake_cuda.audit(torch.inference_mode()(loop.step), buffers, calls=3)
    assert report.clean, report
    assert tied.context is model.context
    assert all(ops == report.ops[0] for ops in report.ops)
