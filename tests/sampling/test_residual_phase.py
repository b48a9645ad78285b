"""vfengine/sampling/api.py: clips around a base path, and parts of clips."""

import math

import torch
from toy_models import (
    SCHEDULE,
    WALK,
    base_model,
    diffusers_ddim,
    framewise_model,
    noise_of,
    residual_model,
)

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.noise import base_noise, residual_noise
from vfengine.sampling.api import sample, sample_base, sample_residual


def test_lam_zero_is_plain_video_ddim():
    scheduler = diffusers_ddim(20)
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
    """With g = 0, z' = √λ d + √(1-λ) v, where v walks as a clip of its own: plain DDIM on v."""
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
