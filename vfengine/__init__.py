"""vfengine: fast sampling of decomposed video diffusion models (VideoFusion, arXiv 2303.08320).

Videos are [B, N, C, H, W], images [B, C, H, W]. Names are loaded when first used, so that importing
the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vfengine import models, ops
    from vfengine.decompose import decomposed_noise
    from vfengine.pipeline import VideoFusionPipeline
    from vfengine.sampling import sample, sample_base, sample_residual, sample_video
    from vfengine.schedule import NoiseSchedule
    from vfengine.trajectory import BaseTrajectory

_HOME = {
    "BaseTrajectory": "vfengine.trajectory",
    "NoiseSchedule": "vfengine.schedule",
    "VideoFusionPipeline": "vfengine.pipeline",
    "decomposed_noise": "vfengine.decompose",
    "sample": "vfengine.sampling",
    "sample_base": "vfengine.sampling",
    "sample_residual": "vfengine.sampling",
    "sample_video": "vfengine.sampling",
}
_SUBPACKAGES = ("models", "ops")

__all__ = [
    "BaseTrajectory",
    "NoiseSchedule",
    "VideoFusionPipeline",
    "__version__",
    "decomposed_noise",
    "models",
    "ops",
    "sample",
    "sample_base",
    "sample_residual",
    "sample_video",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"vfengine.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vfengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
