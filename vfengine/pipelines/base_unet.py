"""A published image UNet as the base generator of a decomposed model.

The base network of VideoFusion is an image diffusion model, and may be a published one: trained on
the same noise schedule, on images of the same channels. A clip's label then conditions its motion
alone, unless the network has the labels as its own classes. One that attends to prompts serves a
model whose text encoder, and whose latents, are those that it was trained with.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..diffusion.schedule import NoiseSchedule
from ..formats.checkpoint import CheckpointConfig
from ..formats.load import fingerprint, read_scheduler, read_unet, read_unet_config
from ..formats.lora import Updates
from ..formats.published_base import FOLDERS
from ..formats.scheduler import base_schedule, diffusers_schedule
from ..formats.text_to_image import linked_parts, part_config
from ..models.config import UNetConfig
from ..models.denoisers import PREDICTION_TYPES, PretrainedGenerator
from ..models.unet import UNet
from ..plan.network import InferenceUNet


@dataclass(frozen=True)
class PretrainedBase:
    """Where a base network comes from: a source of `load_unet`, or a UNet in memory."""

    source: Path | UNet | InferenceUNet
    config: UNetConfig
    prediction_type: str
    fingerprint: str

    def load(
        self,
        schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype,
        updates: Updates | None = None,
    ) -> PretrainedGenerator:
        """The network, with the updates of LoRA; a UNet in memory stays as it is."""
        if isinstance(self.source, Path):
            unet = read_unet(self.source, dtype, device, updates)
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
        if (place, source.dtype) != (
            torch.empty(0, device=device, dtype=torch.float32).device,
            dtype,
        ):
            raise ValueError(
                f"base_unet: is {source.dtype} on {place}, the pipeline {dtype} on {device}"
            )
    elif isinstance(source, (str, Path)):
        source = Path(source)
        unet, scheduler = read_unet_config(source), read_scheduler(source)
        if not scheduler:
            warnings.warn(
                f"base_unet: {source} has no scheduler_config.json beside it: its noise levels are "
                f"taken for this model's, its output for {prediction_type or 'epsilon'}",
                stacklevel=2,
            )
    else:
        raise TypeError(f"base_unet must be a folder or a UNet, got {type(source).__name__}")
    if prediction_type is not None:
        scheduler = scheduler and {**scheduler, "prediction_type": prediction_type}
    said = scheduler.get("prediction_type", prediction_type or "epsilon")
    if said not in PREDICTION_TYPES:
        raise ValueError(f"base_unet: predicts {said!r}, expected one of {PREDICTION_TYPES}")
    _check_fits(unet, config)
    if unet.context_dim is not None and isinstance(source, Path):
        _check_parts(source, config)
    prediction_type = _trained_on(scheduler, config) if scheduler else said
    return PretrainedBase(source, unet, prediction_type, fingerprint(source, prediction_type))


def _check_fits(unet: UNetConfig, config: CheckpointConfig) -> None:
    """ValueError unless the network fits the clips' channels and size, and the labels."""
    channels = (unet.in_channels, unet.out_channels)
    labels = 0 if config.text_encoder is not None else len(config.labels)  # that are classes
    known = unet.num_classes
    if known is not None and unet.class_embedding == "table":
        known -= 1  # the last class stands for no label
    size = (config.height, config.width)
    width = None if config.text_encoder is None else config.text_encoder.width
    for wrong, problem in (
        (unet.is_video, "is a video UNet, the base network makes images"),
        (
            channels != (config.channels,) * 2,
            f"has {channels[0]} input and {channels[1]} output channels, the clips have "
            f"{config.channels}",
        ),
        (
            config.text_encoder is None and (unet.needs_context or unet.context_dim is not None),
            f"attends to a context of width {unet.context_dim}, and a label is none",
        ),
        (
            config.text_encoder is not None and unet.context_dim not in (None, width),
            f"attends to a context of width {unet.context_dim}, this model's text encoder makes "
            f"rows of {width}",
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


def _check_parts(source: Path, config: CheckpointConfig) -> None:
    """What lies beside a network that attends to prompts must be as this model's own.

    Raises ValueError for an autoencoder or text encoder of another architecture. A UserWarning
    names one of other weights, which the network's clips then rest on all the same.
    """
    root = (source.parent if source.is_file() else source).resolve()
    root = root if (root / "unet").is_dir() else root.parent
    for name in ("autoencoder", "text_encoder"):
        if not (root / FOLDERS[name] / "config.json").is_file():
            continue
        what = f"base_unet: the {name.replace('_', ' ')} beside it"
        own = part_config(root, name)
        if asdict(own) != asdict(getattr(config, name)):
            raise ValueError(f"{what} is of another architecture than this model's")
        if name not in config.foreign:
            continue
        if linked_parts(root, (name,))[name].sha256 != config.sha256.get(name):
            warnings.warn(f"{what} is another one; this model's own is used", stacklevel=3)


def _trained_on(scheduler: dict, config: CheckpointConfig) -> str:
    """What the network predicts, of its scheduler's configuration.

    A UserWarning names the entries that ask for another way of sampling than the model's. Raises
    ValueError where they name other noise levels than the model's, or what cannot be sampled.
    """
    ours = config.noise_schedule()
    try:
        theirs, prediction_type, others = base_schedule(scheduler)
    except ValueError as error:
        raise ValueError(f"base_unet: its scheduler's {error}") from error
    if theirs.alphas_cumprod.shape != ours.alphas_cumprod.shape or not torch.allclose(
        theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-6
    ):
        raise ValueError(
            f"base_unet: was trained on another noise schedule, {theirs.recipe}, than this model's "
            f"{ours.recipe}"
        )
    if others and not _samples_alike(scheduler, config):
        named = ", ".join(f"{entry} = {json.dumps(value)}" for entry, value in others.items())
        warnings.warn(
            f"base_unet: not taken from its scheduler, as base frames are sampled in the model's "
            f"own way: {named}",
            stacklevel=3,
        )
    return prediction_type


def _samples_alike(scheduler: dict, config: CheckpointConfig) -> bool:
    """Whether a published scheduler asks for the model's own timesteps and last step."""
    published = getattr(config, "published", None)
    if published is None:
        return False
    try:
        theirs = diffusers_schedule(scheduler)
    except (ValueError, KeyError):  # of entries that are named
        return False
    return {name: getattr(theirs, name) for name in published.timesteps} == published.timesteps
