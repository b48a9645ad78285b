"""The contenders of Table 4: the ways to sample a clip with its networks, and a training step.

States are fp32 whatever the dtype of the weights, as VideoFusionPipeline keeps them; one clip, no
guidance, DDIM at η = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lib.table4_models import LAM, SCHEDULE, SHARING, Networks, Noise, make_noise, size
from vfengine.diffusion.decompose import add_noise, joint_loss
from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.solvers import SolverTable, solver_table
from vfengine.sampling.api import sample, sample_base, sample_residual, sample_video
from vfengine.sampling.interleaved import InterleavedLoop, InterleavedSpec
from vfengine.sampling.loop import Loop, LoopSpec
from vfengine.sampling.overlap import run_overlapped
from vfengine.sampling.two_phase import BaseSpec, Motion, PathSpec, ResidualLoop, ResidualSpec

PLAIN, VDM = "VDM*, plain PyTorch", "VDM*, our kernels"
INTERLEAVED = "VideoFusion, interleaved"
BASE_KEPT, TWO_PHASE = "two-phase, base kept", "two-phase"
OVERLAPPED = "two-phase, overlapped"
SHARED = f"K = {SHARING} on one base"
PEER = "diffusers UNet3D"


# -- sampling --------------------------------------------------------------------------------------


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
    table = ddim(steps)
    clips = noise.clips
    place = NoisePlace(0)  # of no use: η = 0
    if name == VDM:
        loop = ResidualSpec.of(clips, table, place).build(networks("video"))
        return _run(loop, capture, clips)
    if name == INTERLEAVED:
        base = LoopSpec.of(noise.base, table, place)
        spec = InterleavedSpec.of(clips, table, place, base=base, lam=LAM)
        loop = InterleavedLoop(networks("base"), networks("residual"), spec)
        return _run(loop, capture, noise.base, clips)
    if name not in (BASE_KEPT, OVERLAPPED, SHARED):
        raise ValueError(f"{name!r} keeps no loops")
    base = BaseSpec.of(noise.base, table, place).build(networks("base"))
    path = PathSpec.of(base.states, shared=True)
    spec = ResidualSpec.of(clips, table, place, motion=Motion(LAM), path=path)
    residual = spec.build(networks("residual"))
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
        stepper = loop.stepper(capture)
        loop.start(*noise)
        loop.run(stepper)
        return loop.u if isinstance(loop, ResidualLoop) else loop.z

    return run


def ddim(steps: int) -> SolverTable:
    return solver_table("ddim", SCHEDULE, steps)


def step_loops(
    networks: Networks, table: SolverTable
) -> dict[str, tuple[Loop, tuple[Tensor, ...]]]:
    """The loop of each network, one clip, and what it starts from."""
    noise, place = make_noise(networks.size, networks.device, clips=1), NoisePlace(0)
    base = BaseSpec.of(noise.base, table, place).build(networks("base"))
    path = PathSpec.of(base.states, shared=True)
    residual = ResidualSpec.of(noise.clip, table, place, motion=Motion(LAM), path=path)
    video = ResidualSpec.of(noise.clip, table, place)
    return {
        "base": (base, (noise.base,)),
        "residual": (residual.build(networks("residual")), (noise.clip,)),
        "video": (video.build(networks("video")), (noise.clip,)),
    }


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
