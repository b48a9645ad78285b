"""Building blocks of the UNet family.

Activations are `[B*N, C, H, W]` in channels_last memory, that is rows of C contiguous numbers:
`[B*N, H*W, C]` for a spatial transformer and `[B, N, H*W, C]` for a temporal one are views of the
same memory, never copies.

Where `fused` says so (inference on CUDA), norms with what follows them, GEGLU and temporal
attention run as kernels of vfengine/ops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.ops import geglu, group_norm_silu, layer_norm, temporal_attention
from vfengine.ops._dispatch import DTYPES
from vfengine.ops.temporal_attention import MAX_FRAMES, MAX_HEAD_DIM

from ..devices import tf32_products
from ..ops.attention import attend


def fused(x: Tensor, module: nn.Module, *more: Tensor | None) -> bool:
    """Whether `module` runs x through the kernels of vfengine/ops, which have no derivative.

    more: other tensors that the kernel would read

    That is inference on CUDA; training, autocast, torch.compile and torch.export see plain PyTorch.
    """
    if not x.is_cuda or x.dtype not in DTYPES or module.training:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    if not torch.is_grad_enabled():
        return True
    read = (x, *module.parameters(), *(t for t in more if t is not None))
    return not any(t.requires_grad for t in read)


def sinusoidal_embedding(
    positions: Tensor, dim: int, *, sin_first: bool = False, shift: float | None = None
) -> Tensor:
    """positions [...] -> [..., dim] fp32: cos, then sin, at dim / 2 frequencies, 1 to 1/10000.

    sin_first: sin, then cos
    shift:     frequency k is 10000^(-k / (dim / 2 - shift)), rounded as diffusers does: at t = 1000
               the last bit of a frequency shows. None: no shift, and this family's own rounding
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=positions.device)
    if shift is None:
        exponents = k * (-math.log(10000.0) / half)
    else:
        exponents = k * -math.log(10000.0) / (half - shift)
    angles = positions[..., None].float() * exponents.exp()
    parts = (angles.sin(), angles.cos()) if sin_first else (angles.cos(), angles.sin())
    return torch.cat(parts, dim=-1)


def rows(x: Tensor) -> Tensor:
    """[B, C, H, W] channels_last -> [B, H*W, C], a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def images(x: Tensor, height: int, width: int) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W] channels_last, a view."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


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
        """SiLU(norm(x) (1 + scale) + shift) in x's dtype; SiLU, scale and shift where asked for.

        x [B, C, H, W] channels_last; scale, shift [B, C], both or neither. Statistics over all
        frames are those of a clip [B, C, N, H*W].
        """
        weight, bias = self.weight.float(), self.bias.float()
        if fused(x, self, scale, shift):
            tables = {"scale": scale, "shift": shift} if scale is not None else {}
            return group_norm_silu(
                x.contiguous(memory_format=torch.channels_last),
                self.num_groups, weight, bias, eps=self.eps, silu=silu,
                **{name: table.float().contiguous() for name, table in tables.items()},
            )  # fmt: skip
        h = F.group_norm(x.float(), self.num_groups, weight, bias, self.eps)
        if scale is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return (F.silu(h) if silu else h).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if fused(x, self):
            weight, bias = self.weight.float(), self.bias.float()
            return layer_norm(x.contiguous(), weight, bias, eps=self.eps)
        return super().forward(x)


class Conv2d(nn.Conv2d):
    """A convolution whose fp32 is fp32, at inference on CUDA: TF32 only where products have it.

    By torch's default convolutions alone are rounded to TF32, an error of 3e-4. Which way is asked
    of every call, so that no setting of the process is touched.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or not fused(x, self):
            return super().forward(x)
        cudnn = torch.backends.cudnn
        deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        return torch._convolution(  # what torch.conv2d calls with the settings of the process
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, False, (0, 0),
            self.groups, cudnn.benchmark, deterministic, cudnn.enabled, tf32_products(),
        )  # fmt: skip


class ResBlock(nn.Module):
    """Two 3x3 convolutions; between them the embedding scales and shifts.

    With scale_shift=False it only shifts.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int,
        groups: int,
        scale_shift: bool,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = zero_(Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = (
            Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B*N, C, H, W], embedding [B*N, E] (already through SiLU) -> [B*N, C', H, W]."""
        h = self.conv1(self.norm1(x, silu=True))
        modulation = self.time_emb_proj(embedding)
        if self.scale_shift:
            h = self.norm2(h, True, *modulation.chunk(2, dim=1))
        else:
            h = self.norm2(h + modulation[:, :, None, None], silu=True)
        return self.conv_shortcut(x) + self.conv2(h)


class TemporalConv(nn.Module):
    """`depth` convolutions over three neighbouring frames at each pixel, added to their input."""

    def __init__(self, channels: int, groups: int, depth: int):
        super().__init__()
        self.norms = nn.ModuleList(GroupNorm(groups, channels) for _ in range(depth))
        self.convs = nn.ModuleList(
            Conv2d(channels, channels, (3, 1), padding=(1, 0)) for _ in range(depth)
        )
        zero_(self.convs[-1])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x [B*N, C, H, W] -> the same; inside [B, C, N, H*W]: kernel (3, 1) runs along frames."""
        height, width = x.shape[-2:]
        h = rows(x).unflatten(0, (-1, num_frames)).permute(0, 3, 1, 2)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(norm(h, silu=True))
        return x + images(h.permute(0, 2, 3, 1).flatten(0, 1), height, width)


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket of the distance of two frames (T5, arXiv 1910.10683).

    Half of the buckets serve each direction; half of those hold exact distances, the rest grow
    logarithmically up to max_distance, so that any number of frames has a bias.
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)
        nn.init.zeros_(self.relative_attention_bias.weight)

    def buckets(self, num_frames: int, device: torch.device) -> Tensor:
        """int64 [N, N]: the bucket of (query frame, key frame)."""
        frames = torch.arange(num_frames, device=device)
        offset = frames[None, :] - frames[:, None]
        half = self.num_buckets // 2
        exact = half // 2
        distance = offset.abs()
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + growth * (half - exact)).long().clamp(max=half - 1)
        return (offset > 0).long() * half + torch.where(distance < exact, distance, far)

    def forward(self, num_frames: int, device: torch.device) -> Tensor:
        """[heads, N, N], added to the attention logits."""
        return self.relative_attention_bias(self.buckets(num_frames, device)).permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-head attention of rows x [..., L, C] to themselves or to a context [..., M, C']."""

    def __init__(self, channels: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        self.heads, self.head_dim = channels // head_dim, head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """bias [heads, L, M] is added to the logits."""
        source = x if context is None else context
        split = (self.heads, self.head_dim)
        q, k, v = (
            layer(value).unflatten(-1, split).transpose(-3, -2)
            for layer, value in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        return self.to_out(attend(q, k, v, bias).transpose(-3, -2).flatten(-2))

    def over_frames(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [B, N, P, C] -> the same, N frames of each of P pixels attending to each other."""
        dim_fits = self.head_dim % 8 == 0 and self.head_dim <= MAX_HEAD_DIM
        if x.shape[1] > MAX_FRAMES or not dim_fits:  # no kernel takes these
            return self(x.transpose(1, 2).contiguous(), bias=bias).transpose(1, 2)
        # put together anew at every call: weights may change, also under a captured graph
        into = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        bias = bias if bias is None else bias.float().contiguous()
        return self.to_out(temporal_attention(F.linear(x, into), self.heads, bias))


class FeedForward(nn.Module):
    """GEGLU: C -> mult * C, gated by a second projection, -> C."""

    def __init__(self, channels: int, mult: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * mult * channels)
        self.out = nn.Linear(mult * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        if fused(x, self):
            return self.out(geglu(h))
        value, gate = h.chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, a second attention and a feed-forward layer, each behind a LayerNorm.

    axis "space": each frame's H*W pixels attend to each other, then to the context (where the
                  configuration has one).
    axis "time":  each pixel's N frames attend to each other, with a relative position bias (where
                  it has one), then once more (where it says so), without.
    """

    def __init__(self, channels: int, axis: str, config, head_dim: int, **ends: nn.Module):
        """ends: layers around the block, which come before its own in the order of weights"""
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
        """h [B*N, H*W, C], over time [B, H*W, N, C] or, frames_first, [B, N, H*W, C] -> as h.

        context [B*N, M, C'] or None.
        """
        bias = self.bias(num_frames, h.device) if self.bias is not None else None
        if frames_first:
            h = h + self.attn1.over_frames(self.norm1(h), bias)
        else:
            h = h + self.attn1(self.norm1(h), bias=bias)
        if self.attn2 is not None and frames_first:
            h = h + self.attn2.over_frames(self.norm2(h))
        elif self.attn2 is not None and (self.axis == "time" or context is not None):
            h = h + self.attn2(self.norm2(h), context)
        if self.ff is not None:
            h = h + self.ff(self.norm3(h))
        return h


class Transformer(TransformerBlock):
    """GroupNorm and a projection, transformer blocks, a projection back; added to the input.

    It is the first of its blocks itself, and holds the others in `rest`.

    heads:  as many as fit into the channels, unless given; heads * head_dim is the blocks' width
    depth:  how many blocks
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
            width, axis, config, head_dim,
            norm=GroupNorm(config.norm_groups, channels, config.transformer_norm_eps),
            proj_in=nn.Linear(channels, width),
            proj_out=zero_(nn.Linear(width, channels)),
        )  # fmt: skip
        self.norm_over_frames = axis == "time" and config.norm_over_frames
        self.rest = nn.ModuleList(
            TransformerBlock(width, axis, config, head_dim) for _ in range(depth - 1)
        )

    def forward(self, x: Tensor, num_frames: int, context: Tensor | None = None) -> Tensor:
        """x [B*N, C, H, W], context [B*N, M, C'] or None -> [B*N, C, H, W]."""
        height, width = x.shape[-2:]
        over_time = self.axis == "time"
        frames_first = over_time and fused(x, self)  # as the memory has them, and our kernel
        if self.norm_over_frames:
            clip = rows(x).unflatten(0, (-1, num_frames)).permute(0, 3, 1, 2)  # [B, C, N, H*W]
            h = self.norm(clip).permute(0, 2, 3, 1)  # [B, N, H*W, C]
        else:
            h = rows(self.norm(x))  # [B*N, H*W, C]
            h = h.unflatten(0, (-1, num_frames)) if over_time else h
        if over_time and not frames_first:
            h = h.transpose(1, 2)  # [B, H*W, N, C], the memory stays
        h = super().forward(self.proj_in(h), num_frames, context, frames_first)
        for block in self.rest:
            h = block(h, num_frames, context, frames_first)
        h = self.proj_out(h)
        if over_time:
            h = (h if frames_first else h.transpose(1, 2)).flatten(0, 1)
        return x + images(h, height, width)
