"""Numbers that are not finite end a call with an error that names phase, step and dtype."""

import pytest
import torch

import vfengine
from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.noise import NoisePlace, decomposed_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import solver_table
from vfengine.sampling.finite import NotFinite
from vfengine.sampling.two_phase import BaseSpec

SCHEDULE = NoiseSchedule.linear(10)
NOISE = decomposed_noise((2, 3, 1, 4, 4), 0, 1)
STEPS = {"schedule": SCHEDULE, "num_inference_steps": 4}


def breaks_at(step: int, value: float = torch.nan):
    """A model whose one number is `value` from this call on."""
    calls = []

    def model(z, t):
        calls.append(t)
        out = 0.1 * z
        if len(calls) >= step:
            out.view(-1)[3] = value
        return out

    return model


def fine(z, t):
    return 0.1 * z


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_phases_and_steps_are_named(value, step):
    """On a CPU the phase ends there."""
    done = []
    call = {**STEPS, "callback": lambda *report: done.append(report)}
    with pytest.raises(NotFinite, match=rf"base phase, step {step} of 4: .* in float32"):
        vfengine.sample_base(breaks_at(step, value), NOISE.base, **call)
    assert len(done) == step - 1
    with pytest.raises(NotFinite, match=f"video phase, step {step} of 4"):
        vfengine.sample_video(breaks_at(step, value), NOISE.residual, **STEPS)
    path = vfengine.sample_base(fine, NOISE.base, **STEPS)
    with pytest.raises(RuntimeError, match=f"residual phase, step {step} of 4"):
        vfengine.sample_residual(breaks_at(step, value), path, NOISE.residual)


@pytest.mark.parametrize(
    "settings", [{"method": "interleaved"}, {"overlap_phases": True}, {"base_path": "clean"}]
)
def test_each_way_of_both_phases(settings):
    name = "interleaved" if "method" in settings else "base"
    with pytest.raises(NotFinite, match=f"{name} phase, step 2 of 4"):
        vfengine.sample(breaks_at(2), fine, *NOISE, **STEPS, **settings)
    name = "interleaved" if "method" in settings else "residual"
    with pytest.raises(NotFinite, match=f"{name} phase, step 3 of 4"):
        vfengine.sample(fine, breaks_at(3), *NOISE, **STEPS, **settings)


def test_half_precision_says_what_to_try():
    noise = NOISE.residual.half()
    with pytest.raises(NotFinite, match=r"in float16; float16 holds no .* bfloat16 or float32"):
        vfengine.sample_video(lambda z, t: 1e6 * torch.ones_like(z), noise, **STEPS)
    wide = vfengine.sample_video(lambda z, t: 1e6 * torch.ones_like(z), noise.float(), **STEPS)
    assert bool(wide.isfinite().all())


def test_what_was_given_is_named():
    bad = NOISE.base.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^base_noise must be finite"):
        vfengine.sample_base(fine, bad, **STEPS)
    path = vfengine.sample_base(fine, NOISE.base, **STEPS)
    with torch.inference_mode():
        path.states[2, 0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^base path must be finite"):
        vfengine.sample_residual(fine, path, NOISE.residual)
    with pytest.raises(ValueError, match="x must be finite"):
        BaseTrajectory.from_image(bad, schedule=SCHEDULE, num_inference_steps=4)


def test_a_loop_looks_without_waiting():
    """The first bad step is found afterwards, of the steps that were looked at."""
    table = solver_table("ddim", SCHEDULE, 5)
    with torch.inference_mode():
        loop = BaseSpec.of(NOISE.base, table, NoisePlace(0)).build(breaks_at(2))
        loop.start(NOISE.base)
        for _ in range(5):
            loop.step()
        assert loop.first_not_finite() is None
        loop.look(5)
        assert loop.first_not_finite() == 5
        for done in (4, 1, 2, 3):
            loop.look(done)
        assert loop.first_not_finite() == 2
        loop.start(NOISE.base)
        assert loop.first_not_finite() is None
