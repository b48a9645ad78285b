"""Building blocks of the UNet family.

Activations are `[B*N, C, H, W]` in channels_last memory, that is rows of C contiguous numbers:
`[B*N, H*W, C]` for a spatial transformer and `[B, N, H*W, C]` for a temporal one are views of the
same memory, never copies.

`forward` is for training: in plain PyTorch and, where autograd records, in kernels of our own that
have a gradient (vfengine/ops/differentiable.py). A layer has `plan` beside it for inference: the
same formula as calls of a builder (vfengine/plan), which chooses the kernels. Only the builder
knows what x and the result are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attend
from ..ops.conv3x3 import conv3x3_pays, differentiable_conv3x3
from ..ops.differentiable import records_gradients
from ..ops.geglu_backward import differentiable_geglu
from ..ops.group_norm_silu_backward import differentiable_group_norm_silu
from ..ops.layer_norm_backward import differentiable_layer_norm, layer_norm_pays
from ..ops.temporal_attention_backward import (
    differentiable_temporal_attention,
    temporal_attention_takes,
)
from .positions import RelativePositionBias


def rows(x: Tensor) -> Tensor:
    """[B, C, H, W] channels_last -> [B, H*W, C], a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def images(x: Tensor, height: int, width: int) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W] channels_last, a view."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast would have a convolution take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def zero_(layer: nn.Module) -> nn.Module:
    """Start a residual branch's last layer at zero, so that the branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """GroupNorm in fp32 whatever comes in: CPUs' channels_last bf16 kernel is 3 times slower."""

    def forward(
        self,
        x: Tensor,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """SiLU(norm(x) (1 + scale) + shift) in x's dtype; SiLU, scale and shift are optional.

        x [B, C, H, W] channels_last; scale, shift [B, C], both or neither. For statistics over all
        frames pass a clip [B, C, N, H*W].
        """
        if records_gradients(x, self.weight, scale):
            tables = self.weight.float(), self.bias.float()
            return differentiable_group_norm_silu(
                x, self.num_groups, *tables, self.eps, scale, shift, silu
            )
        weight, bias = self.weight.float(), self.bias.float()
        h = F.group_norm(x.float(), self.num_groups, weight, bias, self.eps)
        if scale is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return (F.silu(h) if silu else h).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm of rows [..., C], in our kernels where autograd records and they are faster."""

    def forward(self, x: Tensor) -> Tensor:
        if records_gradients(x, self.weight) and layer_norm_pays(x):
            tables = self.weight.float(), self.bias.float()
            return differentiable_layer_norm(x.contiguous(), *tables, self.eps)
        return super().forward(x)


class Conv3x3(nn.Conv2d):
    """3x3 of stride 1 with padding 1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: as the result, to which it is added"""
        x = autocast(x)
        if records_gradients(x, self.weight) and conv3x3_pays(x, self.weight):
            if residual is None or residual.dtype is x.dtype:
                return differentiable_conv3x3(x, self.weight, self.bias, residual)
        out = super().forward(x)
        return out if residual is None else residual + out


class Downsample(nn.Conv2d):
    """3x3 of stride 2: half the height and width, an odd one rounded up."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return super().forward(x)

    def plan(self, build, x, skip):
        return build.conv(x, self)


class PaddedDownsample(nn.Conv2d):
    """3x3 of stride 2 with zeros below and to the right alone; of even sizes."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))

    def plan(self, build, x, skip=None):
        return build.conv(x, self)


class Upsample(Conv3x3):
    """3x3 after nearest-neighbour upsampling.

    any_size: upsample to the size of the skip, since downsampling rounds odd sizes up; otherwise
              to twice the size
    """

    def __init__(self, channels: int, any_size: bool):
        super().__init__(channels, channels)
        self.any_size = any_size

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        size = {"size": skip.shape[-2:]} if self.any_size else {"scale_factor": 2}
        return super().forward(F.interpolate(x, **size, mode="nearest"))

    def plan(self, build, x, skip=None):
        return build.upsampled_conv(x, self, skip)


class ResBlock(nn.Module):
    """Two 3x3 convolutions; between them the embedding scales and shifts.

    With scale_shift=False it only shifts. embed_dim None: there is no embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int | None,
        groups: int,
        scale_shift: bool,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = None
        if embed_dim is not None:
            self.time_emb_proj = nn.Linear(embed_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = zero_(Conv3x3(out_channels, out_channels))
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x [B*N, C, H, W], embedding [B*N, E] (already through SiLU) -> [B*N, C', H, W]."""
        h = self.conv1(self.norm1(x, silu=True))
        scale_and_shift = ()
        if self.time_emb_proj is not None:
            modulation = self.time_emb_proj(embedding)
            if self.scale_shift:
                scale_and_shift = modulation.chunk(2, dim=1)
            else:
                h = h + modulation[:, :, None, None]
        return self.conv2(self.norm2(h, True, *scale_and_shift), self.conv_shortcut(x))

    def plan(self, build, x):
        h = build.group_norm(x, self.norm1, silu=True)
        if self.scale_shift:
            h = build.conv(h, self.conv1)
            h = build.group_norm(h, self.norm2, silu=True, modulation=self.time_emb_proj)
        else:
            h = build.conv(h, self.conv1, shift=self.time_emb_proj)
            h = build.group_norm(h, self.norm2, silu=True)
        return build.conv(h, self.conv2, plus=(self.conv_shortcut, x))


class TemporalConv(nn.Module):
    """`depth` convolutions over three neighbouring frames at each pixel, added to their input."""

    def __init__(self, channels: int, groups: int, depth: int):
        super().__init__()
        self.norms = nn.ModuleList(GroupNorm(groups, channels) for _ in range(depth))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)) for _ in range(depth)
        )
        zero_(self.convs[-1])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x [B*N, C, H, W] -> the same; inside [B, C, N, H*W]: kernel (3, 1) runs along frames."""
        height, width = x.shape[-2:]
        h = rows(x).unflatten(0, (-1, num_frames)).permute(0, 3, 1, 2)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(norm(h, silu=True))
        return x + images(h.permute(0, 2, 3, 1).flatten(0, 1), height, width)

    def plan(self, build, x):
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = build.group_norm(h, norm, silu=True, over_frames=True)
            h = build.conv_over_frames(h, conv, residual=x if conv is self.convs[-1] else None)
        return h


class Attention(nn.Module):
    """Multi-head attention of rows x [..., L, C] to themselves or to a context [..., M, C'].

    bias: of q, k and v; the projection back always has one
    """

    def __init__(
        self, channels: int, head_dim: int, context_dim: int | None = None, bias: bool = False
    ):
        super().__init__()
        self.heads, self.head_dim = channels // head_dim, head_dim
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias)
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """bias [heads, L, M] is added to the logits.

        A context [B, M, C'] may serve x [B*N, L, C], the N frames of each of B clips.
        """
        source = x if context is None else context
        queries = x.reshape(*source.shape[:-2], -1, x.shape[-1])  # those of all frames together
        split = (self.heads, self.head_dim)
        q, k, v = (
            layer(value).unflatten(-1, split).transpose(-3, -2)
            for layer, value in ((self.to_q, queries), (self.to_k, source), (self.to_v, source))
        )
        out = self.to_out(attend(q, k, v, bias).transpose(-3, -2).flatten(-2))
        return out.view_as(x)

    def over_frames(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """self(x, bias=bias) of each pixel's frames, x [B, N, H*W, C], which nothing permutes."""
        qkv = F.linear(x, torch.cat([layer.weight for layer in (self.to_q, self.to_k, self.to_v)]))
        bias = None if bias is None else bias.float().contiguous()
        return self.to_out(differentiable_temporal_attention(qkv, self.heads, bias))


class PixelAttention(nn.Module):
    """x + attention(norm(x)): the pixels of an image attend to each other."""

    def __init__(self, channels: int, groups: int, head_dim: int, eps: float):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps)
        self.attention = Attention(channels, head_dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + images(self.attention(rows(self.norm(x))), *x.shape[-2:])

    def plan(self, build, x):
        return build.attention(x, self.norm, self.attention)


class FeedForward(nn.Module):
    """GEGLU: C -> mult * C, gated by a second projection, -> C."""

    def __init__(self, channels: int, mult: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * mult * channels)
        self.out = nn.Linear(mult * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        if records_gradients(h):
            return self.out(differentiable_geglu(h.contiguous()))
        value, gate = h.chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))

    def plan(self, build, x, residual, then=None):
        """residual + self(x); with `then`, also the linear layer after it (`build.linear`)."""
        return build.linear(build.geglu(x, self.proj), self.out, residual=residual, then=then)


class TransformerBlock(nn.Module):
    """Self-attention, a second attention and a feed-forward layer, each behind a LayerNorm.

    axis "space": each frame's H*W pixels attend to each other, then to the context (where the
                  configuration has one).
    axis "time":  each pixel's N frames attend to each other, with a relative position bias (where
                  it has one), then once more (where it says so), without.
    """

    def __init__(self, channels: int, axis: str, config, head_dim: int, **ends: nn.Module):
        """ends: layers around the block, whose weights come before its own"""
        super().__init__()
        for name, layer in ends.items():
            self.add_module(name, layer)
        self.axis = axis
        self.norm1, self.attn1 = LayerNorm(channels), Attention(channels, head_dim)
        self.norm2 = self.attn2 = self.norm3 = self.ff = self.bias = None
        if axis == "space" and config.context_dim:
            self.norm2 = LayerNorm(channels)
            self.attn2 = Attention(channels, head_dim, config.context_dim)
        if axis == "time" and config.temporal_self_attentions == 2:
            self.norm2, self.attn2 = LayerNorm(channels), Attention(channels, head_dim)
        if axis == "time" and config.position_buckets:
            self.bias = RelativePositionBias(self.attn1.heads, config.position_buckets)
        if config.feed_forward_mult:
            self.norm3 = LayerNorm(channels)
            self.ff = FeedForward(channels, config.feed_forward_mult)

    def forward(
        self,
        h: Tensor,
        num_frames: int,
        context: Tensor | None = None,
        frames_first: bool = False,
    ) -> Tensor:
        """h -> the same shape; context [B, M, C'] or None.

        h is [B*N, H*W, C]; over time [B, H*W, N, C], or [B, N, H*W, C] with frames_first.
        """
        for norm, attention, source, bias in self.attentions(context):
            bias = None if bias is None else bias(num_frames, h.device)
            if frames_first:
                h = h + attention.over_frames(norm(h), bias)
            else:
                h = h + attention(norm(h), source, bias)
        if self.ff is not None:
            h = h + self.ff(self.norm3(h))
        return h

    def attentions(self, context):
        """(norm, attention, context or None, position bias or None) of each attention that runs."""
        yield self.norm1, self.attn1, None, self.bias
        if self.attn2 is not None and (self.axis == "time" or context is not None):
            yield self.norm2, self.attn2, context, None

    def plan(self, build, h, context=None, then=None):
        """then: the linear layer that follows, and what is added to its result (`build.linear`)"""
        over_frames = self.axis == "time"
        for norm, attention, source, bias in self.attentions(context):
            h = build.attention(h, norm, attention, source, bias=bias, over_frames=over_frames)
        if self.ff is not None:
            return self.ff.plan(build, build.layer_norm(h, self.norm3), h, then)
        return h if then is None else build.linear(h, then[0], residual=then[1])


class Transformer(TransformerBlock):
    """GroupNorm and a projection, transformer blocks, a projection back; added to the input.

    It is itself its first block, for the names of weights in files; `rest` holds the others.

    heads:  None: as many as fit into the channels; heads * head_dim is the blocks' width
    depth:  number of blocks
    """

    def __init__(
        self,
        channels: int,
        axis: str,
        config,
        head_dim: int | None = None,
        heads: int | None = None,
        depth: int = 1,
    ):
        head_dim = head_dim or config.head_dim
        width = (heads or channels // head_dim) * head_dim
        super().__init__(
            width,
            axis,
            config,
            head_dim,
            norm=GroupNorm(config.norm_groups, channels, config.transformer_norm_eps),
            proj_in=nn.Linear(channels, width),
            proj_out=zero_(nn.Linear(width, channels)),
        )
        self.norm_over_frames = axis == "time" and config.norm_over_frames
        self.rest = nn.ModuleList(
            TransformerBlock(width, axis, config, head_dim) for _ in range(depth - 1)
        )

    def forward(self, x: Tensor, num_frames: int, context: Tensor | None = None) -> Tensor:
        """x [B*N, C, H, W], context [B, M, C'] or None -> [B*N, C, H, W]."""
        height, width = x.shape[-2:]
        over_time = self.axis == "time"
        if self.norm_over_frames:
            clip = rows(x).unflatten(0, (-1, num_frames)).permute(0, 3, 1, 2)  # [B, C, N, H*W]
            h = self.norm(clip).permute(0, 2, 3, 1)  # [B, N, H*W, C]
        else:
            h = rows(self.norm(x))  # [B*N, H*W, C]
            h = h.unflatten(0, (-1, num_frames)) if over_time else h
        recorded = over_time and records_gradients(h, self.proj_in.weight)
        frames_first = recorded and temporal_attention_takes(num_frames, self.attn1.head_dim)
        if over_time and not frames_first:
            h = h.transpose(1, 2)  # [B, H*W, N, C], the memory stays
        h = super().forward(self.proj_in(h), num_frames, context, frames_first)
        for block in self.rest:
            h = block(h, num_frames, context, frames_first)
        h = self.proj_out(h)
        if over_time and not frames_first:
            h = h.transpose(1, 2)
        h = h.flatten(0, 1) if over_time else h
        return x + images(h, height, width)

    def plan(self, build, x, context=None):
        if build.runs_in_tiles(x, self):
            return build.transformer(x, self, context)
        h = build.group_norm(x, self.norm, over_frames=self.norm_over_frames)
        h = build.linear(h, self.proj_in)
        then = (self.proj_out, x)
        h = super().plan(build, h, context, None if len(self.rest) else then)
        for block in self.rest:
            h = block.plan(build, h, context, then if block is self.rest[-1] else None)
        return h
