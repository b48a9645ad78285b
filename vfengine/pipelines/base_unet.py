"""A published image UNet as the base generator of a decomposed model.

The base network of VideoFusion is an image diffusion model, and may be a published one: trained on
the same noise schedule, on images of the same channels, without a prompt. A clip's label then
conditions its motion alone, unless the network has the labels as its own classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion.schedule import NoiseSchedule
from ..formats.checkpoint import CheckpointConfig
from ..formats.load import fingerprint, read_scheduler, read_unet, read_unet_config
from ..formats.published import Unsupported
from ..formats.scheduler import noise_schedule
from ..models.config import UNetConfig
from ..models.denoisers import PREDICTION_TYPES, PretrainedGenerator
from ..models.unet import UNet
from ..plan.network import InferenceUNet


@dataclass(frozen=True)
class PretrainedBase:
    """Where a base network comes from: a source of `load_unet`, or a UNet in memory."""

    source: Path | UNet | InferenceUNet
    prediction_type: str
    fingerprint: str

    def load(
        self, schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype
    ) -> PretrainedGenerator:
        """The network; a UNet in memory stays as it is."""
        if isinstance(self.source, Path):
            unet = read_unet(self.source, dtype, device)
        elif isinstance(self.source, InferenceUNet):
            unet = self.source
        else:
            unet = copy.deepcopy(self.source)
        return PretrainedGenerator(unet, schedule, self.prediction_type).to(device).eval()


def pretrained_base(
    source: str | Path | UNet | InferenceUNet,
    config: CheckpointConfig,
    device: torch.device,
    dtype: torch.dtype,
    prediction_type: str | None = None,
) -> PretrainedBase:
    """The base network in place of a checkpoint's own, checked to fit.

    source:          a folder or file of `load_unet`, or a UNet, which stays as it is
    prediction_type: "epsilon" or "v_prediction"; None is what the scheduler beside the folder says,
                     or "epsilon"

    Reads the files once, for their SHA-256. Raises ValueError, naming what does not fit, and what
    `load_unet` raises.
    """
    if config.objective != "decomposed":
        raise ValueError("base_unet: a plain video model has no base network to replace")
    if isinstance(source, UNet | InferenceUNet):
        unet, scheduler = source.config, {}
        place = next(source.parameters()).device
        if (place, source.dtype) != (torch.empty(0, device=device).device, dtype):
            raise ValueError(
                f"base_unet: is {source.dtype} on {place}, the pipeline {dtype} on {device}"
            )
    elif isinstance(source, (str, Path)):
        source = Path(source)
        unet, scheduler = read_unet_config(source), read_scheduler(source)
    else:
        raise TypeError(f"base_unet must be a folder or a UNet, got {type(source).__name__}")
    prediction_type = prediction_type or scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"base_unet: predicts {prediction_type!r}, expected one of {PREDICTION_TYPES}"
        )
    _check_fits(unet, config)
    _check_schedule(scheduler, config.noise_schedule())
    return PretrainedBase(source, prediction_type, fingerprint(source, prediction_type))


def _check_fits(unet: UNetConfig, config: CheckpointConfig) -> None:
    """ValueError unless the network fits the clips' channels and size, and the labels."""
    channels = (unet.in_channels, unet.out_channels)
    labels = 0 if config.text_encoder is not None else len(config.labels)  # that are classes
    known = unet.num_classes
    if known is not None and unet.class_embedding == "table":
        known -= 1  # the last class stands for no label
    size = (config.height, config.width)
    for wrong, problem in (
        (unet.is_video, "is a video UNet, the base network makes images"),
        (
            channels != (config.channels,) * 2,
            f"has {channels[0]} input and {channels[1]} output channels, the clips have "
            f"{config.channels}",
        ),
        (
            unet.needs_context or unet.context_dim is not None,
            f"attends to a context of width {unet.context_dim}, and a label is none",
        ),
        (
            unet.class_embedding in ("timestep", "projection"),
            f"takes class labels as a {unet.class_embedding}, this model's are names",
        ),
        (
            known is not None and known != labels,
            f"has {unet.num_classes} classes, which are not this model's {labels} labels"
            + (" and one for none" if unet.class_embedding == "table" else ""),
        ),
        (
            any(length % unet.size_multiple for length in size),
            f"takes multiples of {unet.size_multiple} pixels, the clips have {size}",
        ),
    ):
        if wrong:
            raise ValueError(f"base_unet: {problem}")


def _check_schedule(scheduler: dict, schedule: NoiseSchedule) -> None:
    """ValueError where a scheduler's configuration names other noise levels than the model's."""
    if not scheduler:
        return
    try:
        theirs = noise_schedule(scheduler)
    except Unsupported as error:
        entry = f"{error.entry} = {error.value!r}"
        raise ValueError(f"base_unet: unknown noise schedule, {entry}") from error
    ours = schedule.alphas_cumprod
    if theirs.alphas_cumprod.shape != ours.shape or not torch.allclose(
        theirs.alphas_cumprod, ours, rtol=1e-4, atol=1e-6
    ):
        raise ValueError(
            f"base_unet: was trained on another noise schedule, {theirs.recipe}, than this model's "
            f"{schedule.recipe}"
        )
