"""One UNet for the base generator (images), the residual generator (clips) and plain video models.

Topology and names follow the UNets that diffusers publishes, so that their weights can be mapped
onto it: `layers_per_block[level]` residual blocks on the way down, one more on the way up, a middle
of two; after each residual block an optional temporal convolution, spatial transformer and temporal
transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusion.decompose import base_index
from ..diffusion.schedule import batch_timesteps, check_input
from .config import UNetConfig
from .empty import without_weights
from .layers import (
    Conv3x3,
    Downsample,
    GroupNorm,
    PaddedDownsample,
    PixelAttention,
    ResBlock,
    TemporalConv,
    Transformer,
    Upsample,
    autocast,
    zero_,
)
from .patches import from_patches, to_patches
from .positions import sinusoidal_embedding
from .topology import Step, shallow_stages, topology

if TYPE_CHECKING:
    from ..sampling.features import Kept


class Stage(nn.Module):
    """A residual block, then temporal convolution, spatial and temporal transformer, if any.

    With pixel_attention, that stands in the place of the spatial transformer.
    """

    def __init__(self, step: Step, config: UNetConfig):
        super().__init__()
        level = step.level
        channels, groups = config.block_out_channels[level], config.norm_groups
        embed_dim = 4 * config.block_out_channels[0]
        self.resnet = ResBlock(
            step.in_channels, channels, embed_dim, groups, config.scale_shift, config.norm_eps
        )
        self.temp_conv = self.spatial = self.temporal = self.pixels = None
        if config.temporal_conv[level]:
            self.temp_conv = TemporalConv(channels, groups, config.temporal_conv_depth)
        spatial, temporal = step.attends
        head_dim = config.level_head_dims[level]
        if spatial and config.pixel_attention:
            self.pixels = PixelAttention(channels, groups, head_dim, config.norm_eps)
        elif spatial:
            depth = config.transformer_depths[level] if config.transformer_depths else 1
            self.spatial = Transformer(channels, "space", config, head_dim, depth=depth)
        if temporal:
            mult = config.feed_forward_mult if config.temporal_feed_forward else 0
            temporal_config = replace(config, feed_forward_mult=mult)
            self.temporal = Transformer(channels, "time", temporal_config, head_dim)

    def forward(
        self, x: Tensor, embedding: Tensor, num_frames: int, context: Tensor | None
    ) -> Tensor:
        x = self.resnet(x, embedding)
        if self.temp_conv is not None:
            x = self.temp_conv(x, num_frames)
        if self.pixels is not None:
            x = self.pixels(x)
        if self.spatial is not None:
            x = self.spatial(x, num_frames, context)
        if self.temporal is not None:
            x = self.temporal(x, num_frames)
        return x

    def plan(self, build, x, context):
        x = self.resnet.plan(build, x)
        if self.temp_conv is not None:
            x = self.temp_conv.plan(build, x)
        if self.pixels is not None:
            x = self.pixels.plan(build, x)
        if self.spatial is not None:
            x = self.spatial.plan(build, x, context)
        if self.temporal is not None:
            x = self.temporal.plan(build, x)
        return x


class Embeddings(nn.Module):
    """The embedding of timestep, class, guidance scale and frame, which conditions a UNet."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_dim = config.block_out_channels[0]
        embed_dim = 4 * self.time_dim
        self.time_embedding = _mlp(self.time_dim, embed_dim)
        self.class_embedding = _class_embedding(config, self.time_dim, embed_dim)
        self.guidance_embedding = None
        if config.guidance_embedding:
            self.guidance_embedding = _mlp(self.time_dim, embed_dim)
            zero_(self.guidance_embedding[-1])  # a student begins as its teacher
        self.frame_embedding = _mlp(self.time_dim, embed_dim) if config.frame_embedding else None
        # a sum alone has no term for class and frame together, such as "frame 3 of a cartwheel"
        self.embedding_mixer = _mlp(embed_dim, embed_dim) if config.frame_embedding else None

    @property
    def dtype(self) -> torch.dtype:
        return self.time_embedding[0].weight.dtype

    @property
    def embed_dim(self) -> int:
        return self.time_embedding[-1].out_features

    def embed(
        self,
        t: Tensor,
        class_labels: Tensor | None,
        num_frames: int,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """The embedding [B*N, E] of timestep, class, guidance and frame, before the UNet's SiLU.

        Raises ValueError for missing labels where there is no null class, and for a guidance scale
        that is missing or has no meaning.
        """
        config = self.config
        embedding = self.time_embedding(self._sinusoids(t))  # [B, E]
        if self.guidance_embedding is not None:
            embedding = embedding + self._guidance(t, guidance)
        elif guidance is not None:
            raise ValueError("UNet: guidance given to a UNet without an embedding of it")
        if self.class_embedding is not None:
            kind = config.class_embedding
            if class_labels is None:
                if kind != "null":
                    raise ValueError("UNet: class_labels are needed, this UNet has no null class")
                class_labels = torch.full_like(t, config.num_classes)
            if kind == "timestep":
                class_labels = self._sinusoids(class_labels)
            elif kind == "projection":
                class_labels = class_labels.to(self.dtype)
            try:
                embedding = embedding + self.class_embedding(class_labels)
            except IndexError as error:  # on a CPU; CUDA's kernel ends the process's CUDA
                last = self.class_embedding.num_embeddings - 1
                raise ValueError(
                    f"UNet: class_labels must lie in 0 … {last}, got {class_labels.tolist()}"
                ) from error
        if self.frame_embedding is not None:
            # 60 a frame: 16 frames span about the 1000 timesteps whose frequencies these are
            frames = torch.arange(num_frames, device=t.device, dtype=torch.float32)
            offsets = (frames - base_index(num_frames)) * 60.0
            frame = self.frame_embedding(
                sinusoidal_embedding(offsets, self.time_dim).to(self.dtype)
            )
            embedding = embedding[:, None] + frame  # [B, N, E]
            embedding = embedding + self.embedding_mixer(F.silu(embedding))
            return embedding.flatten(0, 1)
        return embedding.repeat_interleave(num_frames, dim=0)

    def _guidance(self, t: Tensor, guidance: Tensor | float | None) -> Tensor:
        """The embedding [B, E] of the guidance scale, a number or [B]."""
        if guidance is None:
            raise ValueError("UNet: guidance is needed: its scale is an input of this UNet")
        if not isinstance(guidance, Tensor):  # a captured step cannot copy from the host
            guidance = torch.full(t.shape, guidance, dtype=torch.float32, device=t.device)
        return self.guidance_embedding(self._sinusoids(100.0 * guidance))

    def _sinusoids(self, t: Tensor) -> Tensor:
        """t [B] -> [B, C], the input of an embedding's first layer."""
        sin_first, shift = self.config.sin_first, self.config.frequency_shift
        return sinusoidal_embedding(t, self.time_dim, sin_first=sin_first, shift=shift).to(
            self.dtype
        )

    def check_inputs(
        self, x: Tensor, t: Tensor, context: Tensor | None, class_labels: Tensor | None
    ) -> Tensor:
        """t as [B]; TypeError or ValueError for inputs that do not fit this configuration.

        Also for those that it needs and lacks.
        """
        check_input("UNet", x)
        for name, value in {"context": context, "class_labels": class_labels}.items():
            if not isinstance(value, Tensor | None):
                raise TypeError(f"UNet: {name} must be a tensor, got {type(value).__name__}")
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
        t = batch_timesteps("UNet", t, x)
        features = () if config.class_features is None else (config.class_features,)
        if class_labels is not None and (
            self.class_embedding is None or class_labels.shape != (x.shape[0], *features)
        ):
            raise ValueError(
                f"UNet: class_labels {tuple(class_labels.shape)} given to a UNet "
                f"with num_classes={config.num_classes} and a batch of {x.shape[0]}"
            )
        if class_labels is not None and isinstance(self.class_embedding, nn.Embedding):
            if class_labels.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"UNet: class_labels must be int64, got {class_labels.dtype}")
        if context is not None and (
            config.context_dim is None or context.shape[-1] != config.context_dim
        ):
            raise ValueError(
                f"UNet: context {tuple(context.shape)} given to a UNet "
                f"with context_dim={config.context_dim}"
            )
        if context is None and config.needs_context:
            raise ValueError(
                f"UNet: needs a context [{x.shape[0]}, M, {config.context_dim}], got none"
            )
        return t


class UNet(Embeddings):
    """forward(x, t, context=None, class_labels=None): images, or clips if any layer is temporal."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        widths, folded = config.block_out_channels, config.patch_size**2
        self.conv_in = Conv3x3(config.in_channels * folded, widths[0])
        self.transformer_in = None
        if config.transformer_in_heads is not None:
            self.transformer_in = Transformer(
                widths[0], "time", config, heads=config.transformer_in_heads
            )
        self.down = nn.ModuleList(nn.ModuleList() for _ in widths)
        self.downsamplers, self.mid = nn.ModuleList(), nn.ModuleList()
        self.up = nn.ModuleList(nn.ModuleList() for _ in widths)
        self.upsamplers = nn.ModuleList()
        self.steps: list[tuple[Step, nn.Module]] = []  # with their layers
        for step in topology(config):
            layer = _layer(step, config)
            self.get_submodule(step.name.rpartition(".")[0]).append(layer)
            self.steps.append((step, layer))
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[0], config.norm_eps)
        self.conv_out = zero_(Conv3x3(widths[0], config.out_channels * folded))
        self.checkpoints = False  # whether stages are computed again for the gradient
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | float | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """The network's prediction, of the shape of x but with out_channels.

        x [B, C, H, W] or [B, N, C, H, W], t int64 [B]
        context [B, M, C'], the same for all frames
        class_labels int64 [B], or [B, F] numbers where class_embedding is "projection"
        guidance the guidance scale, a number or [B], of a UNet with guidance_embedding
        kept: where deep features are left, or found by a shallow call, which runs few layers

        Without class_labels the null class is used, if there is one. Without a context its
        attention is left out, unless needs_context. Raises ValueError for a shape that does not fit
        the configuration, for labels or a context that the network does not take, and for missing
        ones that it needs.
        """
        config = self.config
        t = self.check_inputs(x, t, context, class_labels)
        num_frames = x.shape[1] if config.is_video else 1
        frames = x.flatten(0, 1) if config.is_video else x  # [B*N, C, H, W], a view
        embedding = F.silu(self.embed(t, class_labels, num_frames, guidance))
        if context is not None:
            context = context.to(self.dtype)

        h = self.conv_in(to_patches(autocast(frames.to(self.dtype)), config.patch_size))
        if self.transformer_in is not None:
            h = self.transformer_in(h, num_frames)
        skips = [h]
        del h  # the list alone keeps it, and lets it go where it is joined
        h = self._run_layers(
            skips,
            join=lambda h, skip: torch.cat([h, skip], dim=1),
            stage=lambda layer, h: self._stage(layer, h, embedding, num_frames, context),
            resample=lambda layer, h, skip: layer(h, skip),
            kept=kept,
        )
        h = self.conv_out(self.conv_norm_out(h, silu=True))
        h = from_patches(h, config.patch_size)
        return h.unflatten(0, (-1, num_frames)) if config.is_video else h

    def _stage(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """A stage, of which training with `checkpoints` keeps the inputs alone."""
        if self.checkpoints and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def plan(self, build, x, context=None, kept=None):
        """`forward` on images in patches, as calls of a builder (vfengine/plan/walk.py)."""

        h = build.conv(x, self.conv_in, padded=True)
        if self.transformer_in is not None:
            h = self.transformer_in.plan(build, h)
        h = self._run_layers(
            [h],
            join=build.cat,
            stage=lambda layer, h: layer.plan(build, h, context),
            resample=lambda layer, h, skip: layer.plan(build, h, skip),
            kept=kept,
        )
        h = build.group_norm(h, self.conv_norm_out, silu=True)
        return build.conv(h, self.conv_out, fp32=True)

    def _run_layers(
        self,
        skips: list[Any],
        *,
        join: Callable,
        stage: Callable,
        resample: Callable,
        kept: Any = None,
    ) -> Any:
        """Runs h down, through the middle and up; h is a tensor, or a builder's value.

        skips:    the first h, which is a skip itself; used up
        join:     (h, skip) -> h, concatenated
        stage:    (layer, h) -> h
        resample: (layer, h, the last skip, to whose size an upsampler goes) -> h
        kept:     its exchange(h) -> h stands between the deep and the shallow part; if it is
                  `shallow`, that part runs alone. None: no step is left out
        """
        h = skips[-1]
        count = shallow_stages(self.config)
        before, up = self.steps[:-count], self.steps[-count:]
        if kept is not None and kept.shallow:
            before = before[: count - 1]
        for step, layer in (*before, *up):
            if kept is not None and step is up[0][0]:
                h = kept.exchange(h)
            if step.joins_skip:
                h = join(h, skips.pop())
            h = stage(layer, h) if step.kind == "stage" else resample(layer, h, skips[-1])
            if step.leaves_skip:
                skips.append(h)
        return h

    def embeddings(self) -> Embeddings:
        """The embeddings alone, with the same layers under the same names."""
        with without_weights():
            alone = Embeddings(self.config)
        for name in [name for name, _ in alone.named_children()]:
            setattr(alone, name, getattr(self, name))
        return alone


def _layer(step: Step, config: UNetConfig) -> nn.Module:
    if step.kind == "stage":
        return Stage(step, config)
    if step.kind == "downsample":
        return (PaddedDownsample if config.padded_after else Downsample)(step.in_channels)
    return Upsample(step.in_channels, config.any_size)


def _class_embedding(config: UNetConfig, time_dim: int, embed_dim: int) -> nn.Module | None:
    """The embedding of class labels; None if the network takes none."""
    if config.class_embedding == "timestep":
        return _mlp(time_dim, embed_dim)
    if config.class_embedding == "projection":
        return _mlp(config.class_features, embed_dim)
    if config.num_classes is None:
        return None
    null = config.class_embedding == "null"
    return nn.Embedding(config.num_classes + null, embed_dim)


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )


def empty_unet(config: UNetConfig) -> UNet:
    """A UNet on the meta device; `load_state_dict(…, assign=True)` gives it its weights."""
    with without_weights():
        return UNet(config)
