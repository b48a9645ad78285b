"""vfengine/diffusion/solvers.py: the tables against the textbook updates and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from vfengine.diffusion.schedule import SPACINGS, NoiseSchedule
from vfengine.diffusion.solvers import (
    NUM_HISTORY,
    SOLVERS,
    SolverTable,
    corrector_weights,
    solver_table,
)

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
MULTISTEP = ("dpmsolver", "dpmsolver++", "unipc")
BETAS = {"linear": (1e-4, 2e-2), "scaled_linear": (8.5e-4, 1.2e-2)}
STEPS = (1, 2, 3, 4, 10, 20)


def model_of(schedule: NoiseSchedule):
    """A smooth ε(z, t) whose clean sample, √ᾱ z - √(1-ᾱ) sin(2z + t)/2, stays bounded."""
    alphas = schedule.alphas_cumprod.tolist()

    def eps_model(z: torch.Tensor, t: int) -> torch.Tensor:
        noise, signal = math.sqrt(1 - alphas[t]), math.sqrt(alphas[t])
        return noise * z + 0.5 * signal * torch.sin(2 * z + t / 100)

    return eps_model


def walk(table: SolverTable, model, z: torch.Tensor) -> list[torch.Tensor]:
    """z after every step of a deterministic table."""
    history, states = [torch.zeros_like(z)] * table.num_history, []
    for k, t in enumerate(table.timesteps.tolist()):
        known = [model(z, t), *history]
        mixed, *history = [
            sum(weight * x for weight, x in zip(row, known, strict=True))
            for row in table.mixing[k].tolist()
        ]
        c1, c2, _ = table.coeffs[k].tolist()
        z = c1 * z + c2 * mixed
        states.append(z)
    return states


def walk_of_diffusers(scheduler, model, z: torch.Tensor) -> list[torch.Tensor]:
    states = []
    for t in scheduler.timesteps.tolist():
        z = scheduler.step(model(z, t), t, z).prev_sample
        states.append(z)
    return states


def noise(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


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
    assert table.num_history == NUM_HISTORY[solver]
    assert table.mixing.shape == (steps, 1 + table.num_history, 1 + table.num_history)
    assert table.coeffs.dtype == table.mixing.dtype == torch.float64
    assert bool(table.coeffs.isfinite().all()) and bool(table.mixing.isfinite().all())
    assert table.alphas_cumprod[-1] == 1
    assert table.stochastic == (solver == "ddpm" and steps > 1)


def test_one_step_solvers_keep_no_history():
    for solver in ("ddim", "ddpm"):
        assert torch.equal(solver_table(solver, SCHEDULE, 20).mixing, torch.ones(20, 1, 1).double())


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_walks_as_diffusers_does(steps, schedule):
    ours = getattr(NoiseSchedule, schedule)(1000, *BETAS[schedule])
    scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.alphas_cumprod = ours.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    table = solver_table("ddim", ours, steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    model = model_of(ours)
    expected = walk_of_diffusers(scheduler, model, noise())
    torch.testing.assert_close(walk(table, model, noise()), expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_solvers_walk_as_diffusers_do(solver, steps, schedule):
    """On diffusers' trailing steps; its leading and linspace ones are those of steps + 1.

    Its ε form of DPM-Solver does not go to ᾱ = 1: there the last step is left out.
    """
    kind, options = {
        "dpmsolver": (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        ),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "unipc": (UniPCMultistepScheduler, {}),
    }[solver]
    start, end = BETAS[schedule]
    scheduler = kind(
        1000,
        beta_start=start,
        beta_end=end,
        beta_schedule=schedule,
        timestep_spacing="trailing",
        **options,
    )
    scheduler.set_timesteps(steps)
    ours = getattr(NoiseSchedule, schedule)(1000, start, end)
    table = solver_table(solver, ours, steps, spacing="trailing")
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    n = steps - 1 if solver == "dpmsolver" else steps + 1
    sigmas = ((1 - table.alphas_cumprod) / table.alphas_cumprod).sqrt()
    torch.testing.assert_close(scheduler.sigmas.double()[:n], sigmas[:n], rtol=1e-3, atol=0)
    scheduler.sigmas = torch.cat([sigmas[:n], scheduler.sigmas[n:]])  # its own are fp32

    model = model_of(ours)
    expected = walk_of_diffusers(scheduler, model, noise())[:n]
    tolerance = 1e-11 if solver == "unipc" else 1e-5  # DPMSolverMultistepScheduler steps in fp32
    found = walk(table, model, noise())[:n]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if steps > 1:  # one step is DDIM's, and carries the rounding of z to x over √(1/ᾱ) = 157
        fp32 = walk(table, model, noise().float())[:n]
        torch.testing.assert_close([z.double() for z in fp32], found, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_solvers_go_to_the_first_noise_level_as_diffusers_do(solver, steps):
    """set_alpha_to_one False is its final_sigmas_type "sigma_min".

    The last step is of first order here: in DPMSolverMultistepScheduler if told so, in UniPC's
    always. UniPC's still corrects the sample that it starts from.
    """
    options = {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 1.2e-2}
    options |= {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(**options)
    else:
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type=solver, euler_at_final=True, **options
        )
    scheduler.set_timesteps(steps)
    ours = NoiseSchedule.scaled_linear(1000)
    table = solver_table(solver, ours, steps, spacing="trailing", set_alpha_to_one=False)
    assert table.alphas_cumprod[-1] == ours.alphas_cumprod[0]
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    sigmas = ((1 - table.alphas_cumprod) / table.alphas_cumprod).sqrt()
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-3, atol=0)
    scheduler.sigmas = sigmas  # its own are fp32
    model = model_of(ours)
    expected = walk_of_diffusers(scheduler, model, noise())
    tolerance = 1e-11 if solver == "unipc" else 1e-5  # DPMSolverMultistepScheduler steps in fp32
    torch.testing.assert_close(walk(table, model, noise()), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_last_step_from_the_first_noise_level_to_itself_does_nothing(solver):
    """Leading timesteps without an offset end at t = 0, whose ᾱ_0 is where the last step goes."""
    table = solver_table(solver, SCHEDULE, 10, set_alpha_to_one=False)
    assert table.timesteps[-1] == 0
    assert table.coeffs[-1].tolist() == [1.0, 0.0, 0.0]
    assert bool(table.mixing.isfinite().all())
    states = walk(table, model_of(SCHEDULE), noise())
    assert torch.equal(states[-1], states[-2])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_goes_to_the_first_noise_level(eta):
    table = solver_table("ddim", SCHEDULE, 25, eta, steps_offset=1, set_alpha_to_one=False)
    to_one = solver_table("ddim", SCHEDULE, 25, eta, steps_offset=1)
    assert torch.equal(table.coeffs[:-1], to_one.coeffs[:-1])
    a, p = SCHEDULE.alphas_cumprod[[1, 0]].tolist()
    sigma = eta * math.sqrt((1 - p) / (1 - a) * (1 - a / p))
    c1 = math.sqrt(p / a)
    expected = [c1, math.sqrt(1 - p - sigma**2) - c1 * math.sqrt(1 - a), sigma]
    assert table.coeffs[-1].tolist() == pytest.approx(expected, abs=1e-12)
    assert table.stochastic == (eta > 0)
    assert table != to_one


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_short_multistep_walks_are_ddim(solver, spacing):
    """First and last step are of first order, and so two steps are, and one is."""
    model = model_of(SCHEDULE)
    for steps in (1, 2):
        found, expected = (
            walk(solver_table(name, SCHEDULE, steps, spacing=spacing), model, noise())
            for name in (solver, "ddim")
        )
        torch.testing.assert_close(found[-1], expected[-1], rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-1200, 1200), min_size=1, max_size=40, unique=True),
    solver=st.sampled_from(SOLVERS),
    spacing=st.sampled_from(SPACINGS),
    to_one=st.booleans(),
    data=st.data(),
)
def test_any_schedule_takes_clean_samples_and_constant_noise_along(
    logits, solver, spacing, to_one, data
):
    """√ᾱ_t x goes to √ᾱ_p x where ε = 0, and √(1-ᾱ_t) ε to √(1-ᾱ_p) ε where ε is constant."""
    alphas = torch.sigmoid(torch.tensor(sorted(logits, reverse=True), dtype=torch.float64) / 100)
    steps = data.draw(st.integers(1, len(alphas)))
    schedule = NoiseSchedule(alphas)
    table = solver_table(solver, schedule, steps, spacing=spacing, set_alpha_to_one=to_one)
    c1, c2, sigma = table.coeffs.unbind(1)
    before, after = table.alphas_cumprod[:-1], table.alphas_cumprod[1:]
    torch.testing.assert_close(c1, (after / before).sqrt())
    left = c1 * (1 - before).sqrt() + c2
    torch.testing.assert_close(left**2 + sigma**2, 1 - after, rtol=1e-7, atol=1e-11)

    assert bool(table.mixing.isfinite().all())
    assert bool((table.mixing[0, :, 1:] == 0).all())  # no step looks before the first one
    sums, size = table.mixing.sum(2), table.mixing.abs().sum(2)
    assert bool(((sums - 1).abs() <= 1e-12 * size).all())


@given(h=st.lists(st.floats(1e-6, 20), min_size=2, max_size=20), power=st.integers(0, 2))
def test_corrector_integrates_parabolas(h, power):
    """∫ h e^{hτ} τ^n dτ / (e^h - 1) over 0 … 1 is Σ a_i τ_i^n at τ = 1, 0, -h_prev/h, n <= 2."""
    h = torch.tensor([*h, math.inf], dtype=torch.float64)
    a0, a1, a2 = (a[1:-1] for a in corrector_weights(h))
    r, h = h[:-2] / h[1:-1], h[1:-1]
    tau = (torch.arange(5_000, dtype=torch.float64) + 0.5) / 5_000
    weight = (h[:, None] * (tau - 1)).exp()
    expected = (weight * tau**power).sum(1) / weight.sum(1)
    nodes = a0 + a1 * 0**power + a2 * (-r) ** power
    torch.testing.assert_close(nodes, expected, rtol=0, atol=1e-6)


def test_solvers_are_of_their_order():
    """On x ~ N(0, s²), ε = z √(1-ᾱ)/(ᾱ s² + 1-ᾱ) is exact and z scales with its own spread.

    The last step goes to infinite log-SNR in one stride, so the error is read before it.
    """
    alphas = torch.sigmoid(torch.linspace(6, -6, 1000, dtype=torch.float64))
    spread = 0.3

    def error(solver: str, steps: int) -> float:
        table = solver_table(solver, NoiseSchedule(alphas), steps, spacing="linspace")
        variance = (alphas * spread**2 + 1 - alphas).tolist()
        levels = (1 - alphas).sqrt().tolist()
        first, last = table.timesteps[[0, -1]].tolist()
        z = torch.tensor(math.sqrt(variance[first]), dtype=torch.float64)
        z = walk(table, lambda z, t: z * levels[t] / variance[t], z)[-2].item()
        return abs(z - math.sqrt(variance[last]))

    order = {s: math.log2(error(s, 28) / error(s, 55)) for s in SOLVERS if s != "ddpm"}
    assert order["ddim"] == pytest.approx(1, abs=0.2)
    assert order["dpmsolver"] == pytest.approx(2, abs=0.4)
    assert order["dpmsolver++"] == pytest.approx(2, abs=0.4)
    assert order["unipc"] == pytest.approx(3, abs=0.4)  # the corrector adds one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 10), "ddim.*ddpm.*dpmsolver.*unipc"),
        (("ddim", 0), "num_inference_steps"),
        (("ddim", 10, 1.5), "eta"),
        (("ddim", 10, float("nan")), "eta"),
        (("ddim", 10, "0"), "eta"),
        (("ddpm", 10, 0.5), "ddpm"),
        (("dpmsolver", 10, 0.5), "dpmsolver is deterministic"),
        (("dpmsolver++", 10, 1.0), r"dpmsolver\+\+ is deterministic"),
        (("unipc", 10, 0.1), "unipc is deterministic"),
        (("ddim", 10, 0.0, "even"), "spacing"),
    ],
)
def test_rejects(arguments, message):
    solver, *rest = arguments
    with pytest.raises(ValueError, match=message):
        solver_table(solver, SCHEDULE, *rest)
