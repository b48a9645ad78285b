"""vfengine/sampling/api.py: both forms against a plain float64 Algorithm 2, and what follows."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.decompose import frame_weights
from vfengine.diffusion.noise import base_noise, decomposed_noise, residual_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import SOLVERS
from vfengine.sampling.api import sample, sample_base, sample_residual, sample_video

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
WALK = {"schedule": SCHEDULE, "num_inference_steps": 8}


def base_model(z, t):
    """A smooth image network: mixes neighbours, depends on t."""
    phase = (t.to(z.dtype) / 200).sin().view(-1, 1, 1, 1)
    return 0.7 * torch.tanh(z) + 0.2 * z.roll(1, -1) + 0.1 * phase


def residual_model(z, t):
    """A smooth video network: mixes frames, depends on t and on the frame's index."""
    phase = (t.to(z.dtype) / 300).cos().view(-1, 1, 1, 1, 1)
    index = torch.arange(z.shape[1], dtype=z.dtype).view(1, -1, 1, 1, 1)
    return 0.6 * torch.tanh(z) + 0.2 * z.mean(1, keepdim=True) + 0.1 * phase * torch.sin(index)


def framewise_model(z, t):
    """A video network that treats every frame alone."""
    return 0.6 * torch.tanh(z + 0.1 * (t.to(z.dtype) / 300).cos().view(-1, 1, 1, 1, 1))


class Counted:
    """A model that keeps the shapes it was called with."""

    def __init__(self, model):
        self.model, self.shapes, self.timesteps = model, [], []

    def __call__(self, z, t):
        self.shapes.append(tuple(z.shape))
        self.timesteps.append(t.tolist())
        return self.model(z, t)


def noise_of(shape, dtype=torch.float64, seeds=(0, 1)):
    return decomposed_noise(shape, *seeds, dtype=dtype)


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
    scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(20)
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


# -- the residual phase ----------------------------------------------------------------------------


def test_lam_zero_is_plain_video_ddim():
    scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(20)
    noise = noise_of((2, 5, 3, 5, 7))
    z = noise.residual
    for t in scheduler.timesteps:
        z = scheduler.step(framewise_model(z, t.expand(2)), int(t), z).prev_sample
    others = [0, 1, 3, 4]
    for method in ("two_phase", "interleaved"):
        video = sample(
            base_model,
            framewise_model,
            *noise,
            schedule=SCHEDULE,
            num_inference_steps=20,
            lam=0.0,
            method=method,
        )
        assert (video - z)[:, others].abs().max() <= 1e-10 * z.abs().max()


def test_clean_path_is_a_diffusion_of_the_other_frames_given_the_base_frame():
    """With g = 0, z' = √λ d + √(1-λ) v, where v evolves as a clip of its own: plain DDIM on v."""
    lam = 0.375  # exact in fp32
    noise = noise_of((2, 4, 1, 5, 7))
    image = torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = BaseTrajectory.from_image(image, **WALK)
    assert path.base_terms().abs().max() == 0

    def of_v(z, t):
        return framewise_model((z - math.sqrt(lam) * z[:, 2:3]) / math.sqrt(1 - lam), t)

    video = sample_residual(of_v, path, noise.residual, lam=lam)
    plain = sample(base_model, framewise_model, noise.base, noise.residual, lam=0.0, **WALK)
    expected = math.sqrt(lam) * image[:, None] + math.sqrt(1 - lam) * plain
    assert torch.equal(video[:, 2], image)
    others = [0, 1, 3]
    assert (video - expected)[:, others].abs().max() <= 1e-10 * expected.abs().max()


def test_clean_base_path_animates_the_finished_base_frame():
    noise = noise_of((2, 3, 1, 4, 4))
    image = sample_base(base_model, noise.base, **WALK).final
    video = sample(base_model, residual_model, *noise, base_path="clean", **WALK)
    path = BaseTrajectory.from_image(image, **WALK)
    torch.testing.assert_close(video, sample_residual(residual_model, path, noise.residual))
    assert torch.equal(video[:, 1], image)
    stepwise = sample(base_model, residual_model, *noise, **WALK)
    assert (stepwise - video).abs().max() > 1e-2


def test_a_path_serves_many_residual_seeds_lengths_and_clips():
    base = base_noise((1, 1, 4, 4), 0)
    path = sample_base(base_model, base, **WALK)
    many = sample_residual(residual_model, path, residual_noise((3, 5, 1, 4, 4), 7))
    for b in range(3):
        one = sample_residual(
            residual_model, path, residual_noise((1, 5, 1, 4, 4), 7, sample_offset=b)
        )
        torch.testing.assert_close(many[b : b + 1], one)


def test_parts_of_a_batch_or_a_clip_draw_the_same_noise_on_the_way():
    """A framewise network makes chunks of a clip comparable: λ equal, base frame left out."""
    walk = {**WALK, "eta": 1.0}
    noise = noise_of((2, 6, 1, 4, 4))
    whole = sample(base_model, framewise_model, *noise, lam=0.5, **walk)
    path = sample_base(base_model, noise.base[1:], sample_offset=1, **walk)
    part = sample_residual(
        framewise_model, path, noise.residual[1:, 4:], sample_offset=1, frame_offset=4, lam=0.5
    )
    torch.testing.assert_close(part[0, 0], whole[1, 4])


def test_half_precision_stays_near_fp32():
    shape = (1, 4, 3, 8, 8)
    fp32 = sample(base_model, residual_model, *noise_of(shape, torch.float32), **WALK)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.06)):
        half = sample(base_model, residual_model, *noise_of(shape, dtype), **WALK)
        assert (half.float() - fp32).abs().max() < tolerance * fp32.abs().max()


def test_backends_by_name_agree_and_float64_has_only_the_reference():
    noise = noise_of((1, 3, 1, 5, 7), torch.float32)
    videos = [
        sample(base_model, residual_model, *noise, backend=backend, **WALK)
        for backend in ("cpu", "reference")
    ]
    torch.testing.assert_close(*videos)
    with pytest.raises(ValueError, match="float64"):
        sample(base_model, residual_model, *noise_of((1, 3, 1, 5, 7)), backend="cpu", **WALK)


def test_same_seeds_give_the_same_clip_and_others_do_not():
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    walk = {**WALK, "eta": 1.0}
    first, again, other_base, other_residual = (
        sample(base_model, residual_model, *noise, base_seed=b, residual_seed=r, **walk)
        for b, r in ((3, 4), (3, 4), (5, 4), (3, 5))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[:, 1], other_base[:, 1])
    assert torch.equal(first[:, 1], other_residual[:, 1])
    assert not torch.equal(first[:, 0], other_residual[:, 0])


def test_models_and_noise_are_left_alone():
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    copies = [x.clone() for x in noise]
    for method in ("two_phase", "interleaved"):
        sample(lambda z, t: z, lambda z, t: z.clone(), *noise, method=method, **WALK)
    sample(lambda z, t: z, lambda z, t: z, *noise, overlap_phases=True, **WALK)
    sample_video(lambda z, t: z, noise.residual, **WALK)
    assert all(torch.equal(x, y) for x, y in zip(noise, copies, strict=True))


@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
@pytest.mark.parametrize("give_back", [lambda z, t: z, lambda z, t: z.view(z.shape)])
def test_models_may_give_their_input_back(give_back, method):
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    clone = lambda z, t: z.clone()  # noqa: E731
    expected = sample(clone, clone, *noise, method=method, **WALK)
    assert torch.equal(sample(give_back, give_back, *noise, method=method, **WALK), expected)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver"])
def test_models_may_write_every_estimate_to_the_same_memory(solver):
    """As a network replayed from a CUDA graph does."""

    def reusing(model, buffers):
        def call(z, t):
            return buffers.setdefault(z.shape, torch.empty_like(z)).copy_(model(z, t))

        return call

    noise = noise_of((1, 3, 1, 4, 4))
    for method in ("two_phase", "interleaved"):
        walk = {**WALK, "solver": solver, "method": method}
        video = sample(reusing(base_model, {}), reusing(residual_model, {}), *noise, **walk)
        assert torch.equal(video, sample(base_model, residual_model, *noise, **walk))


def test_callback_reports_every_step():
    for method, phases in (("two_phase", ["base", "residual"]), ("interleaved", ["interleaved"])):
        calls: list[tuple] = []

        def callback(*call, calls=calls):
            calls.append(call)

        sample(
            base_model,
            residual_model,
            *noise_of((1, 2, 1, 4, 4)),
            method=method,
            callback=callback,
            **WALK,
        )
        assert calls == [(phase, k + 1, 8) for phase in phases for k in range(8)]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "parallel"}, ValueError, "method must be one of"),
        ({"base_path": "smooth"}, ValueError, "base_path must be one of"),
        ({"method": "interleaved", "base_path": "clean"}, ValueError, "two_phase"),
        ({"overlap_phases": True, "base_path": "clean"}, ValueError, "finishes the base frame"),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"eta": -1.0}, ValueError, "eta"),
        ({"spacing": "even"}, ValueError, "spacing"),
        ({"num_inference_steps": 0}, ValueError, "1 … 1000"),
        ({"num_inference_steps": 1001}, ValueError, "1 … 1000"),
        ({"lam": 1.5}, ValueError, "lam"),
        ({"lam": [0.5, 0.5]}, ValueError, "lam"),
        ({"base_seed": -1}, ValueError, "base_seed"),
        ({"residual_seed": 2**64}, ValueError, "residual_seed"),
        ({"base_noise": torch.zeros(1, 3, 1, 4, 4)}, ValueError, "base_noise must be"),
        ({"base_noise": torch.zeros(2, 1, 4, 4)}, ValueError, "does not fit"),
        ({"base_noise": torch.zeros(1, 1, 4, 5)}, ValueError, "does not fit"),
        ({"residual_noise": torch.zeros(1, 1, 4, 4)}, ValueError, "residual_noise must be"),
        ({"residual_noise": torch.zeros(1, 0, 1, 4, 4)}, ValueError, "residual_noise must be"),
        ({"base_noise": torch.zeros(1, 1, 4, 4).int()}, TypeError, "base_noise"),
        ({"base_model": lambda z, t: z[:, :, :2]}, ValueError, "base_model must return"),
        ({"residual_model": lambda z, t: (z, z)}, ValueError, "residual_model must return"),
    ],
)
@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
def test_rejects(method, change, error, message):
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    arguments = {
        "base_model": base_model,
        "residual_model": residual_model,
        "base_noise": noise.base,
        "residual_noise": noise.residual,
        "method": method,
        **WALK,
    }
    with pytest.raises(error, match=message):
        sample(**{**arguments, **change})


@pytest.mark.parametrize("change", [{"lam": 2.0}, {"residual_seed": -1}])
def test_refuses_residual_arguments_before_the_base_phase_runs(change):
    base = Counted(base_model)
    with pytest.raises(ValueError):
        sample(base, residual_model, *noise_of((1, 3, 1, 4, 4)), **change, **WALK)
    assert base.shapes == []


def test_rejects_a_path_of_another_schedule_or_picture():
    path = sample_base(base_model, base_noise((2, 1, 4, 4), 0), **WALK)
    with pytest.raises(ValueError, match="noise schedule"):
        sample_residual(
            residual_model,
            path,
            residual_noise((2, 3, 1, 4, 4), 1),
            schedule=NoiseSchedule.cosine(1000),
        )
    for shape in ((3, 3, 1, 4, 4), (2, 3, 1, 4, 5), (2, 3, 2, 4, 4)):
        with pytest.raises(ValueError, match="base path"):
            sample_residual(residual_model, path, residual_noise(shape, 1))
