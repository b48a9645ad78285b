"""Loops driven otherwise than one phase after the other; and plain video diffusion."""

import threading

import pytest
import torch
from toy_models import SCHEDULE, WALK, base_model, diffusers_ddim, noise_of, residual_model

from vfengine.diffusion.noise import NoisePlace, residual_noise
from vfengine.diffusion.solvers import solver_table
from vfengine.sampling.api import sample, sample_video
from vfengine.sampling.overlap import run_overlapped
from vfengine.sampling.two_phase import (
    BaseLoop,
    BaseSpec,
    Motion,
    PathSpec,
    ResidualLoop,
    ResidualSpec,
)


def loops_of(noise, table, *, shared: bool) -> tuple[BaseLoop, ResidualLoop]:
    """Both phases' loops; shared: the second reads the path in the memory of the first."""
    base = BaseSpec.of(noise.base, table, NoisePlace(0)).build(base_model)
    path = PathSpec.of(base.states, shared=shared)
    spec = ResidualSpec.of(noise.residual, table, NoisePlace(1), motion=Motion(0.5), path=path)
    return base, spec.build(residual_model)


# -- both phases at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("unipc", 0.0)])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_overlapped_phases_give_the_same_bits(steps, solver, eta, dtype):
    noise = noise_of((2, 4, 3, 5, 7), dtype)
    walk = {**WALK, "num_inference_steps": steps, "solver": solver, "eta": eta}
    expected = sample(base_model, residual_model, *noise, **walk)
    video = sample(base_model, residual_model, *noise, overlap_phases=True, **walk)
    assert torch.equal(video, expected)


def test_overlapped_phases_share_autocast():
    """Which is a thread's own; the base network must run in it as its caller does."""
    layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def base(z, t):
        return layer(z)

    noise = noise_of((1, 3, 1, 8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(base, residual_model, *noise, **WALK)
        video = sample(base, residual_model, *noise, overlap_phases=True, **WALK)
    assert torch.equal(video, expected)
    assert not torch.equal(sample(base, residual_model, *noise, **WALK), expected)


def test_overlapped_base_phase_runs_ahead_in_a_thread_of_its_own():
    """The base network's last call comes before the residual network's first: it never waits."""
    done, threads = threading.Event(), set()

    def base(z, t):
        threads.add(threading.get_ident())
        if t[0] == SCHEDULE.timesteps(8)[-1]:
            done.set()
        return base_model(z, t)

    def residual(z, t):
        assert done.wait(60)
        threads.add(threading.get_ident())
        return residual_model(z, t)

    noise = noise_of((1, 2, 1, 4, 4))
    video = sample(base, residual, *noise, overlap_phases=True, **WALK)
    assert len(threads) == 2
    assert torch.equal(video, sample(base_model, residual_model, *noise, **WALK))


@pytest.mark.parametrize("late", ["base", "residual"])
def test_overlapped_phases_raise_what_a_network_raises(late):
    calls = {"base": 0, "residual": 0}

    def failing(name, model):
        def call(z, t):
            calls[name] += 1
            if name == late and calls[name] == 3:
                raise ArithmeticError(f"the {name} network broke")
            return model(z, t)

        return call

    models = failing("base", base_model), failing("residual", residual_model)
    with pytest.raises(ArithmeticError, match=f"the {late} network broke"):
        sample(*models, *noise_of((1, 2, 1, 4, 4)), overlap_phases=True, **WALK)
    assert calls[late] == 3


def test_overlapped_phases_report_every_step():
    calls = []
    noise = noise_of((1, 2, 1, 4, 4))
    sample(
        base_model,
        residual_model,
        *noise,
        overlap_phases=True,
        callback=lambda *call: calls.append(call),
        **WALK,
    )
    for phase in ("base", "residual"):
        assert [c for c in calls if c[0] == phase] == [(phase, k + 1, 8) for k in range(8)]
    for k in range(8):  # a step behind
        ahead = ("base", min(k + 2, 8), 8)
        assert calls.index(ahead) < calls.index(("residual", k + 1, 8))


def test_the_path_may_cross_from_one_memory_to_another():
    """As it does from one device to another: a row a step, the same bits."""
    noise = noise_of((1, 3, 1, 4, 4))
    table = solver_table("ddim", SCHEDULE, 8)
    with torch.inference_mode():
        base, residual = loops_of(noise, table, shared=False)
        run_overlapped(base, residual, *noise)
    assert torch.equal(residual.u, sample(base_model, residual_model, *noise, **WALK))
    assert torch.equal(residual.states, base.states)


def test_loops_can_be_started_again():
    """With other noise and the same buffers, as the pipeline does; nothing is left of the first."""
    table = solver_table("unipc", SCHEDULE, 8)
    first, second = noise_of((1, 3, 1, 4, 4)), noise_of((1, 3, 1, 4, 4), seeds=(5, 6))
    walk = {**WALK, "solver": "unipc"}
    with torch.inference_mode():
        base, residual = loops_of(first, table, shared=True)
        for noise in (first, second, first):
            for loop, start in ((base, noise.base), (residual, noise.residual)):
                loop.start(start)
                loop.run(loop.stepper(capture=True))
            assert torch.equal(residual.u, sample(base_model, residual_model, *noise, **walk))


def test_rejects_two_phases_at_once_in_the_interleaved_form():
    with pytest.raises(ValueError, match="overlap_phases"):
        sample(
            base_model,
            residual_model,
            *noise_of((1, 2, 1, 4, 4)),
            method="interleaved",
            overlap_phases=True,
            **WALK,
        )


# -- plain video diffusion -------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_video_model_equals_diffusers_ddim(eta):
    scheduler = diffusers_ddim(20)
    noise = residual_noise((2, 5, 3, 5, 7), 3, dtype=torch.float64)
    z = noise
    for k, t in enumerate(scheduler.timesteps):
        xi = residual_noise(z.shape, 4, step=k + 1, dtype=z.dtype)
        eps = residual_model(z, t.expand(2))
        z = scheduler.step(eps, int(t), z, eta=eta, variance_noise=xi).prev_sample
    calls = []
    video = sample_video(
        residual_model,
        noise,
        schedule=SCHEDULE,
        num_inference_steps=20,
        eta=eta,
        seed=4,
        callback=lambda *call: calls.append(call),
    )
    assert (video - z).abs().max() <= 1e-10 * z.abs().max()
    assert calls == [("video", k + 1, 20) for k in range(20)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": torch.zeros(1, 3, 4, 4)}, ValueError, "residual_noise must be"),
        ({"noise": torch.zeros(1, 2, 3, 4, 4).int()}, TypeError, "residual_noise"),
        ({"seed": -1}, ValueError, "seed"),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"model": lambda z, t: z[:, :1]}, ValueError, "model must return"),
    ],
)
def test_video_rejects(change, error, message):
    arguments = {"model": residual_model, "noise": torch.zeros(1, 2, 1, 4, 4), **WALK, **change}
    with pytest.raises(error, match=message):
        sample_video(**arguments)
