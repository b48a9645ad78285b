"""vfengine: fast sampling of decomposed video diffusion models (VideoFusion, arXiv 2303.08320).

Videos are [B, N, C, H, W], images [B, C, H, W]. Names are loaded when first used, so that importing
the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vfengine import _moved

__version__ = "0.1.0"

if TYPE_CHECKING:  # "as": so that a strict type checker takes them for exported
    from vfengine import metrics as metrics
    from vfengine import models as models
    from vfengine import ops as ops
    from vfengine.diffusion.base_path import BaseTrajectory as BaseTrajectory
    from vfengine.diffusion.noise import decomposed_noise as decomposed_noise
    from vfengine.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from vfengine.pipelines.load import load_pipeline as load_pipeline
    from vfengine.pipelines.text_to_video import TextToVideoPipeline as TextToVideoPipeline
    from vfengine.pipelines.videofusion import VideoFusionPipeline as VideoFusionPipeline
    from vfengine.sampling.api import sample as sample
    from vfengine.sampling.api import sample_base as sample_base
    from vfengine.sampling.api import sample_residual as sample_residual
    from vfengine.sampling.api import sample_video as sample_video

_HOME = {
    "BaseTrajectory": "vfengine.diffusion.base_path",
    "NoiseSchedule": "vfengine.diffusion.schedule",
    "TextToVideoPipeline": "vfengine.pipelines.text_to_video",
    "VideoFusionPipeline": "vfengine.pipelines.videofusion",
    "decomposed_noise": "vfengine.diffusion.noise",
    "load_pipeline": "vfengine.pipelines.load",
    "sample": "vfengine.sampling.api",
    "sample_base": "vfengine.sampling.api",
    "sample_residual": "vfengine.sampling.api",
    "sample_video": "vfengine.sampling.api",
}
_MODULES = ("metrics", "models", "ops")

__all__ = ["__version__", *_HOME, *_MODULES]

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vfengine.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vfengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
