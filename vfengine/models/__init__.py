"""Networks: one UNet family for base generators, residual generators and plain video models.

Names of other folders are loaded when first used: models know nothing of plans and files.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from .config import UNetConfig, vdm_config
from .denoisers import BaseGenerator, PretrainedGenerator, ResidualGenerator, VideoGenerator
from .text_encoder import TextEncoder, TextEncoderConfig
from .unet import UNet

if TYPE_CHECKING:
    from vfengine.formats.load import load_autoencoder, load_text_encoder, load_unet, read_unet
    from vfengine.plan.cuda import CudaUNet
    from vfengine.plan.decoder import PlannedDecoder, PlannedEncoder
    from vfengine.plan.network import PlannedUNet, for_inference
    from vfengine.plan.text import PlannedTextEncoder

_ELSEWHERE = {
    "CudaUNet": "vfengine.plan.cuda",
    "PlannedDecoder": "vfengine.plan.decoder",
    "PlannedEncoder": "vfengine.plan.decoder",
    "PlannedTextEncoder": "vfengine.plan.text",
    "PlannedUNet": "vfengine.plan.network",
    "for_inference": "vfengine.plan.network",
    "load_autoencoder": "vfengine.formats.load",
    "load_text_encoder": "vfengine.formats.load",
    "load_unet": "vfengine.formats.load",
    "read_unet": "vfengine.formats.load",
}

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BaseGenerator",
    "CudaUNet",
    "Decoder",
    "Encoder",
    "PlannedDecoder",
    "PlannedEncoder",
    "PlannedTextEncoder",
    "PlannedUNet",
    "PretrainedGenerator",
    "ResidualGenerator",
    "TextEncoder",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "VideoGenerator",
    "for_inference",
    "load_autoencoder",
    "load_text_encoder",
    "load_unet",
    "read_unet",
    "vdm_config",
]


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        value = getattr(importlib.import_module(_ELSEWHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
