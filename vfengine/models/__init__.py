"""One UNet family for the base generator, the residual generator and plain video diffusion."""

from .config import UNetConfig, vdm_config
from .generators import BaseGenerator, PretrainedGenerator, ResidualGenerator, VideoGenerator
from .peers import load_unet, read_unet
from .planned import PlannedUNet, for_inference
from .unet import UNet

__all__ = [
    "BaseGenerator",
    "PlannedUNet",
    "PretrainedGenerator",
    "ResidualGenerator",
    "UNet",
    "UNetConfig",
    "VideoGenerator",
    "for_inference",
    "load_unet",
    "read_unet",
    "vdm_config",
]
