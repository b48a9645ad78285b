"""A user's script, as a type checker sees it: `make types`. Nothing runs it."""

import numpy as np
from torch import Tensor

import vfengine as vf

schedule: vf.NoiseSchedule = vf.NoiseSchedule.linear(1000, 1e-4, 2e-2)
noise = vf.decomposed_noise((1, 4, 3, 16, 16), base_seed=0, residual_seed=1)


def base_model(z: Tensor, t: Tensor) -> Tensor:
    return z


path: vf.BaseTrajectory = vf.sample_base(
    base_model, noise.base, schedule=schedule, num_inference_steps=5
)
clip: Tensor = vf.sample_residual(base_model, path, noise.residual, lam=0.5)
both: Tensor = vf.sample(
    base_model, base_model, noise.base, noise.residual, schedule=schedule, num_inference_steps=5
)
pipe = vf.VideoFusionPipeline.from_pretrained()
frames = pipe(label="cartwheel", num_frames=16, output_type="np").frames
distance: float = vf.metrics.frechet_distance(np.zeros((4, 2)), np.zeros((4, 2)))
score: tuple[float, float] = vf.metrics.inception_score(np.ones((4, 2)) / 2)
vf.NoiseSchedule.linear(wrong=1)  # type: ignore[call-arg]
name: str = vf.metrics.frechet_distance(np.ones((4, 2)), np.ones((4, 2)))  # type: ignore[assignment]
