"""Inference of the UNet family on a CPU: weights packed once, a static program per shape.

A `PlannedUNet` takes a UNet's place. Its weights lie in the order in which this machine's kernels
read them; activations are rows of one dtype from the first convolution to the last, with no copy
for a layout, a concatenation, an upsampling or a padding: all those are tables of rows that a
product reads (csrc/network.h). Statistics, sums and softmax are in fp32.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.native import vfengine_native
from vfengine.ops.temporal_attention import MAX_HEAD_DIM

from .layers import Attention, ResBlock, TemporalConv, Transformer
from .program import Builder, Program, Rows, Source, Weights, pack, pack_winograd, return_memory
from .unet import Stage, UNet

_PROGRAMS = 4  # shapes whose programs are kept
_TILED = 128  # rows, from which on transformers run in tiles: fewer do not occupy all threads


def inference_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a network asked for in `dtype` is computed in: fp32 without bf16 instructions.

    A UserWarning says so then. Raises ValueError for a dtype that is neither float32 nor bfloat16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"networks on a CPU run in float32 or bfloat16, got {dtype}")
    if dtype is torch.bfloat16 and vfengine_native.cpu_isa() != "avx512_bf16":
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
            self._layers = _Layers(unet, self.dtype)
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


class _Layers:
    """The packed weights of a UNet's layers, by layer; takes them from the UNet as it goes."""

    def __init__(self, unet: UNet, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights: dict[object, Weights] = {}  # a layer's, or an (attention, part)'s
        self.modulation: dict[nn.Module, int] = {}  # first column of a residual block's embedding
        projections, biases = [], []
        self.stages(unet, projections, biases)
        self.embedding = pack(torch.cat(projections), torch.cat(biases), dtype)
        self.down, self.mid, self.up = unet.down, unet.mid, unet.up
        self.downsamplers, self.upsamplers = unet.downsamplers, unet.upsamplers
        self.conv_in, self.conv_out = unet.conv_in, unet.conv_out
        self.norm_out, self.transformer_in = unet.conv_norm_out, unet.transformer_in
        _as_fp32(self.norm_out)
        for conv in (unet.conv_in, *unet.downsamplers, unet.conv_out):
            even = conv is unet.conv_in  # whose rows are padded as well
            self.weights[conv] = pack(_conv_weight(conv, dtype, even), conv.bias, dtype)
            _let_go(conv)
        for conv in unet.upsamplers:
            self.upsampler(conv, exact=unet.config.any_size)
            _let_go(conv)
        del unet.down, unet.mid, unet.up, unet.downsamplers, unet.upsamplers, unet.conv_out
        del unet.conv_norm_out, unet.transformer_in
        unet.double()  # the embeddings: rounded once, they do not show how they were summed

    def upsampler(self, conv: nn.Conv2d, exact: bool) -> None:
        """3x3 on a picture enlarged by nearest pixels: 2x2 on the picture itself, per quarter.

        exact: keeps the weights for other factors than 2 as well
        """
        if exact:
            self.weights[conv] = pack(_conv_weight(conv, self.dtype), conv.bias, self.dtype)
        weight = conv.weight.float()  # [C', C, 3, 3]
        # taps that fall on the same pixel, for an even and for an odd position
        same = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        for y, x in _QUARTERS:
            folded = torch.einsum("ai,bj,ocij->oabc", same[y], same[x], weight)
            self.weights[conv, y, x] = pack(folded.flatten(1), conv.bias, self.dtype)

    def stages(self, unet: UNet, projections: list[Tensor], biases: list[Tensor]) -> None:
        if unet.transformer_in is not None:
            self.transformer(unet.transformer_in)
        columns = 0
        for stage in (
            *(stage for stages in unet.down for stage in stages),
            *unet.mid,
            *(stage for stages in unet.up for stage in stages),
        ):
            block = stage.resnet
            self.modulation[block] = columns
            projection = block.time_emb_proj
            columns += projection.out_features
            bias = projection.bias.detach().float()
            if not block.scale_shift:  # the convolution's bias is in the embedding's place
                bias = bias + block.conv1.bias.detach().float()
            projections.append(projection.weight.detach().to(self.dtype))
            biases.append(bias)
            _let_go(projection)
            self.res_block(block)
            if stage.temp_conv is not None:
                self.temporal_conv(stage.temp_conv)
            for transformer in (stage.spatial, stage.temporal):
                if transformer is not None:
                    self.transformer(transformer)
            return_memory()  # before the next stage's is packed

    def res_block(self, block: ResBlock) -> None:
        _as_fp32(block.norm1, block.norm2)
        conv1, conv2, shortcut = block.conv1, block.conv2, block.conv_shortcut
        self.conv(conv1)
        if isinstance(shortcut, nn.Conv2d) and takes_winograd(conv2):
            self.weights[shortcut] = pack(shortcut.weight.flatten(1), shortcut.bias, self.dtype)
            self.conv(conv2)
        elif isinstance(shortcut, nn.Conv2d):  # one product with the second convolution
            both = [_conv_weight(conv2, self.dtype), shortcut.weight.flatten(1).to(self.dtype)]
            bias = conv2.bias.float() + shortcut.bias.float()
            self.weights[conv2] = pack(torch.cat(both, 1), bias, self.dtype)
        else:
            self.conv(conv2)
        _let_go(conv1, conv2, shortcut)

    def temporal_conv(self, block: TemporalConv) -> None:
        for norm, conv in zip(block.norms, block.convs, strict=True):
            _as_fp32(norm)
            self.conv(conv)
            _let_go(conv)

    def conv(self, conv: nn.Conv2d) -> None:
        """One of stride 1: 3x3, or of 3 taps along frames."""
        if takes_winograd(conv):
            self.weights[conv] = pack_winograd(conv.weight, conv.bias, self.dtype)
        else:
            self.weights[conv] = pack(_conv_weight(conv, self.dtype), conv.bias, self.dtype)

    def transformer(self, transformer: Transformer) -> None:
        _as_fp32(transformer.norm)
        self.linear(transformer.proj_in)
        blocks = (transformer, *transformer.rest)
        if joins_output(transformer):
            self.join(blocks[-1].ff.out, transformer.proj_out)
        else:
            self.linear(transformer.proj_out)
        for block in blocks:
            crossed = transformer.axis == "space"
            for attention, cross in ((block.attn1, False), (block.attn2, crossed)):
                if attention is not None:
                    self.attention(attention, cross)
            if block.ff is not None:
                self.linear(block.ff.proj, "geglu")
                if block.ff.out.weight.numel():
                    self.linear(block.ff.out)
            for norm in (block.norm1, block.norm2, block.norm3):
                if norm is not None:
                    _as_fp32(norm)

    def linear(self, layer: nn.Linear, epilogue: str | None = None) -> None:
        self.weights[layer] = pack(layer.weight, layer.bias, self.dtype, epilogue)
        _let_go(layer)

    def join(self, last: nn.Linear, out: nn.Linear) -> None:
        """out(h + last(g)) = out h + (out last) g: one product in place of two."""
        outer, bias = out.weight.float(), out.bias.float()
        if last.bias is not None:
            bias = bias + outer @ last.bias.float()
        weight = torch.cat([outer, outer @ last.weight.float()], 1)
        self.weights[out] = pack(weight, bias, self.dtype)
        _let_go(last, out)

    def attention(self, attention: Attention, cross: bool) -> None:
        """q, k, v as one product, or q and k, v; heads padded to whole steps of the kernel."""
        heads, dim = attention.heads, attention.head_dim
        if dim > MAX_HEAD_DIM:
            raise ValueError(
                f"PlannedUNet: heads may have up to {MAX_HEAD_DIM} dimensions, got {dim}"
            )
        padded = -dim % 8

        def rows(layer: nn.Linear) -> tuple[Tensor, Tensor]:
            weight = layer.weight.to(self.dtype).unflatten(0, (heads, dim))
            bias = torch.zeros(heads * dim) if layer.bias is None else layer.bias.float()
            bias = F.pad(bias.unflatten(0, (heads, dim)), (0, padded))
            return F.pad(weight, (0, 0, 0, padded)).flatten(0, 1), bias.flatten()

        q, k, v = (rows(layer) for layer in (attention.to_q, attention.to_k, attention.to_v))
        for name, parts in (("q", [q]), ("kv", [k, v])) if cross else (("q", [q, k, v]),):
            weight, bias = (torch.cat(part) for part in zip(*parts, strict=True))
            self.weights[attention, name] = pack(weight, bias, self.dtype)
        out = attention.to_out
        weight = F.pad(out.weight.to(self.dtype).unflatten(1, (heads, dim)), (0, padded))
        self.weights[out] = pack(weight.flatten(1), out.bias, self.dtype)
        _let_go(attention.to_q, attention.to_k, attention.to_v, out)


class _Forward:
    """The program of one shape: clips [B, N, C, H, W], context [B, L, C'] or None."""

    def __init__(
        self,
        unet: UNet,
        layers: _Layers,
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
        h = self._conv([self.x], layers.conv_in, size, _same(*size), size)
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
                h = self._conv([h], layers.downsamplers[level], smaller, _halved(*size), size)
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
        return self._conv([h], layers.conv_out, size, _same(*size), size, out_dtype=torch.float32)

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
        if larger != (2 * size[0], 2 * size[1]):
            return self._conv([h], conv, larger, _doubled(*size, *larger), size)
        pixels = self._pixels(size)
        out = self.build.rows(4 * h.count, conv.out_channels)
        for quarter in _QUARTERS:
            table, places = _quarter(*size, *quarter)
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
            out = self._conv([h, *sources], block.conv2, size, _same(*size), size)
        build.free(h)
        return out

    def _same_conv(self, x: Rows, conv: nn.Conv2d, size: tuple[int, int], **options) -> Rows:
        """A 3x3 convolution of stride 1."""
        if takes_winograd(conv):
            shape = (self.images, *size)
            return self.build.winograd(x, self.layers.weights[conv], shape, **options)
        return self._conv([x], conv, size, _same(*size), size, **options)

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
                source = Source(normed, _neighbours(self.frames, pixels), clip)
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


# -- weights -----------------------------------------------------------------------------------


def takes_winograd(conv: nn.Conv2d) -> bool:
    """Whether Winograd's form is the faster: not for few channels, which the transforms outweigh.

    Nor for many: its weights are 16/9 as large, and their memory is then what counts.
    """
    inputs, outputs = conv.in_channels, conv.out_channels
    flat = conv.kernel_size == (3, 1)
    least = 128 if flat else 32
    return min(inputs, outputs) >= least and inputs * outputs <= 640 * 640


def joins_output(transformer: Transformer) -> bool:
    """Whether its last feed-forward layer is multiplied into proj_out, which saves a product.

    Not for wide ones, where the product of the weights takes longer than it saves.
    """
    last = transformer.rest[-1] if len(transformer.rest) else transformer
    inner = transformer.proj_out.in_features
    return last.ff is not None and transformer.proj_out.out_features <= inner <= 512


def _conv_weight(conv: nn.Conv2d, dtype: torch.dtype, even: bool = False) -> Tensor:
    """[C', taps * C], the channels of a tap side by side; even: padded to an even number."""
    weight = conv.weight.detach().to(dtype).permute(0, 2, 3, 1)
    return F.pad(weight, (0, weight.shape[-1] % 2 if even else 0)).flatten(1)


def _let_go(*layers: nn.Module) -> None:
    """The weights are packed: the layer's own memory is freed."""
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.new_empty(0)


def _as_fp32(*norms: nn.Module) -> None:
    for norm in norms:
        norm.float()


# -- which row each tap reads --------------------------------------------------------------------


def _taps(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """int32 [taps, pixels] from each tap's coordinates; -1 outside of the picture."""
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(inside, rows * width + columns, -1).flatten(1).to(torch.int32).contiguous()


@functools.lru_cache(maxsize=64)
def _table(height: int, width: int, out_height: int, out_width: int, step: float) -> Tensor:
    """3x3 taps with padding 1 on the grid of out_height x out_width, `step` apart.

    step 1: the same grid; 2: every other pixel; 0.5: of the picture enlarged to the grid by nearest
    pixels.
    """
    offsets = torch.arange(3) - 1
    y = torch.arange(out_height)[None, None, :, None] * max(1, int(step))
    x = torch.arange(out_width)[None, None, None, :] * max(1, int(step))
    y, x = (y + offsets[:, None, None, None]), (x + offsets[None, :, None, None])
    y, x = (part.expand(3, 3, out_height, out_width).flatten(0, 1) for part in (y, x))
    if step >= 1:
        return _taps(y, x, height, width)
    inside = (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
    y = torch.where(inside, y * height // out_height, -1)
    return _taps(y, torch.where(inside, x * width // out_width, -1), height, width)


def _same(height: int, width: int) -> Tensor:
    return _table(height, width, height, width, 1)


def _halved(height: int, width: int) -> Tensor:
    return _table(height, width, (height + 1) // 2, (width + 1) // 2, 2)


def _doubled(height: int, width: int, out_height: int, out_width: int) -> Tensor:
    return _table(height, width, out_height, out_width, 0.5)


_QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # even and odd rows and columns


@functools.lru_cache(maxsize=64)
def _quarter(height: int, width: int, y: int, x: int) -> tuple[Tensor, Tensor]:
    """Of a quarter of the picture twice as large: its 2x2 taps, and where its pixels go."""
    rows, columns = torch.arange(height), torch.arange(width)
    at = torch.arange(2)
    from_rows = (rows + at[:, None] - 1 + y)[:, None, :, None].expand(2, 2, height, width)
    from_columns = (columns + at[:, None] - 1 + x)[None, :, None, :].expand(2, 2, height, width)
    table = _taps(from_rows.flatten(0, 1), from_columns.flatten(0, 1), height, width)
    places = (2 * rows + y)[:, None] * 2 * width + 2 * columns + x
    return table, places.flatten().to(torch.int32).contiguous()


@functools.lru_cache(maxsize=64)
def _neighbours(frames: int, pixels: int) -> Tensor:
    """A pixel in the frame before, in its own and in the next: int32 [3, frames * pixels]."""
    frame = torch.arange(frames) + (torch.arange(3) - 1)[:, None]  # [3, frames]
    inside = ((frame >= 0) & (frame < frames))[..., None]
    rows = frame[..., None] * pixels + torch.arange(pixels)
    return torch.where(inside, rows, -1).flatten(1).to(torch.int32).contiguous()
