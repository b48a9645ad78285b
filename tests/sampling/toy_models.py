"""Smooth networks that stand in for trained ones, their walk and their noise."""

import torch
from diffusers import DDIMScheduler

from vfengine.diffusion.noise import decomposed_noise
from vfengine.diffusion.schedule import NoiseSchedule

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


def diffusers_ddim(num_inference_steps: int) -> DDIMScheduler:
    """The oracle: diffusers' own DDIM on SCHEDULE, down to ᾱ = 1."""
    scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler
