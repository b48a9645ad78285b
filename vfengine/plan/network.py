"""Inference of networks on a CPU: weights packed once, a static program per shape.

A `PlannedUNet` takes a UNet's place. The weights of a planned network lie in the order in which
this machine's kernels read them. Activations are rows of one dtype from the first convolution to
the last. Nothing is copied for a layout, a concatenation, an upsampling or a padding: tables say
which rows a matrix product reads (csrc/row_matmul.h). Statistics, sums and softmax are in fp32.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfengine.forks import Lock
from vfengine.native import vfengine_native

from ..ops._dispatch import DTYPE_NUMBERS
from .builder import Builder
from .cuda import CudaUNet
from .forms import FeatureMap
from .memory import return_memory
from .packing import Weights
from .program import Program, Rows
from .walk import Packed, Packer, Planner

if TYPE_CHECKING:
    from ..sampling.features import Kept

_PROGRAMS = 4  # shapes whose programs are kept
_TILED = 128  # least rows with which transformers run in tiles: fewer do not occupy all threads
# Parts of a UNet in the order in which their weights are numbered. Fingerprints of networks hash
# the numbers, and older files record fingerprints: the order must not change.
_NUMBERED = (
    *("transformer_in", "down", "mid", "up"),
    *("conv_in", "downsamplers", "conv_out", "upsamplers"),
)


def inference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a network of `dtype` is computed: float32 without bf16 instructions.

    A UserWarning says so in that case. Raises ValueError for a dtype that is neither float32 nor
    bfloat16.
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


class PlannedNetwork(nn.Module):
    """The common part of planned networks: packed weights, and the programs of the last shapes.

    network: consumed: its weights move into the plan, so that memory holds them once
    dtype:   of weights and activations, float32 or bfloat16; see `inference_dtype`
    inputs:  what `network.plan` takes besides the images, in terms of a Packer

    A subclass makes the program of a shape, in `_planned`. ValueError for a network without its
    weights, which an earlier plan has consumed.

    on_cuda: the network's form there (cuda.py), of (network, dtype); None: PyTorch runs it
    """

    on_cuda: ClassVar[type[nn.Module] | None] = None

    def __init__(self, network: nn.Module, dtype: torch.dtype, **inputs: object) -> None:
        super().__init__()
        if any(weights.numel() == 0 for weights in network.parameters()):
            name = type(self).__name__
            raise ValueError(f"{name}: the network's weights have moved into an earlier plan")
        self.config = network.config
        self.dtype = inference_dtype(dtype)
        self._isa = vfengine_native.cpu_isa()
        self._lock = Lock()
        self._programs: OrderedDict[tuple, PlannedForward] = OrderedDict()
        self._address = 0  # of the weights that the programs read
        packer = Packer(self.dtype)
        with torch.no_grad():
            network.plan(packer, packer.any, **inputs)
            self._packed = packer.packed()
        for index, weights in enumerate(_numbered(network, self._packed)):
            self.register_buffer(f"packed_{index}", weights.packed)
            self.register_buffer(f"bias_{index}", weights.bias)
        self._plan = network.plan  # for further shapes; of layers' weights only norms' are left
        self.eval()
        return_memory()

    def __getstate__(self) -> dict:
        """Of a copy or a pickle, which makes its own programs: they hold addresses."""
        return {**self.__dict__, "_programs": OrderedDict()}

    def _check_isa(self) -> None:
        """RuntimeError where the instruction set was changed since the weights were packed."""
        name, isa = type(self).__name__, vfengine_native.cpu_isa()
        if isa != self._isa:
            raise RuntimeError(f"{name}: weights are packed for {self._isa}, not {isa}")

    def _forward(self, *key: tuple[int, ...] | bool | None) -> PlannedForward:
        """The program for shapes of inputs, made by `_planned` if there is none.

        All are made anew once the weights have moved, as they do to memory that processes share
        when they are sent to another process.
        """
        if self._address != self.packed_0.data_ptr():
            self._programs.clear()
            self._address = self.packed_0.data_ptr()
        if key not in self._programs:
            while len(self._programs) >= _PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[key] = self._planned(*key)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _apply(self, fn, recurse=True):
        """Accepts only its own dtype and device: packed weights can be neither moved nor cast."""
        probe = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype != self.dtype:
            raise RuntimeError(
                f"{type(self).__name__}: packed for {self.dtype} on the CPU; load the network "
                f"anew for {probe.dtype} on {probe.device}"
            )
        return self


class PlannedUNet(PlannedNetwork):
    """forward(x, t, context, class_labels, guidance, kept) as `UNet`, without a gradient, on a CPU.

    unet:  a `UNet`, consumed: its weights move into the plan, so that memory holds them once
    dtype: of weights and activations, float32 or bfloat16; see `inference_dtype`

    Results depend on neither batch size nor number of threads. Raises ValueError where UNet does,
    RuntimeError where the instruction set was changed since the weights were packed.
    """

    on_cuda = CudaUNet

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(unet, dtype, context=Packer.any if unet.config.context_dim else None)
        # Embeddings in float64: once rounded, they do not depend on the order of sums.
        self.unet = unet.embeddings().double().requires_grad_(False).eval()

    @property
    def class_embedding(self) -> nn.Module | None:
        return self.unet.class_embedding

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | float | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """The network's prediction, of the shape of x but with out_channels, in x's dtype."""
        self._check_isa()
        t = self.unet.check_inputs(x, t, context, class_labels)
        self._check(x, context)
        config, patch = self.config, self.config.patch_size
        clips = x if config.is_video else x[:, None]
        shape, frames = tuple(clips.shape), clips.flatten(0, 1)
        with self._lock, torch.no_grad():
            key = shape, None if context is None else tuple(context.shape)
            forward = self._forward(*key, *(() if kept is None else (True,)))
            images = F.pixel_unshuffle(frames, patch) if patch > 1 else frames
            frames_embedded = shape[1] if forward.per_image else 1
            embedding = self.unet.embed(t, class_labels, frames_embedded, guidance)
            out = forward(images, F.silu(embedding), context, kept)
            out = F.pixel_shuffle(out, patch) if patch > 1 else out.clone()  # out of the arena
        out = out.to(x.dtype, memory_format=torch.contiguous_format)
        return out.unflatten(0, shape[:2]) if config.is_video else out

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        """ValueError for inputs that the kernels cannot take and `check_inputs` does not check."""
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

    def _planned(
        self,
        shape: tuple[int, ...],
        context_shape: tuple[int, ...] | None,
        reuse: bool = False,
        whole: PlannedForward | None = None,
    ) -> PlannedForward:
        """The program for clips [B, N, C, H, W] and a context [B, L, C'].

        reuse: keep the deep features among the results, with the `shallow` program that reads them
        whole: the program whose shallow one this is
        """
        batch, frames, channels, height, width = shape
        patch = self.config.patch_size
        height, width, channels = height // patch, width // patch, channels * patch**2
        # Where the embedding is only added, one row serves all frames of a clip.
        per_image = self.config.frame_embedding or self.config.scale_shift
        build = Builder(self.dtype)
        x = build.rows(batch * frames * height * width, channels + channels % 2)
        embedding = build.rows(batch * (frames if per_image else 1), self.unet.embed_dim)
        context = None
        if context_shape is not None:
            context = build.rows(context_shape[0] * context_shape[1], context_shape[2])
        modulation = build.matmul(embedding, self._packed.embedding, out_dtype=torch.float32)
        planner = Planner(build, self._packed, batch, frames, modulation, per_image, _TILED)
        border = None
        if whole is not None:
            deep = build.rows(whole.deep.count, whole.deep.width)
            border = _Border(FeatureMap((deep,), height, width))
        elif reuse:
            border = _Border()
        with torch.no_grad():
            out = self._plan(planner, FeatureMap((x,), height, width), context, border)
        results = (out.rows, border.deep.rows) if reuse else (out.rows,)
        forward = PlannedForward(
            build.program(*results, arena=None if whole is None else whole.program.arena),
            *((height, width), x, out.rows, embedding, context, per_image),
            deep=None if border is None else border.deep.rows,
        )
        if not reuse:
            return forward
        return replace(forward, shallow=self._planned(shape, context_shape, whole=forward))


class _Border:
    """Where a plan's deep part ends: the features that pass it, or those that are there."""

    def __init__(self, deep: FeatureMap | None = None) -> None:
        self.shallow, self.deep = deep is not None, deep

    def exchange(self, h: FeatureMap) -> FeatureMap:
        if not self.shallow:
            self.deep = h
        return self.deep


InferenceUNet = PlannedUNet | CudaUNet  # what takes a UNet's place


def for_inference(
    network: nn.Module,
    dtype: torch.dtype,
    device: torch.device | str,
    planned: type[PlannedNetwork] = PlannedUNet,
) -> nn.Module:
    """The network in its fastest form, which consumes it: a `planned`, or on CUDA its `on_cuda`.

    Left to PyTorch: float16 on a CPU, float64 on CUDA, and what has no form there.
    """
    if torch.device(device).type == "cpu" and dtype is not torch.float16:
        return planned(network, dtype)
    on_cuda = planned.on_cuda if torch.device(device).type == "cuda" else None
    if on_cuda is not None and dtype in DTYPE_NUMBERS:
        return on_cuda(network, dtype)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class PlannedForward:
    """The program of one shape, with its input and output buffers.

    size:      height and width of the result, in patches
    x:         buffer of the images; if their channels are odd, with a channel of zeros
    embedding: None: the network has none
    per_image: whether each frame has an embedding of its own; otherwise each clip has one
    deep:      buffer of the features that are kept, or in a shallow program found
    shallow:   the program of the shallow part alone, in the same arena
    """

    program: Program
    size: tuple[int, int]
    x: Rows
    out: Rows
    embedding: Rows | None = None
    context: Rows | None = None
    per_image: bool = False
    deep: Rows | None = None
    shallow: PlannedForward | None = None

    def __call__(
        self,
        images: Tensor,
        embedding: Tensor | None = None,
        context: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """images [B*N, C, H, W] -> [B*N, C', H', W'], which the next call overwrites.

        kept: as in `UNet.forward`, of a program with `shallow`
        """
        if kept is not None and kept.shallow:
            self.shallow.program.view(self.shallow.deep).copy_(kept.deep)
            return self.shallow(images, embedding, context)
        program, channels = self.program, images.shape[1]
        rows = program.view(self.x).view(-1, *images.shape[2:], self.x.width)
        rows[..., :channels].copy_(images.permute(0, 2, 3, 1))
        rows[..., channels:].zero_()
        if self.embedding is not None:
            program.view(self.embedding).copy_(embedding)
        if self.context is not None:
            program.view(self.context).copy_(context.flatten(0, 1))
        program.run()
        if kept is not None:
            kept.exchange(program.view(self.deep))
        return program.view(self.out).view(-1, *self.size, self.out.width).permute(0, 3, 1, 2)


def _numbered(network: nn.Module, packed: Packed) -> Iterator[Weights]:
    """All weights by number; those of parts that are not in _NUMBERED come last."""
    parts = [part for name in _NUMBERED if (part := getattr(network, name, None)) is not None]
    order = {layer: number for number, layer in enumerate(_layers(parts))}
    for layer in sorted(packed.forms, key=lambda layer: order.get(layer, len(order))):
        yield from packed.forms[layer].weights
    if packed.embedding is not None:
        yield packed.embedding


def _layers(parts: list[nn.Module]) -> Iterator[nn.Module]:
    for part in parts:
        yield from part.modules()
