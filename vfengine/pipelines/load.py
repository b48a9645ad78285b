"""load_pipeline: the pipeline of whatever model a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..names import AUTO

if TYPE_CHECKING:
    from .pipeline import Pipeline


def load_pipeline(
    folder: str | Path | None = None,
    *,
    device: torch.device | str = AUTO,
    dtype: torch.dtype | str = AUTO,
    capture: bool = True,
    base_unet: Any = None,
    lora: Any = None,
    base_device: torch.device | str | None = None,
    residual_device: torch.device | str | None = None,
) -> Pipeline:
    """The pipeline that a folder holds; None is the default checkpoint of the package.

    It is a `VideoFusionPipeline` or a `PlainVideoPipeline` for a checkpoint of our own, and a
    `TextToVideoPipeline` for a published text-to-video model. The settings, and what is raised, are
    those of their `from_pretrained`; ValueError for a base_unet, base_device or residual_device of
    a text-to-video model.
    """
    of_phases: dict[str, Any] = {"base_unet": base_unet}
    of_phases |= {"base_device": base_device, "residual_device": residual_device}
    options: dict[str, Any] = {"device": device, "dtype": dtype, "capture": capture}
    options["lora"] = lora
    if folder is not None:
        from ..formats.published import holds_pipeline

        if holds_pipeline(folder):
            from .text_to_video import TextToVideoPipeline

            for name, value in of_phases.items():
                if value is not None:
                    raise ValueError(
                        f"{folder}: {TextToVideoPipeline.lacks}, so it takes no {name}"
                    )
            return TextToVideoPipeline.from_pretrained(folder, **options)
    from .videofusion import VideoFusionPipeline

    return VideoFusionPipeline.from_pretrained(folder, **of_phases, **options)
