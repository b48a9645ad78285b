"""An autoencoder that trains in seconds, how it does, and frames for it."""

import torch

from vfengine.models.autoencoder import AutoencoderConfig
from vfengine.training.autoencoder import frame_pool

SMALL = AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_groups=4,
    patch_size=2,
    quant_conv=False,
    post_quant_conv=False,
)
OPTIONS = {"batch_size": 2, "learning_rate": 3e-3, "warmup": 5, "ema": 0.9, "precision": "fp32"}


def few_frames() -> torch.Tensor:
    """uint8 [18, 32, 32, 4], of six scenes."""
    return frame_pool(6, seed=3, size=32, device=torch.device("cpu"))
