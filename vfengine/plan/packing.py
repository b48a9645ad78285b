"""A UNet's weights in the order in which this machine's kernels read them.

`PackedLayers` takes them from the UNet layer by layer, so that they are held once, and decides what
is multiplied together beforehand: products with nothing in between, taps that fall on the same
pixel, convolutions in Winograd's form.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.native import vfengine_native
from vfengine.ops._dispatch import DTYPE_NUMBERS, MAX_HEAD_DIM

from ..models.layers import Attention, ResBlock, TemporalConv, Transformer
from ..models.unet import UNet
from .gather import QUARTERS

# Input times output channels, above which a convolution keeps the form of fewest weights.
_LIGHT = 640 * 640


@dataclass(frozen=True, eq=False)
class Weights:
    """Packed weights of a product (csrc/cpu/gemm/vector.h) and its bias.

    packed:  int32 words, in the order that this machine's kernel reads
    bias:    fp32 [columns], with geglu [2 columns]; None: none
    columns: of the result
    """

    packed: Tensor
    bias: Tensor | None
    columns: int
    epilogue: str | None = None


def pack(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, epilogue: str | None = None
) -> Weights:
    """weight [columns, depth] in any dtype; with geglu [2 columns, depth], values then gates."""
    weight = weight.to(dtype).contiguous()
    geglu = epilogue == "geglu"
    columns, depth = weight.shape[0] // (2 if geglu else 1), weight.shape[1]
    number = DTYPE_NUMBERS[dtype]
    if dtype is torch.bfloat16 and depth % 2:
        raise ValueError(f"bfloat16 products take rows of even width, got {depth}; take float32")
    words = vfengine_native.packed_words(columns, depth, geglu, number)
    packed = torch.empty(words, dtype=torch.int32)
    args = vfengine_native.PackWeightsArgs(
        weights=weight.data_ptr(),
        out=packed.data_ptr(),
        columns=columns,
        depth=depth,
        geglu=geglu,
        dtype=number,
    )
    vfengine_native.pack_weights_cpu(args, 1)
    bias = None if bias is None else bias.detach().float().contiguous()
    return Weights(packed, bias, columns, epilogue)


def pack_winograd(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Weights:
    """weight [columns, channels, 3, 3] or [columns, channels, 3, 1], for `Builder.winograd`.

    The taps transformed for F(2, 3) (Lavin and Gray 2016), in fp32: 16 or 4 packed products.
    """
    half = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    taps = torch.einsum("ai,ocij->aocj", half, weight.float())
    if weight.shape[-1] == 3:
        taps = torch.einsum("bj,aocj->aboc", half, taps).flatten(0, 1)
    else:
        taps = taps[..., 0]
    parts = [pack(part, None, dtype).packed for part in taps]
    bias = None if bias is None else bias.detach().float().contiguous()
    return Weights(torch.cat(parts), bias, weight.shape[0])


class PackedLayers:
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
            self.weights[conv] = pack(conv_weight(conv, dtype, even), conv.bias, dtype)
            _let_go(conv)
        for conv in unet.upsamplers:
            self.upsampler(conv, unet.config.any_size)
            _let_go(conv)
        del unet.down, unet.mid, unet.up, unet.downsamplers, unet.upsamplers, unet.conv_out
        del unet.conv_norm_out, unet.transformer_in
        unet.double()  # the embeddings: rounded once, they do not show how they were summed

    def upsampler(self, conv: nn.Conv2d, any_size: bool) -> None:
        """3x3 on a picture enlarged by nearest pixels: 2x2 on the picture itself, per quarter.

        any_size: keeps the weights for other factors than 2 as well
        """
        if any_size or not is_light(conv):
            self.weights[conv] = pack(conv_weight(conv, self.dtype), conv.bias, self.dtype)
        if not is_light(conv):
            return
        weight = conv.weight.float()  # [C', C, 3, 3]
        # taps that fall on the same pixel, for an even and for an odd position
        same = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        for y, x in QUARTERS:
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

    def res_block(self, block: ResBlock) -> None:
        _as_fp32(block.norm1, block.norm2)
        conv1, conv2, shortcut = block.conv1, block.conv2, block.conv_shortcut
        self.conv(conv1)
        if isinstance(shortcut, nn.Conv2d) and takes_winograd(conv2):
            self.weights[shortcut] = pack(shortcut.weight.flatten(1), shortcut.bias, self.dtype)
            self.conv(conv2)
        elif isinstance(shortcut, nn.Conv2d):  # one product with the second convolution
            both = [conv_weight(conv2, self.dtype), shortcut.weight.flatten(1).to(self.dtype)]
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
            self.weights[conv] = pack(conv_weight(conv, self.dtype), conv.bias, self.dtype)

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


def is_light(conv: nn.Conv2d) -> bool:
    """Whether a faster form may cost memory: Winograd's, an upsampler's weights are 16/9 of it."""
    return conv.in_channels * conv.out_channels <= _LIGHT


def takes_winograd(conv: nn.Conv2d) -> bool:
    """Whether Winograd's form is the faster: not for few channels, whose transforms cost more."""
    least = 128 if conv.kernel_size == (3, 1) else 32
    return min(conv.in_channels, conv.out_channels) >= least and is_light(conv)


def joins_output(transformer: Transformer) -> bool:
    """Whether its last feed-forward layer is multiplied into proj_out, which saves a product.

    Not for wide ones, where the product of the weights takes longer than it saves.
    """
    last = transformer.rest[-1] if len(transformer.rest) else transformer
    inner = transformer.proj_out.in_features
    return last.ff is not None and transformer.proj_out.out_features <= inner <= 512


def conv_weight(conv: nn.Conv2d, dtype: torch.dtype, even: bool = False) -> Tensor:
    """[C', taps * C], the channels of a tap side by side; even: padded to an even number."""
    weight = conv.weight.detach().to(dtype).permute(0, 2, 3, 1)
    return F.pad(weight, (0, weight.shape[-1] % 2 if even else 0)).flatten(1)


def _let_go(*layers: nn.Module) -> None:
    """The weights are packed: the layer's own memory is freed, before the next one's are packed."""
    freed = 0
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            freed += parameter.nbytes
            parameter.data = parameter.data.new_empty(0)
    if freed > 2**22:
        return_memory()


def _as_fp32(*norms: nn.Module) -> None:
    for norm in norms:
        norm.float()


def return_memory() -> None:
    """Gives freed memory back to the system, which glibc would keep."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
