"""Inference of the UNet family on a CPU: weights packed once, a static program per shape.

A `PlannedUNet` takes a UNet's place. Its weights lie in the order in which this machine's kernels
read them; activations are rows of one dtype from the first convolution to the last, with no copy
for a layout, a concatenation, an upsampling or a padding: all those are tables of rows that a
product reads (csrc/row_matmul.h). Statistics, sums and softmax are in fp32.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.native import vfengine_native

from ..models.layers import Attention, ResBlock, TemporalConv, Transformer
from ..models.unet import Stage, UNet
from . import gather as taps
from .packing import PackedLayers, Weights, is_light, joins_output, return_memory, takes_winograd
from .program import Builder, Program, Rows, Source

_PROGRAMS = 4  # shapes whose programs are kept
_TILED = 128  # rows, from which on transformers run in tiles: fewer do not occupy all threads


def inference_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a network asked for in `dtype` is computed in: fp32 without bf16 instructions.

    A UserWarning says so then. Raises ValueError for a dtype that is neither float32 nor bfloat16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"networks on a CPU run in float32 or bfloat16, got {dtype}")
    if dtype is torch.bfloat16 and not vfengine_native.cpu_has_bf16():
        warnings.warn(
            "this CPU has no bf16 instructions (AVX512_BF16): the network runs in float32, which "
            "is faster here than bfloat16",
            stacklevel=2,
        )
        return torch.float32
    return dtype


def for_inference(unet: UNet, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The UNet as it is fastest: on a CPU a PlannedUNet, which uses it up; else itself.

    float16 on a CPU is left to PyTorch.
    """
    if torch.device(device).type != "cpu" or dtype is torch.float16:
        return unet.eval().requires_grad_(False)
    return PlannedUNet(unet, dtype)


class PlannedUNet(nn.Module):
    """forward(x, t, context=None, class_labels=None) as `UNet`, without a gradient, on a CPU.

    unet:  is used up: its weights move into the plan, so that they are held once
    dtype: of weights and activations, float32 or bfloat16; see `inference_dtype`

    Results depend on neither batch size nor number of threads. Raises ValueError where UNet does,
    RuntimeError where the instruction set was changed since the weights were packed.
    """

    def __init__(self, unet: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = unet.config
        self.dtype = inference_dtype(dtype)
        self._isa = vfengine_native.cpu_isa()
        self._lock = threading.Lock()
        self._programs: OrderedDict[tuple, _Forward] = OrderedDict()
        with torch.no_grad():
            self._layers = PackedLayers(unet, self.dtype)
        for index, weights in enumerate((*self._layers.weights.values(), self._layers.embedding)):
            self.register_buffer(f"packed_{index}", weights.packed)
            self.register_buffer(f"bias_{index}", weights.bias)
        self.unet = unet.requires_grad_(False).eval()  # what is left: the embeddings
        self.eval()
        return_memory()

    @property
    def class_embedding(self) -> nn.Module | None:
        return self.unet.class_embedding

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction, of the shape of x but with out_channels, in x's dtype."""
        if vfengine_native.cpu_isa() != self._isa:
            raise RuntimeError(
                f"PlannedUNet: weights are packed for {self._isa}, not {vfengine_native.cpu_isa()}"
            )
        self.unet._check(x, t, context, class_labels)
        self._check(x, context)
        clips = x if self.config.is_video else x[:, None]
        context_shape = None if context is None else tuple(context.shape)
        with self._lock, torch.no_grad():
            forward = self._forward(tuple(clips.shape), context_shape)
            out = forward(clips, t, context, class_labels)
        return out if self.config.is_video else out[:, 0]

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        """ValueError for what the kernels cannot take and UNet does not look at."""
        if x.numel() == 0:
            raise ValueError(f"PlannedUNet: x must not be empty, got {tuple(x.shape)}")
        width = self.config.context_dim
        if context is None or width is None:
            return
        batch, form = x.shape[0], tuple(context.shape)
        if len(form) != 3 or form[0] != batch or form[1] < 1 or form[2] != width:
            raise ValueError(
                f"PlannedUNet: context must be [{batch}, 1 or more, {width}], got {form}"
            )

    def _forward(self, shape: tuple[int, ...], context_shape: tuple[int, ...] | None) -> _Forward:
        key = (shape, context_shape)
        if key not in self._programs:
            while len(self._programs) >= _PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[key] = _Forward(self.unet, self._layers, self.dtype, *key)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _apply(self, fn, recurse=True):
        """Stays as it is where nothing changes; weights that are packed cannot be moved or cast."""
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.device.type != "cpu" or probe.dtype != self.dtype:
            raise RuntimeError(
                f"PlannedUNet: packed for {self.dtype} on the CPU; load the network anew for "
                f"{probe.dtype} on {probe.device}"
            )
        return self


class _Forward:
    """The program of one shape: clips [B, N, C, H, W], context [B, L, C'] or None."""

    def __init__(
        self,
        unet: UNet,
        layers: PackedLayers,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        context_shape: tuple[int, ...] | None,
    ) -> None:
        self.unet, self.layers, self.config = unet, layers, unet.config
        self.batch, self.frames = shape[:2]
        self.images = self.batch * self.frames
        patch = self.config.patch_size
        self.size = shape[3] // patch, shape[4] // patch
        # One embedding for all frames of a clip serves where it is only added.
        self.per_frame = self.config.frame_embedding or self.config.scale_shift
        self.build = build = Builder(dtype)
        channels = shape[2] * patch**2
        self.x = build.rows(self.images * self._pixels(self.size), channels + channels % 2)
        self.padding = channels % 2
        self.embedding = build.rows(
            self.images if self.per_frame else self.batch, unet.time_embedding[-1].out_features
        )
        self.context = None
        if context_shape is not None:
            self.context = build.rows(context_shape[0] * context_shape[1], context_shape[2])
        self.modulation = build.matmul(self.embedding, layers.embedding, out_dtype=torch.float32)
        self.out = self._network()
        self.program: Program = build.program()
        del self.build

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor | None, class_labels: Tensor | None
    ) -> Tensor:
        program, patch = self.program, self.config.patch_size
        frames = F.pixel_unshuffle(x.flatten(0, 1), patch) if patch > 1 else x.flatten(0, 1)
        rows = program.view(self.x).view(self.images, *self.size, -1)
        rows[..., : frames.shape[1]].copy_(frames.permute(0, 2, 3, 1))
        if self.padding:
            rows[..., frames.shape[1] :].zero_()
        embedding = self.unet.embed(t, class_labels, self.frames if self.per_frame else 1)
        program.view(self.embedding).copy_(F.silu(embedding))
        if self.context is not None:
            program.view(self.context).copy_(context.flatten(0, 1))
        program.run()
        out = program.view(self.out).view(self.images, *self.size, -1).permute(0, 3, 1, 2)
        out = F.pixel_shuffle(out, patch) if patch > 1 else out.clone()  # off the arena
        return out.to(x.dtype, memory_format=torch.contiguous_format).unflatten(
            0, (self.batch, self.frames)
        )

    @staticmethod
    def _pixels(size: tuple[int, int]) -> int:
        return size[0] * size[1]

    # -- the network ---------------------------------------------------------------------------

    def _network(self) -> Rows:
        layers, build, size = self.layers, self.build, self.size
        h = self._conv([self.x], layers.conv_in, size, taps.same(*size), size)
        build.free(self.x)
        if layers.transformer_in is not None:
            h = self._replace(h, self._transformer(layers.transformer_in, h))
        skips = [(h, size)]
        for level, stages in enumerate(layers.down):
            for stage in stages:
                h = self._stage(stage, [h], size)
                skips.append((h, size))
            if level < len(layers.downsamplers):
                smaller = (size[0] + 1) // 2, (size[1] + 1) // 2
                h = self._conv([h], layers.downsamplers[level], smaller, taps.halved(*size), size)
                size = smaller
                skips.append((h, size))
        for stage in layers.mid:
            before = h
            h = self._stage(stage, [h], size)
            if all(before is not kept for kept, _ in skips):
                build.free(before)
        for level, stages in enumerate(layers.up):
            for stage in stages:
                skip = skips.pop()[0]
                out = self._stage(stage, [h, skip], size)
                build.free(h) if h is skip else build.free(h, skip)
                h = out
            if level < len(layers.upsamplers):
                larger = skips[-1][1]
                h = self._replace(h, self._upsample(layers.upsamplers[level], h, size, larger))
                size = larger
        h = self._replace(h, build.group_norm([h], layers.norm_out, self.images))
        return self._conv(
            [h], layers.conv_out, size, taps.same(*size), size, out_dtype=torch.float32
        )

    def _replace(self, old: Rows, new: Rows) -> Rows:
        self.build.free(old)
        return new

    def _conv(
        self,
        sources: list[Rows],
        conv: nn.Module,
        size: tuple[int, int],
        table: Tensor,
        source_size: tuple[int, int],
        **options,
    ) -> Rows:
        """A convolution whose taps `table` lists; 1x1 of any further sources joins it."""
        pixels = self._pixels(size)
        first, *others = sources
        read = [Source(first, table, self._pixels(source_size)), *(Source(x) for x in others)]
        return self.build.matmul(
            read, self.layers.weights[conv], rows=self.images * pixels, item_rows=pixels, **options
        )

    def _upsample(
        self, conv: nn.Module, h: Rows, size: tuple[int, int], larger: tuple[int, int]
    ) -> Rows:
        if larger != (2 * size[0], 2 * size[1]) or not is_light(conv):
            return self._conv([h], conv, larger, taps.doubled(*size, *larger), size)
        pixels = self._pixels(size)
        out = self.build.rows(4 * h.count, conv.out_channels)
        for quarter in taps.QUARTERS:
            table, places = taps.quarter(*size, *quarter)
            self.build.matmul(
                [Source(h, table, pixels)],
                self.layers.weights[(conv, *quarter)],
                item_rows=pixels,
                out=out,
                scatter=(places, 4 * pixels),
            )
        return out

    def _stage(self, stage: Stage, sources: list[Rows], size: tuple[int, int]) -> Rows:
        h = self._res_block(stage.resnet, sources, size)
        if stage.temp_conv is not None:
            h = self._replace(h, self._temporal_conv(stage.temp_conv, h))
        for transformer in (stage.spatial, stage.temporal):
            if transformer is not None:
                h = self._replace(h, self._transformer(transformer, h))
        return h

    def _res_block(self, block: ResBlock, sources: list[Rows], size: tuple[int, int]) -> Rows:
        build, column = self.build, self.layers.modulation[block]
        pixels, channels = self._pixels(size), block.conv1.out_channels
        normed = build.group_norm(sources, block.norm1, self.images)
        shared = pixels if self.per_frame else pixels * self.frames
        bias = None if block.scale_shift else (self.modulation, column, shared)
        h = self._same_conv(normed, block.conv1, size, bias=bias)
        build.free(normed)
        modulation = (self.modulation, column, column + channels) if block.scale_shift else None
        h = self._replace(h, build.group_norm([h], block.norm2, self.images, modulation=modulation))
        if not isinstance(block.conv_shortcut, nn.Conv2d):
            out = self._same_conv(h, block.conv2, size, residual=sources[0])
        elif takes_winograd(block.conv2):
            read = [Source(x) for x in sources]
            out = build.matmul(read, self.layers.weights[block.conv_shortcut])
            self._same_conv(h, block.conv2, size, residual=out, out=out)
        else:
            out = self._conv([h, *sources], block.conv2, size, taps.same(*size), size)
        build.free(h)
        return out

    def _same_conv(self, x: Rows, conv: nn.Conv2d, size: tuple[int, int], **options) -> Rows:
        """A 3x3 convolution of stride 1."""
        if takes_winograd(conv):
            shape = (self.images, *size)
            return self.build.winograd(x, self.layers.weights[conv], shape, **options)
        return self._conv([x], conv, size, taps.same(*size), size, **options)

    def _temporal_conv(self, block: TemporalConv, x: Rows) -> Rows:
        build, h = self.build, x
        clip = x.count // self.batch
        pixels = clip // self.frames
        for norm, conv in zip(block.norms, block.convs, strict=True):
            normed = build.group_norm([h], norm, self.images, num_frames=self.frames)
            if h is not x:
                build.free(h)
            weights, residual = self.layers.weights[conv], x if conv is block.convs[-1] else None
            if takes_winograd(conv):
                shape = (self.batch, self.frames, pixels)
                h = build.winograd(normed, weights, shape, flat=True, residual=residual)
            else:
                source = Source(normed, taps.neighbours(self.frames, pixels), clip)
                h = build.matmul([source], weights, item_rows=clip, residual=residual)
            build.free(normed)
        return h

    def _transformer(self, transformer: Transformer, x: Rows) -> Rows:
        if not len(transformer.rest) and x.count >= _TILED:
            return self._tiled(transformer, x)
        build, weights = self.build, self.layers.weights
        frames = self.frames if transformer.norm_over_frames else 1
        normed = build.group_norm([x], transformer.norm, self.images, num_frames=frames, silu=False)
        h = build.matmul(normed, weights[transformer.proj_in])
        build.free(normed)
        blocks, gated = (transformer, *transformer.rest), None
        for block in blocks:
            for norm, attention, into, kv, bias in self._attentions(transformer, block):
                self._attend(norm, attention, into, kv, bias, h, transformer.axis)
            if block.ff is not None:
                normed = build.layer_norm(h, block.norm3)
                gated = build.matmul(normed, weights[block.ff.proj])
                build.free(normed)
                if block is blocks[-1] and joins_output(transformer):
                    break
                build.matmul(gated, weights[block.ff.out], residual=h, out=h)
                build.free(gated)
                gated = None
        read = [h] if gated is None else [h, gated]
        sources = [Source(rows) for rows in read]
        out = build.matmul(sources, weights[transformer.proj_out], residual=x)
        build.free(*read)
        return out

    def _tiled(self, transformer: Transformer, x: Rows) -> Rows:
        """All of it in one kernel, a tile at a time."""
        build, weights = self.build, self.layers.weights
        time, ff = transformer.axis == "time", transformer.ff
        attentions = list(self._attentions(transformer, transformer))
        feed_forward = None
        if ff is not None:
            last = None if joins_output(transformer) else weights[ff.out]
            feed_forward = (transformer.norm3, weights[ff.proj], last)
        out = build.transformer(
            x,
            transformer.norm,
            (self.batch, self.frames, x.count // self.images),
            time=time,
            norm_frames=self.frames if transformer.norm_over_frames else 1,
            heads=_heads(transformer.attn1),
            proj_in=weights[transformer.proj_in],
            attentions=[
                (norm, into, weights[attention.to_out], kv, bias)
                for norm, attention, into, kv, bias in attentions
            ],
            feed_forward=feed_forward,
            proj_out=weights[transformer.proj_out],
        )
        build.free(*(kv for _, _, _, kv, _ in attentions if kv is not None))
        return out

    def _attentions(self, transformer: Transformer, block: nn.Module):
        """(norm, attention, weights of q k v or of q, rows of a context's k and v, bias) of each.

        The rows are new; whoever takes them frees them.
        """
        weights, bias = self.layers.weights, None
        if block.bias is not None:
            bias = block.bias(self.frames, torch.device("cpu")).float().contiguous()
        yield block.norm1, block.attn1, weights[block.attn1, "q"], None, bias
        second = block.attn2
        if second is None:
            return
        if transformer.axis == "time":
            yield block.norm2, second, weights[second, "q"], None, None
        elif self.context is not None:
            kv = self.build.matmul(self.context, weights[second, "kv"])
            yield block.norm2, second, weights[second, "q"], kv, None

    def _attend(
        self,
        norm: nn.LayerNorm,
        attention: Attention,
        into: Weights,
        kv: Rows | None,
        bias: Tensor | None,
        h: Rows,
        axis: str,
    ) -> None:
        """h += attention(norm(h)), in place."""
        build, heads = self.build, _heads(attention)
        normed = build.layer_norm(h, norm)
        q = build.matmul(normed, into)
        build.free(normed)
        if axis == "time":
            shape = (self.batch, self.frames, h.count // self.images)
            out = build.temporal_attention(q, shape, heads, bias)
        elif kv is not None:
            out = build.spatial_attention(q, kv, self.images, heads, self.batch)
            build.free(kv)
        else:
            out = build.spatial_attention(q, q, self.images, heads, self.images)
        build.matmul(out, self.layers.weights[attention.to_out], residual=h, out=h)
        build.free(q, out)


def _heads(attention: Attention) -> tuple[int, int, float]:
    """Number, padded dimension and scale."""
    dim = attention.head_dim
    return attention.heads, dim + -dim % 8, dim**-0.5
