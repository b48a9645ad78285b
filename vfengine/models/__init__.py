"""One UNet family for the base generator, the residual generator and plain video diffusion."""

from .generators import BaseGenerator, ResidualGenerator
from .unet import UNet, UNetConfig

__all__ = ["BaseGenerator", "ResidualGenerator", "UNet", "UNetConfig"]
