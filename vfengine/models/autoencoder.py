"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

Decoder: z [B, C, h, w] -> a 1x1 and a 3x3 convolution -> two residual blocks at the coarsest level,
with attention of all pixels between them -> per level, coarsest first, residual blocks, and from
level to level an upsampling to twice the size -> norm, SiLU, a 3x3 convolution -> [B, 3, H, W].

Encoder: the same way back, with a convolution of stride 2 from level to level, to the mean and the
log-variance of z, of which the mean is the result.

Pixels may be folded into channels before an encoder's first convolution, and back after a decoder's
last (`patch_size`): the finest level, which costs the most, is then of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .empty import without_weights
from .layers import GroupNorm, PaddedDownsample, PixelAttention, ResBlock, Upsample, images, rows

_EPS = 1e-6  # of every norm
_MOST_LAYERS = 2**6  # of a level: files hold no more

FrameCallback = Callable[[int, int], None]  # (frames done, frames in all)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder. A level is one resolution; widths are per level, finest first.

    latent_channels   even, since bfloat16 products take rows of even width
    in_channels, out_channels   of pictures, that are encoded and decoded
    layers_per_block  residual blocks of a level; a decoder has one more
    mid_attention     whether all pixels of the coarsest level attend to each other, in one head
    quant_conv, post_quant_conv   whether an encoder ends, and a decoder begins, with a 1x1
                      convolution
    patch_size        p folds p x p pixels into channels; published autoencoders have 1

    Raises ValueError, naming it, for a field of another type or range.
    """

    latent_channels: int = 4
    out_channels: int = 3
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    post_quant_conv: bool = True
    in_channels: int = 3
    quant_conv: bool = True
    patch_size: int = 1

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, tuple):
                fits = isinstance(value, (tuple, list)) and 1 <= len(value) <= 16
                fits = fits and all(map(_is_count, value))
            else:
                fits = type(value) is bool if type(f.default) is bool else _is_count(value)
            if not fits:
                kind = type(f.default).__name__
                raise ValueError(f"AutoencoderConfig: {f.name} must be {kind}, got {value!r}")
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if self.layers_per_block > _MOST_LAYERS:
            raise ValueError(
                f"AutoencoderConfig: layers_per_block may be {_MOST_LAYERS} at most, got "
                f"{self.layers_per_block}"
            )
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
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= 2**16


@dataclass(frozen=True)
class Step:
    """One layer of a decoder or encoder between its first convolution and the norm of its output.

    kind:   "resnet", "attention", "upsample" or "downsample"
    block:  its level, in the order of the layers; None: in the middle
    number: among the layers of its kind in the block
    """

    kind: str
    block: int | None
    number: int
    in_channels: int
    out_channels: int


def decoder_steps(config: AutoencoderConfig) -> Iterator[Step]:
    """The layers of a decoder in order, for building it and for reading files."""
    widths = config.block_out_channels[::-1]
    yield from _middle(config)
    yield from _levels(widths, widths[0], config.layers_per_block + 1, "upsample")


def encoder_steps(config: AutoencoderConfig) -> Iterator[Step]:
    """The layers of an encoder, as `decoder_steps`."""
    widths = config.block_out_channels
    yield from _levels(widths, widths[0], config.layers_per_block, "downsample")
    yield from _middle(config)


def _middle(config: AutoencoderConfig) -> Iterator[Step]:
    channels = config.block_out_channels[-1]
    yield Step("resnet", None, 0, channels, channels)
    if config.mid_attention:
        yield Step("attention", None, 0, channels, channels)
    yield Step("resnet", None, 1, channels, channels)


def _levels(widths: Sequence[int], channels: int, depth: int, resample: str) -> Iterator[Step]:
    """`depth` residual blocks a level, and a resampling between levels."""
    for block, width in enumerate(widths):
        for number in range(depth):
            yield Step("resnet", block, number, channels, width)
            channels = width
        if block < len(widths) - 1:
            yield Step(resample, block, 0, width, width)


class Decoder(nn.Module):
    """forward(z [B, C, h, w]) -> images [B, 3, H, W], nominally in -1 .. 1.

    Its `plan` gives patches of patch_size: results have `out_channels`.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.patches = (1, config.patch_size)  # of pixels, in and out of the layers
        self.config, self.out_channels = config, config.out_channels * config.patch_size**2
        latent, widths = config.latent_channels, config.block_out_channels
        self.post_quant_conv = nn.Linear(latent, latent) if config.post_quant_conv else None
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.layers = nn.ModuleList(_layer(step, config) for step in decoder_steps(config))
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[0], _EPS)
        self.conv_out = nn.Conv2d(widths[0], self.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        h = z.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            h = images(self.post_quant_conv(rows(h)), *h.shape[-2:])
        h = self.conv_in(h)
        for layer in self.layers:
            h = layer(h)
        h = self.conv_out(self.conv_norm_out(h, silu=True))
        return F.pixel_shuffle(h, self.config.patch_size)

    def plan(self, build, z):
        h = z if self.post_quant_conv is None else build.linear(z, self.post_quant_conv)
        h = build.conv(h, self.conv_in, padded=True)
        for layer in self.layers:
            h = layer.plan(build, h)
        h = build.group_norm(h, self.conv_norm_out, silu=True)
        return build.conv(h, self.conv_out, fp32=True)


class Encoder(nn.Module):
    """forward(images [B, 3, H, W] in -1 .. 1) -> the mean of z [B, C, h, w].

    Its `plan` takes patches of patch_size, and gives the log-variance too, after the mean: results
    have `out_channels` of it.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.patches = (config.patch_size, 1)
        self.config, self.out_channels = config, config.latent_channels
        latent, widths = config.latent_channels, config.block_out_channels
        folded = config.in_channels * config.patch_size**2
        self.conv_in = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.layers = nn.ModuleList(_layer(step, config) for step in encoder_steps(config))
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)  # mean, log-variance
        self.quant_conv = nn.Linear(2 * latent, 2 * latent) if config.quant_conv else None
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.moments(x)[:, : self.out_channels]

    def moments(self, x: Tensor) -> Tensor:
        """The mean of z and its log-variance, [B, 2 C, h, w]."""
        h = F.pixel_unshuffle(x.to(self.conv_in.weight.dtype), self.config.patch_size)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            h = layer(h)
        h = self.conv_out(self.conv_norm_out(h, silu=True))
        if self.quant_conv is not None:
            h = images(self.quant_conv(rows(h)), *h.shape[-2:])
        return h

    def plan(self, build, x):
        h = build.conv(x, self.conv_in, padded=True)
        for layer in self.layers:
            h = layer.plan(build, h)
        h = build.group_norm(h, self.conv_norm_out, silu=True)
        if self.quant_conv is None:
            return build.conv(h, self.conv_out, fp32=True)
        return build.linear(build.conv(h, self.conv_out), self.quant_conv)


def _layer(step: Step, config: AutoencoderConfig) -> nn.Module:
    if step.kind == "attention":
        return PixelAttention(step.out_channels, config.norm_groups, step.out_channels, _EPS)
    if step.kind == "upsample":
        return Upsample(step.out_channels, any_size=False)
    if step.kind == "downsample":
        return PaddedDownsample(step.out_channels)
    return ResBlock(
        step.in_channels, step.out_channels, None, config.norm_groups, scale_shift=False, eps=_EPS
    )


class Autoencoder(nn.Module):
    """Latents to pictures, and pictures to latents: `decode` and `encode`.

    decoder, encoder: a `Decoder` and an `Encoder`, or what takes their places; encoder None: none
                      was read

    Both take clips or images in any float dtype, which is that of the result. Frames are done one
    by one: memory does not grow with their number. callback: called as callback(frames done,
    frames in all) after each; what it raises stops the call. Raises TypeError for a dtype,
    ValueError for a shape.
    """

    def __init__(
        self, config: AutoencoderConfig, decoder: nn.Module, encoder: nn.Module | None = None
    ):
        super().__init__()
        self.config, self.decoder, self.encoder = config, decoder, encoder

    def decode(self, z: Tensor, callback: FrameCallback | None = None) -> Tensor:
        """Clips [B, N, C, h, w] -> [B, N, 3, H, W], images [B, C, h, w] -> [B, 3, H, W].

        z as the network was trained on them, not multiplied by a pipeline's scaling factor
        """
        config = self.config
        _check("latents", z, config.latent_channels, "h, w")
        sides = (side * config.scale for side in z.shape[-2:])
        out = z.new_empty(*z.shape[:-3], config.out_channels, *sides)
        return _by_frame(self.decoder, z, out, callback)

    def encode(self, x: Tensor, callback: FrameCallback | None = None) -> Tensor:
        """Clips [B, N, 3, H, W] in -1..1 -> [B, N, C, h, w], images [B, 3, H, W] -> [B, C, h, w].

        The result is the mean of z, and no sample. Height and width are multiples of config.scale.
        """
        config = self.config
        if self.encoder is None:
            raise ValueError("Autoencoder: no encoder was read")
        _check("pictures", x, config.in_channels, "H, W")
        if any(side % config.scale for side in x.shape[-2:]):
            raise ValueError(
                f"Autoencoder: height and width must be multiples of {config.scale}, got "
                f"{tuple(x.shape[-2:])}"
            )
        sides = (side // config.scale for side in x.shape[-2:])
        out = x.new_empty(*x.shape[:-3], config.latent_channels, *sides)
        return _by_frame(self.encoder, x, out, callback)


def _check(name: str, x: Tensor, channels: int, sides: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"Autoencoder: {name} must be of a float dtype, got {x.dtype}")
    if x.dim() not in (4, 5) or x.shape[-3] != channels or not x.numel():
        raise ValueError(
            f"Autoencoder: expected [B, N, C, {sides}] or [B, C, {sides}], not empty, with "
            f"C = {channels}, got shape {tuple(x.shape)}"
        )


def _by_frame(network: nn.Module, x: Tensor, out: Tensor, callback: FrameCallback | None) -> Tensor:
    frames, results = x.flatten(0, -4), out.flatten(0, -4)
    for done, (frame, result) in enumerate(zip(frames, results, strict=True), 1):
        result.copy_(network(frame[None])[0])
        if callback is not None:
            callback(done, len(frames))
    return out


def empty_decoder(config: AutoencoderConfig) -> Decoder:
    """A decoder on the meta device; `load_state_dict(…, assign=True)` gives it its weights."""
    with without_weights():
        return Decoder(config)


def empty_encoder(config: AutoencoderConfig) -> Encoder:
    """An encoder on the meta device, as `empty_decoder`."""
    with without_weights():
        return Encoder(config)
