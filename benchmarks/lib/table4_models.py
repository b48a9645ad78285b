"""The networks that Table 4 compares, of random weights, and the noise that they start from.

Sizes    "default" is what `python -m vfengine.train` makes on pixels; "large" a base network of the
         widths of the usual UNet3D on 64 x 64 pixels, not folded, and a residual network half as
         wide, with the temporal layers of VDM* (no convolutions, no feed-forward layer); "tiny" is
         for tests and warm-ups. VDM* is always the base network made a video network by
         `vdm_config`, and nothing else. Spatial attention, and after it temporal attention where
         there is any, sits at the two coarser levels of "large" and at the coarsest of "default".
         "paper" has the networks of bench_paper_scale.py, 2 B and 0.5 B parameters, for a GPU
Weights  drawn, so that no layer multiplies by the zeros it would start from; the clips mean nothing
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lib.costs import to_fake, trace
from vfengine.cli.train_settings import read_settings
from vfengine.diffusion.noise import decomposed_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.models import (
    BaseGenerator,
    ResidualGenerator,
    UNet,
    UNetConfig,
    VideoGenerator,
    for_inference,
    vdm_config,
)
from vfengine.training.mocap import ACTIONS
from vfengine.training.recipes import Shape, pixel_model

LAM = 0.5
SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
SHARING = 8  # K, the residual clips on one base path


# -- sizes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """UNets and clips; peer: widths and channels a head of diffusers' UNet3DConditionModel."""

    base: UNetConfig
    residual: UNetConfig
    peer: tuple[tuple[int, ...], int] | None = None
    frames: int = 16
    pixels: int = 64

    @property
    def video(self) -> UNetConfig:
        return vdm_config(self.base)

    plain = video


def size(name: str) -> Size:
    """The size of this name: "default", "large", "paper" or "tiny"."""
    if name == "default":
        shape = Shape.of(read_settings(["--output", "anywhere"]))
        pixels = pixel_model(shape, tuple(ACTIONS), "decomposed")
        return Size(pixels.base, pixels.residual, None, pixels.num_frames, pixels.height)
    if name == "large":
        return Size(*_pair((128, 256, 512), (64, 128, 256), 2, 64, 32), ((128, 256, 512), 64))
    if name == "paper":
        import bench_paper_scale as paper

        return Size(paper.BASE, paper.RESIDUAL, None, paper.FRAMES, paper.SIZE)
    if name == "tiny":
        return Size(*_pair((16, 16, 32), (8, 8, 16), 1, 8, 8), ((16, 16, 32), 8), 4, 16)
    raise ValueError(f'size must be "default", "large", "paper" or "tiny", got {name!r}')


def _pair(
    base: tuple[int, ...], residual: tuple[int, ...], layers: int, head_dim: int, groups: int
) -> tuple[UNetConfig, UNetConfig]:
    """Base and residual network of these widths, alike but for what makes the latter one."""
    attention = (False, *[True] * (len(base) - 1))
    shape = {
        "layers_per_block": (layers,) * len(base),
        "spatial_attention": attention,
        "norm_groups": groups,
        "head_dim": head_dim,
    }
    return (
        UNetConfig(block_out_channels=base, out_channels=4, **shape),
        UNetConfig(
            block_out_channels=residual,
            in_channels=6,
            out_channels=6,
            temporal_attention=attention,
            temporal_feed_forward=False,
            frame_embedding=True,
            **(shape | {"head_dim": min(head_dim, residual[0])}),
        ),
    )


# -- networks --------------------------------------------------------------------------------------


class Networks:
    """The "base", "residual", "video" and "peer" of a size, each built when first asked for.

    Those that sample run as the pipeline's do, on a CPU as a plan; "plain" is "video" as PyTorch
    runs it.

    keep: whether `release` leaves a network in memory, for contenders that take turns
    """

    def __init__(
        self, size: Size, device: str, dtype: torch.dtype, keep: bool, trained: bool = False
    ) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.keep, self.trained = keep, trained
        self._built: dict[str, nn.Module] = {}

    def __call__(self, name: str) -> nn.Module:
        if name not in self._built:
            network = materialise(skeleton(self.size, name, self.dtype), self.device)
            if name not in ("plain", "peer") and not self.trained:
                network = for_inference(network, self.dtype, self.device)
            network = generator(name, network).to(self.device)
            self._built[name] = network.requires_grad_(self.trained)
        return self._built[name]

    def release(self, name: str) -> None:
        if not self.keep:
            del self._built[name]


def skeleton(size: Size, name: str, dtype: torch.dtype) -> nn.Module:
    """The network without weights, on the meta device: what it takes later is its weights alone."""
    with torch.device("meta"):
        network = _peer(*size.peer) if name == "peer" else UNet(getattr(size, name))
        return network.to(dtype).eval()


@torch.no_grad()
def materialise(network: nn.Module, device: str, seed: int = 0) -> nn.Module:
    """Weights on `device`: matrices N(0, 1 / inputs), norms 1 and biases N(0, 0.01)."""
    network.to_empty(device=device)
    random = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=random)
        elif name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.1, generator=random)
    return network


def generator(name: str, network: nn.Module) -> nn.Module:
    """(z, t) -> ε̂ around the network of this name."""
    if name == "base":
        return BaseGenerator(network, SCHEDULE)
    if name == "residual":
        return ResidualGenerator(network, SCHEDULE, LAM)
    if name in ("video", "plain"):
        return VideoGenerator(network, SCHEDULE)
    return Peer(network)


class Peer(nn.Module):
    """diffusers' UNet3DConditionModel as (z, t) -> ε̂, with 8 context tokens of 64 numbers."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        x = z.transpose(1, 2).to(self.unet.dtype)  # [B, C, N, H, W]
        context = torch.zeros(len(z), 8, 64, dtype=x.dtype, device=x.device)
        return self.unet(x, t, encoder_hidden_states=context).sample.transpose(1, 2).to(z.dtype)


def _peer(widths: tuple[int, ...], head_dim: int) -> nn.Module:
    """Its default blocks, for three levels: attention at all but the coarsest, and in the middle.

    As it comes: eager, weights contiguous (on a CPU channels_last was no faster).
    """
    from diffusers import UNet3DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of casts that do not concern this network
    plain = len(widths) - 1
    return UNet3DConditionModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock3D",) * plain + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * plain,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=min(32, widths[0]),
        cross_attention_dim=64,
        attention_head_dim=head_dim,
    )


@functools.cache
def flops(size_name: str, network: str) -> int:
    """FLOPs of one call on one clip (base: one image), counted with fake tensors (costs.py)."""
    shape = size(size_name)
    model = skeleton(shape, network, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        frames = () if network == "base" else (shape.frames,)
        z = torch.empty(1, *frames, 3, shape.pixels, shape.pixels)
        model = generator(network, to_fake(model))
        return trace(lambda: model(z, torch.zeros(1, dtype=torch.int64))).flops


# -- noise -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """base [1, C, H, W]; clips [K, N, C, H, W], of which all contenders but one take the first."""

    base: Tensor
    clips: Tensor

    @property
    def clip(self) -> Tensor:
        return self.clips[:1]


def make_noise(size: Size, device: str, frames: int | None = None, clips: int = SHARING) -> Noise:
    shape = (clips, frames or size.frames, 3, size.pixels, size.pixels)
    noise = decomposed_noise(shape, base_seed=0, residual_seed=1, device=device)
    return Noise(noise.base[:1].clone(), noise.residual)
