"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): its decoder.

z [B, C, h, w] -> a 1x1 and a 3x3 convolution -> two residual blocks at the coarsest level, with
attention of all pixels between them -> per level, coarsest first, residual blocks, and from level
to level an upsampling to twice the size -> norm, SiLU, a 3x3 convolution -> [B, 3, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .empty import without_weights
from .layers import Attention, GroupNorm, ResBlock, Upsample, images, rows

_EPS = 1e-6  # of every norm


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder. A level is one resolution; widths are per level, finest first.

    latent_channels   even, since bfloat16 products take rows of even width
    layers_per_block  residual blocks of a level; a decoder has one more
    mid_attention     whether all pixels of the coarsest level attend to each other, in one head
    post_quant_conv   whether a decoder begins with a 1x1 convolution

    Raises ValueError, naming it, for a field of another type or range.
    """

    latent_channels: int = 4
    out_channels: int = 3
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    post_quant_conv: bool = True

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, tuple):
                fits = isinstance(value, (tuple, list)) and value and all(map(_is_count, value))
            else:
                fits = type(value) is type(f.default) and (value is False or value >= 1)
            if not fits:
                kind = type(f.default).__name__
                raise ValueError(f"AutoencoderConfig: {f.name} must be {kind}, got {value!r}")
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if self.latent_channels % 2:
            raise ValueError(
                f"AutoencoderConfig: latent_channels must be even, got {self.latent_channels}"
            )
        for width in self.block_out_channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"AutoencoderConfig: {width} channels are no multiple of "
                    f"norm_groups={self.norm_groups}"
                )

    @property
    def scale(self) -> int:
        """Pixels of an image for one of a latent, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class DecoderStep:
    """One layer of a decoder between its first convolution and the norm of its output.

    kind:   "resnet", "attention" or "upsample"
    block:  its level, counted from the coarsest; None: in the middle
    number: among the layers of its kind in the block
    """

    kind: str
    block: int | None
    number: int
    in_channels: int
    out_channels: int


def decoder_steps(config: AutoencoderConfig) -> Iterator[DecoderStep]:
    """The layers of a decoder in order, for building it and for reading files."""
    widths = config.block_out_channels[::-1]
    channels = widths[0]
    yield DecoderStep("resnet", None, 0, channels, channels)
    if config.mid_attention:
        yield DecoderStep("attention", None, 0, channels, channels)
    yield DecoderStep("resnet", None, 1, channels, channels)
    for block, width in enumerate(widths):
        for number in range(config.layers_per_block + 1):
            yield DecoderStep("resnet", block, number, channels, width)
            channels = width
        if block < len(widths) - 1:
            yield DecoderStep("upsample", block, 0, width, width)


class PixelAttention(nn.Module):
    """x + attention(norm(x)): the pixels of an image attend to each other, in one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, _EPS)
        self.attention = Attention(channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + images(self.attention(rows(self.norm(x))), *x.shape[-2:])

    def plan(self, build, x):
        return build.attention(x, self.norm, self.attention)


class Decoder(nn.Module):
    """forward(z [B, C, h, w]) -> images [B, 3, H, W], nominally in -1 .. 1."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        latent, widths = config.latent_channels, config.block_out_channels
        self.post_quant_conv = nn.Linear(latent, latent) if config.post_quant_conv else None
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.layers = nn.ModuleList(_layer(step, config) for step in decoder_steps(config))
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[0], _EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        h = z.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            h = images(self.post_quant_conv(rows(h)), *h.shape[-2:])
        h = self.conv_in(h)
        for layer in self.layers:
            h = layer(h)
        return self.conv_out(self.conv_norm_out(h, silu=True))

    def plan(self, build, z):
        h = z if self.post_quant_conv is None else build.linear(z, self.post_quant_conv)
        h = build.conv(h, self.conv_in)
        for layer in self.layers:
            h = layer.plan(build, h)
        h = build.group_norm(h, self.conv_norm_out, silu=True)
        return build.conv(h, self.conv_out, fp32=True)


def _layer(step: DecoderStep, config: AutoencoderConfig) -> nn.Module:
    if step.kind == "attention":
        return PixelAttention(step.out_channels, config.norm_groups)
    if step.kind == "upsample":
        return Upsample(step.out_channels, any_size=False)
    return ResBlock(
        step.in_channels, step.out_channels, None, config.norm_groups, scale_shift=False, eps=_EPS
    )


class Autoencoder(nn.Module):
    """Latents to images: `decode`.

    decoder: a `Decoder`, or what takes its place
    """

    def __init__(self, config: AutoencoderConfig, decoder: nn.Module):
        super().__init__()
        self.config, self.decoder = config, decoder

    def decode(self, z: Tensor) -> Tensor:
        """Clips [B, N, C, h, w] -> [B, N, 3, H, W], images [B, C, h, w] -> [B, 3, H, W].

        z in any float dtype, which is that of the result; as the network was trained on them, not
        multiplied by a pipeline's scaling factor. Frames are decoded one by one: memory does not
        grow with their number. Raises TypeError for a dtype, ValueError for a shape.
        """
        config = self.config
        if not z.is_floating_point():
            raise TypeError(f"Autoencoder: latents must be of a float dtype, got {z.dtype}")
        if z.dim() not in (4, 5) or z.shape[-3] != config.latent_channels or not z.numel():
            raise ValueError(
                "Autoencoder: expected [B, N, C, h, w] or [B, C, h, w], not empty, with "
                f"C = {config.latent_channels}, got shape {tuple(z.shape)}"
            )
        frames, size = z.flatten(0, -4), (side * config.scale for side in z.shape[-2:])
        out = z.new_empty(len(frames), config.out_channels, *size)
        for image, latent in zip(out, frames, strict=True):
            image.copy_(self.decoder(latent[None])[0])
        return out.unflatten(0, z.shape[:-3])


def empty_decoder(config: AutoencoderConfig) -> Decoder:
    """A decoder on the meta device; `load_state_dict(…, assign=True)` gives it its weights."""
    with without_weights():
        return Decoder(config)
