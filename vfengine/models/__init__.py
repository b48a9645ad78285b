"""One UNet family for the base generator, the residual generator and plain video diffusion."""

from .generators import BaseGenerator, ResidualGenerator, VideoGenerator
from .unet import UNet, UNetConfig, vdm_config

__all__ = [
    "BaseGenerator",
    "ResidualGenerator",
    "UNet",
    "UNetConfig",
    "VideoGenerator",
    "vdm_config",
]
