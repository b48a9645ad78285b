"""What Table 4 compares: networks of random weights, ways to sample a clip, a step of training.

Sizes    "default" has the shapes of the shipped model; "large" a base network of the widths of the
         usual UNet3D on 64 x 64 pixels, not folded, and a residual network half as wide, with the
         temporal layers of VDM* (no convolutions, no feed-forward layer); "tiny" is for tests and
         warm-ups. VDM* is always the base network made a video network by `vdm_config`, and
         nothing else. Spatial attention, and after it temporal attention where there is any, sits
         at the two coarser levels of "large" and at the coarsest of "default". "paper" has the
         networks of bench_paper_scale.py, 2 B and 0.5 B parameters, for a GPU
Weights  drawn, so that no layer multiplies by the zeros it would start from; the clips mean nothing
States   fp32 whatever the dtype of the weights, as VideoFusionPipeline keeps them; batch of one
         clip, no guidance, DDIM at η = 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vfengine.checkpoint import read_config
from vfengine.decompose import add_noise, decomposed_noise, joint_loss
from vfengine.loops import BaseLoop, InterleavedLoop, Loop, ResidualLoop, VideoLoop
from vfengine.models import (
    BaseGenerator,
    ResidualGenerator,
    UNet,
    UNetConfig,
    VideoGenerator,
    for_inference,
    vdm_config,
)
from vfengine.overlap import run_overlapped
from vfengine.sampling import sample, sample_base, sample_residual, sample_video
from vfengine.schedule import NoiseSchedule
from vfengine.solvers import solver_table

LAM = 0.5
SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
SHARING = 8  # K, the residual clips on one base path

PLAIN, VDM = "VDM*, plain PyTorch", "VDM*, our kernels"
INTERLEAVED = "VideoFusion, interleaved"
BASE_KEPT, TWO_PHASE = "two-phase, base kept", "two-phase"
OVERLAPPED = "two-phase, overlapped"
SHARED = f"K = {SHARING} on one base"
PEER = "diffusers UNet3D"


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
        shipped = read_config()
        return Size(shipped.base, shipped.residual, None, shipped.num_frames, shipped.height)
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


# -- sampling --------------------------------------------------------------------------------------


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


def _how(steps: int) -> dict:
    return {"schedule": SCHEDULE, "num_inference_steps": steps}


@torch.inference_mode()
def ddim_eager(model: nn.Module, z: Tensor, steps: int) -> Tensor:
    """DDIM at η = 0 as one would write it (Song et al. 2021, eq. 12)."""
    timesteps = SCHEDULE.timesteps(steps)
    alphas = SCHEDULE.selected(timesteps).to(z.device, z.dtype)
    previous = SCHEDULE.selected_previous(timesteps).to(z.device, z.dtype)
    for t, a, p in zip(timesteps.to(z.device), alphas, previous, strict=True):
        eps = model(z, t.expand(len(z)))
        x = (z - (1 - a).sqrt() * eps) / a.sqrt()
        z = p.sqrt() * x + (1 - p).sqrt() * eps
    return z


def vdm_plain(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    return ddim_eager(networks("plain"), noise.clip, steps)


def peer(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    return ddim_eager(networks("peer"), noise.clip, steps)


def vdm(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    return sample_video(networks("video"), noise.clip, **_how(steps), capture=capture)


def interleaved(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    return _sample(networks, noise, steps, method="interleaved", capture=capture)


def base_kept(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    return _sample(networks, noise, steps, method="two_phase", capture=capture)


def overlapped(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    return _sample(networks, noise, steps, overlap_phases=True, capture=capture)


def _sample(networks: Networks, noise: Noise, steps: int, **how) -> Tensor:
    models = networks("base"), networks("residual")
    return sample(*models, noise.base, noise.clip, lam=LAM, **_how(steps), **how)


def two_phase(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    """The base network's weights leave memory before the residual network's come."""
    path = sample_base(networks("base"), noise.base, **_how(steps), capture=capture)
    networks.release("base")
    return sample_residual(networks("residual"), path, noise.clip, lam=LAM, capture=capture)


def shared(networks: Networks, noise: Noise, steps: int, capture: bool = False) -> Tensor:
    """All clips [K, N, C, H, W] on one base path, one after another, the base weights released."""
    path = sample_base(networks("base"), noise.base, **_how(steps), capture=capture)
    networks.release("base")
    residual = networks("residual")
    clips = noise.clips.split(1)
    return torch.cat(
        [
            sample_residual(residual, path, clip, lam=LAM, sample_offset=k, capture=capture)
            for k, clip in enumerate(clips)
        ]
    )


Contender = Callable[..., Tensor]  # networks, noise, steps, capture
CONTENDERS: Mapping[str, Contender] = {
    PLAIN: vdm_plain,
    VDM: vdm,
    INTERLEAVED: interleaved,
    BASE_KEPT: base_kept,
    TWO_PHASE: two_phase,
    OVERLAPPED: overlapped,
    SHARED: shared,
    PEER: peer,
}
BOTH = {"base": 1.0, "residual": 1.0}
CALLS: Mapping[str, Mapping[str, float]] = {  # of networks, in a step of a clip
    PLAIN: {"video": 1.0},
    VDM: {"video": 1.0},
    INTERLEAVED: BOTH,
    BASE_KEPT: BOTH,
    TWO_PHASE: BOTH,
    OVERLAPPED: BOTH,
    SHARED: BOTH | {"base": 1 / SHARING},
    PEER: {"peer": 1.0},
}


@torch.inference_mode()
def kept(
    name: str, networks: Networks, noise: Noise, steps: int, capture: bool
) -> Callable[[], Tensor]:
    """A contender whose loops are made, and on CUDA captured, once: as a pipeline keeps them.

    Of SHARED, the K clips are one batch, which is how a GPU would run them; noise may hold a batch
    of base noise and of clips, which all but SHARED take whole.
    """
    table = solver_table("ddim", SCHEDULE, steps)
    clips = noise.clips
    motion = {"clean": False, "lam": LAM, "seed": 1}
    if name == VDM:
        return _run(VideoLoop(networks("video"), clips, table, seed=1), capture, clips)
    if name == INTERLEAVED:
        models = networks("base"), networks("residual")
        seeds = {"base_seed": 0, "residual_seed": 1}
        loop = InterleavedLoop(*models, noise.base, clips, table, lam=LAM, **seeds)
        return _run(loop, capture, noise.base, clips)
    if name not in (BASE_KEPT, OVERLAPPED, SHARED):
        raise ValueError(f"{name!r} keeps no loops")
    base = BaseLoop(networks("base"), noise.base, table, seed=0)
    residual = ResidualLoop(networks("residual"), clips, base.states, table, **motion)
    if name == OVERLAPPED:

        @torch.inference_mode()
        def both() -> Tensor:
            run_overlapped(base, residual, noise.base, clips, capture)
            return residual.u

        return both
    phases = _run(base, capture, noise.base), _run(residual, capture, clips)
    return lambda: [phase() for phase in phases][-1]


def _run(loop: Loop, capture: bool, *noise: Tensor) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        step = loop.stepper(capture)
        loop.start(*noise)
        loop.run(step)
        return loop.z if isinstance(loop, BaseLoop | InterleavedLoop) else loop.u

    return run


# -- training --------------------------------------------------------------------------------------


def training_step(networks: Networks, noise: Noise, decomposed: bool) -> Callable[[], None]:
    """One step: forward and backward under bf16 autocast, AdamW; fp32 weights and moments, 1 clip.

    decomposed: the joint loss of both networks (VideoFusion), else the ε loss of VDM*'s
    """
    models = [networks(name) for name in (("base", "residual") if decomposed else ("video",))]
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-5, betas=(0.9, 0.99), fused=True)
    eps = noise.clip
    x = eps.roll(1, -1) * 0.5  # pixels of no meaning
    t = torch.tensor([500], device=eps.device)

    def loss() -> Tensor:
        if decomposed:
            how = {"schedule": SCHEDULE, "lam": LAM}
            base_loss, residual_loss = joint_loss(*models, x, t, noise.base, eps, **how)
            return base_loss.mean() + residual_loss.mean()
        return (eps - models[0](add_noise(x, eps, t, SCHEDULE), t)).square().mean()

    def step() -> None:
        with torch.autocast(eps.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# -- what peak_memory.py runs in a process of its own ----------------------------------------------


def sampling_probe(
    contender: str,
    size_name: str,
    dtype: str,
    device: str,
    steps: int,
    frames: int | None = None,
    capture: bool = False,
) -> Callable[[], Tensor]:
    """After imports, a warm-up of the tiny size and the noise: builds networks, samples a clip."""
    CONTENDERS[contender](*_networks_and_noise("tiny", dtype, device), 2, capture)
    networks, noise = _networks_and_noise(size_name, dtype, device, frames)
    return lambda: CONTENDERS[contender](networks, noise, steps, capture)


def training_probe(decomposed: bool, size_name: str, device: str) -> Callable[[], None]:
    """The same for two steps of training: the optimizer's moments exist in the second."""

    def run(name: str) -> Callable[[], None]:
        networks, noise = _networks_and_noise(name, "float32", device, trained=True)

        def two_steps() -> None:
            step = training_step(networks, noise, decomposed)
            step()
            step()

        return two_steps

    run("tiny")()
    return run(size_name)


def _networks_and_noise(
    size_name: str,
    dtype: str,
    device: str,
    frames: int | None = None,
    trained: bool = False,
) -> tuple[Networks, Noise]:
    shape = size(size_name)
    networks = Networks(shape, device, getattr(torch, dtype), keep=False, trained=trained)
    return networks, make_noise(shape, device, frames)
