"""vfengine/sampling/api.py: both forms against a plain float64 Algorithm 2; the base frame."""

import math

import pytest
import torch
from toy_models import SCHEDULE, WALK, Counted, base_model, diffusers_ddim, noise_of, residual_model

from vfengine.diffusion.decompose import frame_weights
from vfengine.diffusion.noise import base_noise, decomposed_noise, residual_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import SOLVERS
from vfengine.sampling.api import sample, sample_base


def algorithm_2(noise, lam, steps, eta=0.0, base_seed=0, residual_seed=1):
    """Algorithm 2 (η = 0) and Algorithm 1 (η = 1), frame by frame in float64, from the formulas."""
    batch, frames = noise.residual.shape[:2]
    share = frame_weights(lam, frames).double().tolist()
    m = frames // 2
    timesteps = SCHEDULE.timesteps(steps).tolist()
    z = [
        math.sqrt(share[i]) * noise.base + math.sqrt(1 - share[i]) * noise.residual[:, i]
        for i in range(frames)
    ]
    for k, t in enumerate(timesteps):
        a = SCHEDULE.alphas_cumprod[t].item()
        p = SCHEDULE.alphas_cumprod[timesteps[k + 1]].item() if k + 1 < steps else 1.0
        sigma = eta * math.sqrt((1 - p) / (1 - a)) * math.sqrt(1 - a / p)
        when = torch.full((batch,), t)
        b = base_model(z[m], when)
        removed = [z[i] - math.sqrt(share[i]) * math.sqrt(1 - a) * b for i in range(frames)]
        r = residual_model(torch.stack(removed, 1), when)
        xi_b, xi_r = decomposed_noise(
            noise.residual.shape, base_seed, residual_seed, step=k + 1, dtype=torch.float64
        )
        for i in range(frames):
            common, own = math.sqrt(share[i]), math.sqrt(1 - share[i])
            eps = common * b + own * r[:, i]
            x = (z[i] - math.sqrt(1 - a) * eps) / math.sqrt(a)
            z[i] = math.sqrt(p) * x + math.sqrt(1 - p - sigma**2) * eps
            z[i] = z[i] + sigma * (common * xi_b + own * xi_r[:, i])
    return torch.stack(z, 1)


# -- both forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "lam"),
    [
        ((2, 1, 1, 4, 4), 0.5),
        ((1, 2, 3, 5, 7), 0.0),
        ((2, 2, 1, 5, 7), 1.0),
        ((1, 3, 2, 1, 1), [0.1, 0.2, 0.9]),
        ((2, 16, 1, 5, 7), 0.1),
        ((1, 16, 3, 8, 8), torch.linspace(0, 1, 16)),
    ],
)
def test_both_forms_equal_algorithm_2(shape, lam, eta, method):
    noise = noise_of(shape)
    expected = algorithm_2(noise, lam, 8, eta)
    video = sample(base_model, residual_model, *noise, lam=lam, eta=eta, method=method, **WALK)
    assert video.shape == shape
    assert video.dtype == torch.float64
    assert (video - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fp32_equals_algorithm_2_to_1e_5(eta, method):
    shape = (1, 16, 3, 5, 7)
    expected = algorithm_2(noise_of(shape), 0.5, 8, eta)
    noise = noise_of(shape, torch.float32)
    video = sample(base_model, residual_model, *noise, lam=0.5, eta=eta, method=method, **WALK)
    assert video.dtype == torch.float32
    assert (video - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_forms_are_equal_for_every_solver(solver, spacing, steps):
    walk = {
        "schedule": SCHEDULE,
        "num_inference_steps": steps,
        "solver": solver,
        "spacing": spacing,
        "lam": [0.3, 0.8, 0.5, 0.0],
    }
    noise = noise_of((2, 4, 1, 3, 5))
    forms = [
        sample(base_model, residual_model, *noise, method=method, **walk)
        for method in ("two_phase", "interleaved")
    ]
    assert (forms[0] - forms[1]).abs().max() <= 1e-11 * forms[1].abs().max()


def test_ddpm_is_algorithm_1_over_all_steps():
    schedule = NoiseSchedule.linear(30, 1e-3, 0.2)
    noise = noise_of((1, 3, 1, 4, 4))
    walk = {"schedule": schedule, "num_inference_steps": 30, "lam": 0.5}
    video = sample(base_model, residual_model, *noise, solver="ddpm", **walk)

    z, share = noise.combine(0.5), [0.5, 1.0, 0.5]
    betas = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1), schedule.alphas_cumprod[:-1]])
    for k, t in enumerate(range(29, -1, -1)):
        alpha, bar = 1 - betas[t], schedule.alphas_cumprod[t]
        bar_p = schedule.alphas_cumprod[t - 1] if t > 0 else torch.tensor(1.0)
        when = torch.tensor([t])
        b = base_model(z[:, 1], when)
        removed = [z[:, i] - math.sqrt(share[i]) * (1 - bar).sqrt() * b for i in range(3)]
        r = residual_model(torch.stack(removed, 1), when)
        xi = decomposed_noise(z.shape, 0, 1, step=k + 1, dtype=z.dtype)
        for i in range(3):
            common, own = math.sqrt(share[i]), math.sqrt(1 - share[i])
            eps = common * b + own * r[:, i]
            mean = (z[:, i] - (1 - alpha) / (1 - bar).sqrt() * eps) / alpha.sqrt()
            sigma = ((1 - bar_p) / (1 - bar) * (1 - alpha)).sqrt()  # a standard deviation
            z[:, i] = mean + sigma * (common * xi.base + own * xi.residual[:, i])
    assert (video - z).abs().max() <= 1e-10 * z.abs().max()


@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
def test_ddpm_keeps_unit_variance_on_gaussian_data(method):
    """x_i = √λ x_m + √(1-λ) Δ_i with x_m, Δ_i ~ N(0, I): the exact estimates are √(1-ᾱ) times z_m
    and times the residual part v of z' = √λ d + √(1-λ) v; samples keep the law of the data."""
    lam, frames = 0.36, 3
    schedule = NoiseSchedule.linear(200, 5e-4, 0.1)

    def exact_base(z, t):
        return schedule.signal_and_noise(t, z)[1] * z

    def exact_residual(z, t):
        v = (z - math.sqrt(lam) * z[:, 1:2]) / math.sqrt(1 - lam)
        return schedule.signal_and_noise(t, z)[1] * v

    noise = noise_of((2, frames, 1, 64, 64), torch.float32)
    video = sample(
        exact_base,
        exact_residual,
        *noise,
        schedule=schedule,
        num_inference_steps=200,
        lam=lam,
        solver="ddpm",
        method=method,
    )
    x = video.transpose(0, 1).flatten(1).double()
    root = math.sqrt(lam)
    expected = torch.tensor([[1, root, lam], [root, 1, root], [lam, root, 1]]).double()
    assert (x @ x.T / x.shape[1] - expected).abs().max() < 0.05


# -- the base frame --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_base_frame_equals_diffusers_ddim_on_the_image(eta):
    scheduler = diffusers_ddim(20)
    noise = noise_of((2, 5, 3, 5, 7))
    z = noise.base
    for k, t in enumerate(scheduler.timesteps):
        xi = base_noise(z.shape, 0, step=k + 1, dtype=z.dtype)
        z = scheduler.step(
            base_model(z, t.expand(2)), int(t), z, eta=eta, variance_noise=xi
        ).prev_sample
    for method in ("two_phase", "interleaved"):
        video = sample(
            base_model,
            residual_model,
            *noise,
            schedule=SCHEDULE,
            num_inference_steps=20,
            eta=eta,
            method=method,
        )
        assert (video[:, 2] - z).abs().max() <= 1e-10 * z.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_base_frame_is_unchanged_by_residual_seed_lam_and_frames(eta, dtype):
    base = base_noise((2, 3, 5, 7), 0, dtype=dtype)
    path = sample_base(base_model, base, eta=eta, **WALK)
    for frames, lam, seed in ((1, 0.5, 1), (2, 0.0, 2), (5, 1.0, 3), (16, 0.3, 4)):
        r = residual_noise((2, frames, 3, 5, 7), seed, dtype=dtype)
        for method in ("two_phase", "interleaved"):
            video = sample(
                base_model,
                residual_model,
                base,
                r,
                lam=lam,
                eta=eta,
                method=method,
                residual_seed=seed,
                **WALK,
            )
            assert video.dtype == dtype
            assert torch.equal(video[:, frames // 2], path.final.to(dtype)), (frames, method)


@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
def test_base_network_sees_one_frame_per_clip_once_per_step(method):
    base, residual = Counted(base_model), Counted(residual_model)
    sample(base, residual, *noise_of((2, 16, 1, 4, 4)), method=method, **WALK)
    assert base.shapes == [(2, 1, 4, 4)] * 8
    assert residual.shapes == [(2, 16, 1, 4, 4)] * 8
    expected = [[t, t] for t in SCHEDULE.timesteps(8).tolist()]
    assert base.timesteps == residual.timesteps == expected


def test_two_phase_finishes_the_base_frame_first():
    order = []
    sample(
        lambda z, t: order.append("base") or base_model(z, t),
        lambda z, t: order.append("residual") or residual_model(z, t),
        *noise_of((1, 2, 1, 4, 4)),
        **WALK,
    )
    assert order == ["base"] * 8 + ["residual"] * 8
