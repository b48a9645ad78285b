"""One UNet for the base generator (images), the residual generator (clips) and plain video models.

Topology and names follow the UNets that diffusers publishes, so that their weights can be mapped
onto it: `layers_per_block[level]` residual blocks on the way down, one more on the way up, a middle
of two; after each residual block an optional temporal convolution, spatial transformer and temporal
transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import GroupNorm, ResBlock, TemporalConv, Transformer, sinusoidal_embedding

# what UNetConfig accepts: the least of its counts, and of its sequences' entries (None: booleans)
_LARGEST = 2**16
_COUNTS = {
    "in_channels": 1,
    "out_channels": 1,
    "patch_size": 1,
    "temporal_conv_depth": 1,
    "num_classes": 1,
    "context_dim": 1,
    "position_buckets": 0,
    "head_dim": 1,
    "norm_groups": 1,
    "feed_forward_mult": 0,
}
_PER_LEVEL = {
    "block_out_channels": 2,
    "layers_per_block": 0,
    "spatial_attention": None,
    "temporal_attention": None,
    "temporal_conv": None,
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. A level is one resolution; sequences hold one entry per level, finest first.

    patch_size        p folds p x p pixels into channels before the first convolution, and back
                      after the last
    spatial_attention, temporal_attention, temporal_conv    which levels have them (the middle: as
                      the last level)
    temporal_conv_depth    convolutions per temporal convolution block
    frame_embedding   adds an embedding of the frame's distance to the base frame N // 2
    num_classes       class labels 0 .. num_classes - 1, and the null class num_classes; None: no
                      classes
    context_dim       width of the context sequence that spatial transformers attend to; None: no
                      context
    position_buckets  of the relative position bias of temporal attention; 0: none
    feed_forward_mult, scale_shift, head_dim, norm_groups    see `layers`
    temporal_feed_forward    whether temporal transformers have the feed-forward layer too
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (64, 128, 256)
    layers_per_block: Sequence[int] = (1, 1, 1)
    patch_size: int = 1
    spatial_attention: Sequence[bool] = (False, False, True)
    temporal_attention: Sequence[bool] = (False, False, False)
    temporal_conv: Sequence[bool] = (False, False, False)
    temporal_conv_depth: int = 1
    frame_embedding: bool = False
    num_classes: int | None = None
    context_dim: int | None = None
    position_buckets: int = 32
    head_dim: int = 32
    norm_groups: int = 8
    feed_forward_mult: int = 2
    scale_shift: bool = True
    # Not in the repr, by which states of a training name their model: older ones stay good.
    temporal_feed_forward: bool = field(default=True, repr=False)

    def __post_init__(self):
        for name, lowest in _COUNTS.items():
            value = getattr(self, name)
            optional = value is None and name in ("num_classes", "context_dim")
            if not optional and not (_is_int(value) and lowest <= value <= _LARGEST):
                raise ValueError(
                    f"UNetConfig: {name} must be an int from {lowest} to {_LARGEST}, got {value!r}"
                )
        for name in ("frame_embedding", "scale_shift", "temporal_feed_forward"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"UNetConfig: {name} must be true or false")
        if self.position_buckets and self.position_buckets < 4:
            raise ValueError("UNetConfig: position_buckets must be 0, or 4 and more")
        levels = None
        for name, lowest in _PER_LEVEL.items():
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 16:
                raise ValueError(f"UNetConfig: {name} must be a sequence, got {value!r}")
            levels = levels or len(value)
            if len(value) != levels:
                raise ValueError(
                    f"UNetConfig: {name} needs {levels} entries, one per level, got {value}"
                )
            for entry in value:
                if lowest is None:
                    fits = isinstance(entry, bool)
                else:
                    fits = _is_int(entry) and lowest <= entry <= _LARGEST
                if not fits:
                    raise ValueError(f"UNetConfig: {name} cannot hold {entry!r}")
            object.__setattr__(self, name, tuple(value))
        for channels in self.block_out_channels:
            if channels % self.norm_groups or channels % self.head_dim:
                raise ValueError(
                    f"UNetConfig: {channels} channels are no multiple of "
                    f"norm_groups={self.norm_groups} and head_dim={self.head_dim}"
                )

    @property
    def is_video(self) -> bool:
        """Whether the UNet takes clips [B, N, C, H, W]; otherwise images [B, C, H, W]."""
        return self.frame_embedding or any(self.temporal_attention) or any(self.temporal_conv)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


def vdm_config(base: UNetConfig, channels: Sequence[int] | None = None) -> UNetConfig:
    """VDM*: an image UNet made a plain video model (Ho et al. 2022, arXiv 2204.03458).

    After every spatial attention comes a temporal one with a relative position bias, and nothing
    else: the image UNet's weights are a part of its weights, and a temporal layer starts at zero.

    channels: per level, in place of the base's

    Raises ValueError for a base that is a video UNet already, or that has no spatial attention.
    """
    if base.is_video or not any(base.spatial_attention):
        raise ValueError(
            "vdm_config: needs an image UNet with spatial attention, got "
            + ("a video UNet" if base.is_video else "one without")
        )
    return replace(
        base,
        block_out_channels=base.block_out_channels if channels is None else channels,
        temporal_attention=base.spatial_attention,
        temporal_feed_forward=False,
        position_buckets=max(base.position_buckets, UNetConfig.position_buckets),
    )


class Stage(nn.Module):
    """A residual block, then the temporal convolution, spatial and temporal transformer it has."""

    def __init__(self, in_channels: int, level: int, config: UNetConfig, attention: bool = True):
        super().__init__()
        channels = config.block_out_channels[level]
        embed_dim = 4 * config.block_out_channels[0]
        self.resnet = ResBlock(
            in_channels, channels, embed_dim, config.norm_groups, config.scale_shift
        )
        self.temp_conv = self.spatial = self.temporal = None
        if config.temporal_conv[level]:
            self.temp_conv = TemporalConv(channels, config.norm_groups, config.temporal_conv_depth)
        if attention and config.spatial_attention[level]:
            self.spatial = Transformer(channels, "space", config)
        if attention and config.temporal_attention[level]:
            mult = config.feed_forward_mult if config.temporal_feed_forward else 0
            self.temporal = Transformer(channels, "time", replace(config, feed_forward_mult=mult))

    def forward(
        self, x: Tensor, embedding: Tensor, num_frames: int, context: Tensor | None
    ) -> Tensor:
        x = self.resnet(x, embedding)
        if self.temp_conv is not None:
            x = self.temp_conv(x, num_frames)
        if self.spatial is not None:
            x = self.spatial(x, num_frames, context)
        if self.temporal is not None:
            x = self.temporal(x, num_frames)
        return x


class UNet(nn.Module):
    """forward(x, t, context=None, class_labels=None): images or, with anything temporal, clips."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, depths = config.block_out_channels, config.layers_per_block
        levels, folded = len(widths), config.patch_size**2
        self.time_dim, embed_dim = widths[0], 4 * widths[0]
        self.time_embedding = _mlp(self.time_dim, embed_dim)
        self.class_embedding = (
            nn.Embedding(config.num_classes + 1, embed_dim)
            if config.num_classes is not None
            else None
        )
        self.frame_embedding = _mlp(self.time_dim, embed_dim) if config.frame_embedding else None
        # a sum lets class and frame act only side by side; this lets "frame 3 of a cartwheel" mean
        # something
        self.embedding_mixer = _mlp(embed_dim, embed_dim) if config.frame_embedding else None

        self.conv_in = nn.Conv2d(config.in_channels * folded, widths[0], 3, padding=1)
        skips, channels = [widths[0]], widths[0]
        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(depths[level]):
                stages.append(Stage(channels, level, config))
                channels = width
                skips.append(channels)
            self.down.append(stages)
            if level + 1 < levels:
                self.downsamplers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        last = levels - 1
        self.mid = nn.ModuleList(
            [Stage(channels, last, config), Stage(channels, last, config, attention=False)]
        )
        self.up, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(levels)):
            stages = nn.ModuleList()
            for _ in range(depths[level] + 1):
                stages.append(Stage(channels + skips.pop(), level, config))
                channels = widths[level]
            self.up.append(stages)
            if level:
                self.upsamplers.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv_norm_out = GroupNorm(config.norm_groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels * folded, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction, of the shape of x but with out_channels.

        x [B, C, H, W] or [B, N, C, H, W], t int64 [B], context [B, M, C'], class_labels int64 [B]

        Without class_labels a class-conditional UNet takes the null class. Raises ValueError for a
        shape that does not fit the configuration, or for labels or a context that the network has
        no place for.
        """
        config = self.config
        self._check(x, t, context, class_labels)
        num_frames = x.shape[1] if config.is_video else 1
        frames = x.flatten(0, 1) if config.is_video else x  # [B*N, C, H, W], a view
        embedding = F.silu(self._embedding(t, class_labels, num_frames, x.device))
        if context is not None:
            context = context.to(self.dtype).repeat_interleave(num_frames, dim=0)

        h = F.pixel_unshuffle(frames.to(self.dtype), config.patch_size)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:
                h = stage(h, embedding, num_frames, context)
                skips.append(h)
            if level < len(self.downsamplers):
                h = self.downsamplers[level](h)
                skips.append(h)
        for stage in self.mid:
            h = stage(h, embedding, num_frames, context)
        for level, stages in enumerate(self.up):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), embedding, num_frames, context)
            if level < len(self.upsamplers):
                h = self.upsamplers[level](F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.conv_out(F.silu(self.conv_norm_out(h)).to(h.dtype))
        h = F.pixel_shuffle(h, config.patch_size)
        return h.unflatten(0, (-1, num_frames)) if config.is_video else h

    def _embedding(self, t: Tensor, class_labels: Tensor | None, num_frames: int, device) -> Tensor:
        """[B*N, E]: of the timestep, the class and the frame."""
        timestep = sinusoidal_embedding(t, self.time_dim).to(self.dtype)
        embedding = self.time_embedding(timestep)  # [B, E]
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(t, self.config.num_classes)
            embedding = embedding + self.class_embedding(class_labels)
        if self.frame_embedding is not None:
            # 60 a frame: 16 frames span about the 1000 timesteps whose frequencies these are
            offsets = (torch.arange(num_frames, device=device) - num_frames // 2) * 60.0
            frame = self.frame_embedding(
                sinusoidal_embedding(offsets, self.time_dim).to(self.dtype)
            )
            embedding = embedding[:, None] + frame  # [B, N, E]
            embedding = embedding + self.embedding_mixer(F.silu(embedding))
            return embedding.flatten(0, 1)
        return embedding.repeat_interleave(num_frames, dim=0)

    def _check(
        self, x: Tensor, t: Tensor, context: Tensor | None, class_labels: Tensor | None
    ) -> None:
        config, multiple = self.config, self.config.size_multiple
        form = "[B, N, C, H, W]" if config.is_video else "[B, C, H, W]"
        if x.dim() != (5 if config.is_video else 4) or x.shape[-3] != config.in_channels:
            raise ValueError(
                f"UNet: expected {form} with C = {config.in_channels}, got shape {tuple(x.shape)}"
            )
        if x.shape[-1] % multiple or x.shape[-2] % multiple:
            raise ValueError(
                f"UNet: height and width must be multiples of {multiple}, got {tuple(x.shape[-2:])}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"UNet: t must have shape [{x.shape[0]}], got {tuple(t.shape)}")
        if class_labels is not None and (
            self.class_embedding is None or class_labels.shape != x.shape[:1]
        ):
            raise ValueError(
                f"UNet: class_labels {tuple(class_labels.shape)} given to a UNet "
                f"with num_classes={config.num_classes} and a batch of {x.shape[0]}"
            )
        if context is not None and (
            config.context_dim is None or context.shape[-1] != config.context_dim
        ):
            raise ValueError(
                f"UNet: context {tuple(context.shape)} given to a UNet "
                f"with context_dim={config.context_dim}"
            )


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )
