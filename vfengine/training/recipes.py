"""The networks that training makes: on pixels with labels, and on latents with prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..diffusion.schedule import NoiseSchedule
from ..formats.checkpoint import DecomposedConfig, PlainConfig
from ..models import UNetConfig, vdm_config
from .parts import Parts

if TYPE_CHECKING:
    from .published import PublishedParts


@dataclass(frozen=True)
class Shape:
    """What the user decides about a model's clips and networks; see --help.

    height and width are `size`, of pixels; base_channels is None of a published base network
    """

    num_frames: int
    size: int
    fps: float
    base_channels: Sequence[int] | None
    residual_channels: Sequence[int] | None
    layers_per_block: Sequence[int]
    patch_size: int
    lam: float | None
    base_path: str | None
    clean_share: float

    @classmethod
    def of(cls, settings: Any) -> Shape:
        """Those of settings that have its fields as attributes, among others."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


def pixel_model(
    shape: Shape, labels: tuple[str, ...], objective: str
) -> DecomposedConfig | PlainConfig:
    """Attention at the coarsest level, temporal convolutions one above it."""
    levels = len(shape.layers_per_block)
    coarsest = tuple(level == levels - 1 for level in range(levels))
    base = UNetConfig(  # for the output channels see models/denoisers.py
        out_channels=4,
        block_out_channels=shape.base_channels,
        layers_per_block=shape.layers_per_block,
        patch_size=shape.patch_size,
        spatial_attention=coarsest,
        temporal_attention=(False,) * levels,
        temporal_conv=(False,) * levels,
        head_dim=16,
        num_classes=len(labels),
        feed_forward_mult=0,
    )
    clips = {"height": shape.size, "width": shape.size, "channels": 3, **_clips(shape, labels)}
    if objective == "vdm":
        return PlainConfig(**clips, video=vdm_config(base))
    residual = replace(
        base,
        in_channels=6,
        out_channels=6,
        block_out_channels=shape.residual_channels,
        temporal_attention=coarsest,
        temporal_conv=tuple(level == levels - 2 for level in range(levels)),
        frame_embedding=True,
    )
    return DecomposedConfig(**clips, base=base, residual=residual, **_decomposition(shape))


def latent_model(
    shape: Shape, parts: Parts | PublishedParts, prompts: dict[str, str], residual_std: float
) -> DecomposedConfig:
    """Cells attend to each other and to the prompt: in the base network at every level.

    In the residual network they do below the finest level, and there frames attend to each other;
    at the finest, temporal convolutions tell frames of their neighbours. Published parts have a
    base network of their own, and a schedule.

    prompts: what each label stands for
    residual_std: see `latents.residual_std`

    Raises ValueError for a size that the autoencoder has no latents of, or a network no levels.
    """
    levels, channels = len(shape.layers_per_block), parts.autoencoder.latent_channels
    scale = parts.autoencoder.scale
    if shape.size % scale:
        raise ValueError(f"--size must be a multiple of {scale}, got {shape.size}")
    coarser = tuple(level > 0 for level in range(levels))
    base = UNetConfig(
        in_channels=channels,
        out_channels=channels + 1,
        block_out_channels=shape.base_channels or shape.residual_channels,
        layers_per_block=shape.layers_per_block,
        patch_size=shape.patch_size,
        spatial_attention=(True,) * levels,
        temporal_attention=(False,) * levels,
        temporal_conv=(False,) * levels,
        context_dim=parts.text_encoder.width,
    )
    residual = replace(
        base,
        in_channels=2 * channels,
        out_channels=channels + 3,
        block_out_channels=shape.residual_channels,
        spatial_attention=coarser,
        temporal_attention=coarser,
        temporal_conv=(True,) * levels,
        frame_embedding=True,
    )
    values = {
        **_clips(shape, tuple(prompts)),
        **{"height": shape.size // scale, "width": shape.size // scale, "channels": channels},
        **{"base": base, "residual": residual, "base_std": 1.0, "residual_std": residual_std},
        **{"prompts": tuple(prompts.values()), **_decomposition(shape), **parts.entries()},
    }
    multiple = scale * math.lcm(values["base"].size_multiple, residual.size_multiple)
    if shape.size % multiple:
        raise ValueError(f"--size must be a multiple of {multiple}, got {shape.size}")
    return DecomposedConfig(**values)


def _clips(shape: Shape, labels: tuple[str, ...]) -> dict:
    schedule = NoiseSchedule.linear().to_dict()
    return {
        **{"num_frames": shape.num_frames, "fps": shape.fps},
        **{"labels": tuple(labels), "schedule": schedule},
    }


def _decomposition(shape: Shape) -> dict:
    return {name: getattr(shape, name) for name in ("lam", "base_path", "clean_share")}
