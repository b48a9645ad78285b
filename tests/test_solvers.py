"""vfengine/solvers.py: the tables against the textbook updates and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from vfengine.schedule import SPACINGS, NoiseSchedule
from vfengine.solvers import SOLVERS, solver_table

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)


def eps_model(z: torch.Tensor, t: int) -> torch.Tensor:
    return 0.8 * torch.tanh(z) + 0.1 * math.sin(t / 100)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_predicts_the_clean_sample_and_diffuses_it_again(spacing, eta):
    """z_p = √ᾱ_p x̂ + √(1-ᾱ_p-σ²) ε + σ ξ with x̂ = (z - √(1-ᾱ_t) ε)/√ᾱ_t; Song et al., eq. 12."""
    table = solver_table("ddim", SCHEDULE, 25, eta, spacing)
    z, eps, xi = 0.7, -0.4, 1.3
    for k in range(25):
        a, p = table.alphas_cumprod[k : k + 2].tolist()
        sigma = eta * math.sqrt((1 - p) / (1 - a) * (1 - a / p))
        x = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        expected = math.sqrt(p) * x + math.sqrt(1 - p - sigma**2) * eps + sigma * xi
        c1, c2, s = table.coeffs[k].tolist()
        assert c1 * z + c2 * eps + s * xi == pytest.approx(expected, abs=1e-12)
    assert p == 1.0
    assert sigma == 0.0


def test_ddpm_is_algorithm_1():
    """μ = z/√α_t - (1-α_t)/(√(1-ᾱ_t) √α_t) ε and σ² = (1-ᾱ_p)/(1-ᾱ_t) (1-α_t), for all t."""
    table = solver_table("ddpm", SCHEDULE, 1000)
    a, p = table.alphas_cumprod[:-1], table.alphas_cumprod[1:]
    alpha = a / p
    c1, c2, sigma = table.coeffs.unbind(1)
    torch.testing.assert_close(c1, 1 / alpha.sqrt())
    torch.testing.assert_close(c2, -(1 - alpha) / ((1 - a).sqrt() * alpha.sqrt()))
    torch.testing.assert_close(sigma**2, (1 - p) / (1 - a) * (1 - alpha))
    assert table.eta == 1.0
    assert table.stochastic


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_tables_are_finite_and_complete(solver, steps):
    table = solver_table(solver, SCHEDULE, steps)
    assert len(table) == steps
    assert table.timesteps.dtype == torch.int64
    assert table.coeffs.shape == (steps, 3)
    assert table.coeffs.dtype == table.extrapolation.dtype == torch.float64
    assert bool(table.coeffs.isfinite().all()) and bool(table.extrapolation.isfinite().all())
    assert table.alphas_cumprod[-1] == 1
    assert table.stochastic == (solver == "ddpm" and steps > 1)


def test_ddim_walks_as_diffusers_does():
    scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.set_timesteps(20)
    table = solver_table("ddim", SCHEDULE, 20)
    torch.manual_seed(0)
    z = peer = torch.randn(64, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        peer = scheduler.step(eps_model(peer, t), t, peer).prev_sample
        z = table.coeffs[k, 0] * z + table.coeffs[k, 1] * eps_model(z, t)
    torch.testing.assert_close(z, peer, rtol=1e-6, atol=1e-6)  # its ᾱ of "1" is an fp32 one


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_dpmsolver_walks_as_diffusers_does():
    """All steps but the last, which diffusers' ε form does not take to ᾱ = 1."""
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=2e-2,
        algorithm_type="dpmsolver",
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(20)
    table = solver_table("dpmsolver", SCHEDULE, 20, spacing="trailing")
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    torch.manual_seed(0)
    z = peer = torch.randn(64, dtype=torch.float64)
    previous = None
    for k, t in enumerate(table.timesteps[:-1].tolist()):
        peer = scheduler.step(eps_model(peer, t), t, peer).prev_sample
        eps = eps_model(z, t)
        mixed = eps if k == 0 else eps + table.extrapolation[k] * (eps - previous)
        z, previous = table.coeffs[k, 0] * z + table.coeffs[k, 1] * mixed, eps
        torch.testing.assert_close(z, peer, rtol=2e-4, atol=2e-4)  # its sigmas are fp32
    assert table.extrapolation[0] == table.extrapolation[-1] == 0


def test_dpmsolver_is_of_second_order_and_ddim_of_first():
    """On x ~ N(0, s²), ε = z √(1-ᾱ)/(ᾱ s² + 1-ᾱ) is exact and z scales with its own spread.

    The last step goes to infinite log-SNR in one stride, so the error is read before it.
    """
    alphas = torch.sigmoid(torch.linspace(6, -6, 1000, dtype=torch.float64))
    spread = 0.3

    def error(solver: str, steps: int) -> float:
        table = solver_table(solver, NoiseSchedule(alphas), steps, spacing="linspace")
        a = table.alphas_cumprod.tolist()
        z, previous = math.sqrt(a[0] * spread**2 + 1 - a[0]), 0.0
        for k in range(steps - 1):
            eps = z * math.sqrt(1 - a[k]) / (a[k] * spread**2 + 1 - a[k])
            c1, c2, _ = table.coeffs[k].tolist()
            mixed = eps + table.extrapolation[k].item() * (eps - previous)
            z, previous = c1 * z + c2 * mixed, eps
        return abs(z - math.sqrt(a[-2] * spread**2 + 1 - a[-2]))

    order = {s: math.log2(error(s, 28) / error(s, 55)) for s in ("ddim", "dpmsolver")}
    assert order["ddim"] == pytest.approx(1, abs=0.2)
    assert order["dpmsolver"] == pytest.approx(2, abs=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 10), "ddim.*ddpm.*dpmsolver"),
        (("ddim", 0), "num_inference_steps"),
        (("ddim", 10, 1.5), "eta"),
        (("ddim", 10, float("nan")), "eta"),
        (("ddim", 10, "0"), "eta"),
        (("ddpm", 10, 0.5), "ddpm"),
        (("dpmsolver", 10, 0.5), "deterministic"),
        (("ddim", 10, 0.0, "even"), "spacing"),
    ],
)
def test_rejects(arguments, message):
    solver, *rest = arguments
    with pytest.raises(ValueError, match=message):
        solver_table(solver, SCHEDULE, *rest)
