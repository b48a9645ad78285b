"""VideoFusion against VDM* at the paper's own scale: computed, not measured, without its GPU.

The paper reports (Table 4), against a video diffusion model made of its base generator (VDM*):
memory 63.82 -> 49.85 GB (0.781), latency 0.40 -> 0.17 s (0.425). Hardware, batch, resolution and
what was running are not known. Its generators are reported to have 2 B and 0.5 B parameters.

Here networks of that size are made of fake tensors, and every operation that one denoising step and
one training step dispatch is counted (costs.py).

Networks     clips of 16 frames of 64 x 64 x 3 pixels, 101 classes (UCF101), no text; our choice,
             as the paper's shapes are not known. Base: in the manner of ADM and of unCLIP's 64 x 64
             decoder (arXiv 2105.05233, 2204.06125), 512 x (1, 2, 3, 4) channels, 3 residual blocks
             a level, attention at 32, 16 and 8 pixels, 64 channels a head, no feed-forward layers.
             Residual: half as wide, (2, 2, 3, 2) blocks, frame embedding, temporal attention after
             every spatial one. VDM*: the base UNet unchanged, and the same temporal attention after
             every spatial one, on all frames (`vdm_config`)
Inference    bf16 weights and activations, clips in fp32, DDIM at η = 0. Interleaved: both networks
             resident. Two phases: the base network's weights are released before the residual
             network's are loaded, so the peak is the larger one; "base kept": they are not. Guided:
             classifier-free guidance, the batch doubled
Training     forward, backward and AdamW of one joint loss (VDM*: its ε loss), without activation
             checkpointing. Mixed precision, as vfengine trains: fp32 weights, gradients and two
             fp32 moments (16 bytes a parameter) under bf16 autocast, whose bf16 copies of the
             weights live until backward has used them. Pure bf16: bf16 weights and gradients, two
             fp32 moments, no fp32 weights (12 bytes); its update is not run, a fused one makes no
             memory. Further base images (TrainingOptions.extra_images) are not counted; averaged
             weights (ema) are only where it says so. LayerNorm runs in fp32, as under CUDA's
             autocast; the rest of the tracing follows CPU's
Memory       live bytes of tensors, in 1e9 bytes: no CUDA context, no kernel's own workspace, no
             fragmentation. Attention over more than 64 keys is one fused kernel that writes no
             logits; over at most 64 (8 x 8 pixels, frames) two batched products with a softmax in
             fp32 between, as vfengine.ops.attention runs it
Time         a roofline: Σ over launches of max(FLOPs / peak, bytes / bandwidth), with nothing
             fused, nothing overlapped, no cache between launches, every kernel at its ceiling.
             Ceilings (data sheets): A100 80 GB SXM 312 TFLOP/s dense bf16 and 2.039 TB/s, H100 SXM
             989 TFLOP/s and 3.35 TB/s. "graph" is that alone: a captured CUDA graph, launches free;
             "eager" adds 4 µs a launch, as if none were hidden. A floor, not a forecast: kernels
             stay below their ceilings, and copies that CUDA's GroupNorm and convolutions make
             between memory layouts are not among the operations

Result: of the plain settings, one clip a GPU in mixed-precision training comes
nearest to the paper's memories: both within 10 % (15 % if its GB are 2^30 bytes), their ratio 81 %
(with averaged weights 84 %; pure bf16 77 %, but both memories more than a quarter too small). Its
rooflines on an A100 are 0.40 and 0.18 s, which a real step would exceed. Inference passes such a
ratio between 2 clips (one, guided) and 16, with memories a fraction of the paper's. So the paper's
figures are of the size of a training step's; whether they are of one, nothing here can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lib.costs import Costs, Device, bytes_of, to_fake, trace
from lib.harness import Row, main, table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from vfengine import NoiseSchedule, ops
from vfengine.diffusion.decompose import add_noise, base_index, joint_loss
from vfengine.models import (
    BaseGenerator,
    ResidualGenerator,
    UNet,
    UNetConfig,
    VideoGenerator,
    vdm_config,
)

FRAMES, SIZE, STEPS, LAM, CLASSES = 16, 64, 50, 0.5, 101
DEVICES = (Device("A100", 312e12, 2.039e12), Device("H100", 989e12, 3.35e12))
LAUNCH = 4e-6  # seconds
PAPER_MEMORY = {"VDM*": 63.82, "VideoFusion": 49.85}  # "GB"
PAPER_LATENCY = {"VDM*": 0.40, "VideoFusion": 0.17}  # s

_SHAPE = {
    "spatial_attention": (False, True, True, True),
    "temporal_conv": (False,) * 4,
    "num_classes": CLASSES,
    "head_dim": 64,
    "norm_groups": 32,
    "feed_forward_mult": 0,
}
BASE = UNetConfig(
    in_channels=3,
    out_channels=4,
    block_out_channels=(512, 1024, 1536, 2048),
    layers_per_block=(3, 3, 3, 3),
    temporal_attention=(False,) * 4,
    **_SHAPE,
)
RESIDUAL = UNetConfig(
    in_channels=6,
    out_channels=6,
    block_out_channels=(256, 512, 768, 1024),
    layers_per_block=(2, 2, 3, 2),
    temporal_attention=(False, True, True, True),
    frame_embedding=True,
    **_SHAPE,
)
VDM = vdm_config(BASE)

VDM_STAR, INTERLEAVED = "VDM*", "VideoFusion, interleaved"
TWO_PHASE, BASE_KEPT = "VideoFusion, two phases", "VideoFusion, two phases, base kept"


# -- networks of fake tensors ----------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """The three generators, of fake tensors."""

    base: BaseGenerator
    residual: ResidualGenerator
    vdm: VideoGenerator


def build(dtype: torch.dtype, fake_mode: FakeTensorMode) -> Networks:
    """Takes no memory for the weights; the networks run under fake_mode."""
    with _Uninitialised(), torch.device("meta"):
        unets = [UNet(config).to(dtype) for config in (BASE, RESIDUAL, VDM)]
    schedule = NoiseSchedule.linear(1000, 1e-4, 2e-2)
    with fake_mode:
        base, residual, vdm = (to_fake(unet) for unet in unets)
        return Networks(
            BaseGenerator(base, schedule),
            ResidualGenerator(residual, schedule, LAM),
            VideoGenerator(vdm, schedule),
        )


class _Uninitialised(TorchFunctionMode):
    """Skips torch.nn.init: meta tensors have no values to initialise."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


# -- one denoising step ----------------------------------------------------------------------------


@torch.no_grad()
def denoising(networks: Networks, batch: int, guided: bool = False) -> dict[str, Costs]:
    """One step of a batch of clips, per way to sample. Call under the networks' FakeTensorMode."""
    clip = torch.empty(batch, FRAMES, 3, SIZE, SIZE)
    estimate, image = torch.empty_like(clip), torch.empty(batch, 3, SIZE, SIZE)
    path = torch.empty(STEPS + 1, batch, 3, SIZE, SIZE)  # the two-phase form's base terms
    t, labels = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
    place = {"lam": torch.full((FRAMES,), LAM), "step": torch.zeros(1, dtype=torch.int32)}
    coeffs, levels, m = torch.empty(STEPS, 3), torch.empty(STEPS), base_index(FRAMES)

    def network(model: nn.Module, z: Tensor) -> Costs:
        return trace(lambda: _estimate(model, z, t, labels, guided), live=(model, z, t, labels))

    def solver(z: Tensor) -> Costs:
        return trace(lambda: z.mul_(0.9).add_(estimate[:, 0] if z.ndim == 4 else estimate), (z,))

    def remove_base() -> None:
        ops.remove_base(clip, image, noise_levels=levels, out=estimate, **place)

    def combine() -> None:
        ops.decomposed_step(clip, image, estimate, coeffs=coeffs, **place)

    def residual_step() -> None:
        ops.residual_step(clip, estimate, image, coeffs=coeffs, **place)
        clip[:, m] = path[1]

    vdm = network(networks.vdm, clip)
    base, residual = network(networks.base, image), network(networks.residual, clip)
    around = bytes_of((clip, estimate, image))  # clip, z' and b̂, beside the network that runs
    with_residual = bytes_of([networks.residual]) + around
    with_base = bytes_of([networks.base]) + around
    phase = residual.beside(bytes_of([path, image])).then(trace(residual_step))
    two = base.beside(bytes_of([path])).then(solver(image))
    return {
        VDM_STAR: vdm.then(solver(clip)),
        INTERLEAVED: base.beside(with_residual)
        .then(trace(remove_base))
        .then(residual.beside(with_base))
        .then(trace(combine)),
        TWO_PHASE: two.then(phase),
        BASE_KEPT: two.beside(with_residual).then(phase.beside(with_base)),
    }


def _estimate(model: nn.Module, z: Tensor, t: Tensor, labels: Tensor, guided: bool) -> Tensor:
    """As VideoFusionPipeline calls its networks: guidance doubles the batch."""
    if not guided:
        return model(z, t, class_labels=labels)
    both = torch.cat([labels, torch.full_like(labels, CLASSES)])
    conditional, plain = model(torch.cat([z, z]), torch.cat([t, t]), class_labels=both).chunk(2)
    return torch.lerp(plain, conditional, 2.0)


# -- one training step -----------------------------------------------------------------------------


def training(networks: Networks, batch: int, decomposed: bool) -> Costs:
    """One step, of both generators or of VDM*; the precision is that of the networks' weights.

    fp32: mixed precision, AdamW included. bf16: forward and backward beside fp32 moments. Call
    under the networks' FakeTensorMode.
    """
    models = [networks.base, networks.residual] if decomposed else [networks.vdm]
    parameters = [p for model in models for p in model.parameters()]
    mixed = parameters[0].dtype == torch.float32
    x = torch.empty(batch, FRAMES, 3, SIZE, SIZE)
    noise, base_noise = torch.empty_like(x), torch.empty(batch, 3, SIZE, SIZE)
    t, labels = (torch.empty(batch, dtype=torch.int64) for _ in range(2))
    schedule = _AnySchedule()

    def network(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, t: model(z, t, class_labels=labels)

    def loss() -> Tensor:
        if decomposed:
            pair = [network(model) for model in models]
            data = (x, t, base_noise, noise)
            return sum(l.mean() for l in joint_loss(*pair, *data, schedule=schedule, lam=LAM))
        return (noise - network(models[0])(add_noise(x, noise, t, schedule), t)).square().mean()

    optimizer = torch.optim.AdamW(parameters, fused=True)
    moments = [] if mixed else [torch.empty_like(p, dtype=torch.float32) for p in parameters * 2]
    if mixed:  # its moments exist from the first step on
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), _LayerNormAsOnCuda(mixed):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        if mixed:
            optimizer.step()

    costs = trace(step, live=(models, optimizer, moments, x, noise, base_noise, t, labels))
    optimizer.zero_grad()
    return costs


class _AnySchedule(NoiseSchedule):
    """√ᾱ_t and √(1-ᾱ_t) by shape alone, as fake tensors have no values of t to look up.

    It has nothing else of a NoiseSchedule.
    """

    def __init__(self):
        pass

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        either = torch.empty(len(t), *[1] * (like.ndim - 1))
        return either, either


class _LayerNormAsOnCuda(TorchFunctionMode):
    """Runs layer_norm in fp32, as CUDA's autocast does and the CPU's does not."""

    def __init__(self, enabled: bool):
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.enabled and function is torch.nn.functional.layer_norm:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


# -- the tables ------------------------------------------------------------------------------------


def measure() -> list[Row]:
    """All figures; prints what they assume."""
    print(__doc__)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    bf16, fp32 = build(torch.bfloat16, mode), build(torch.float32, mode)
    with mode:
        steps = {
            "1 clip": denoising(bf16, 1),
            "1 clip, guided": denoising(bf16, 1, guided=True),
            "16 clips": denoising(bf16, 16),
        }
        trainings = {
            f"{precision}, 1 clip": {
                VDM_STAR: training(networks, 1, decomposed=False),
                "VideoFusion": training(networks, 1, decomposed=True),
            }
            for precision, networks in (
                ("mixed precision", fp32),
                ("pure bf16, no update", bf16),
            )
        }
    rows = _weights(bf16)
    for case, costs in steps.items():
        rows += _figures(f"one denoising step, {case} (computed)", costs)
    for case, costs in trainings.items():
        rows += _figures(f"one training step, {case} (computed)", costs)
    return [*rows, *_memory_ratios(bf16, steps, trainings), *_latency_ratios(steps, trainings)]


def _sizes(networks: Networks) -> dict[str, int]:
    return {name: sum(p.numel() for p in net.parameters()) for name, net in vars(networks).items()}


def _weights(networks: Networks) -> list[Row]:
    sizes = _sizes(networks)
    labels = {"base": "base", "residual": "residual", "vdm": VDM_STAR}
    rows = []
    for name, size in sizes.items():
        rows.append(Row("weights", labels[name], "parameters", size / 1e9, "B"))
        rows.append(Row("weights", labels[name], "bf16", 2 * size / 1e9, "GB"))
    return rows


def _figures(case: str, costs: dict[str, Costs]) -> list[Row]:
    rows = []
    for name, c in costs.items():
        rows += [
            Row(case, name, "peak memory", c.peak_bytes / 1e9, "GB"),
            Row(case, name, "arithmetic", c.flops / 1e12, "TFLOP"),
            Row(case, name, "moved", c.bytes / 1e9, "GB"),
            Row(case, name, "launches", c.launches, ""),
        ]
        for device in DEVICES:
            rows += [
                Row(case, name, f"{device.name} FLOPs alone", c.flops / device.flops * 1e3, "ms"),
                Row(case, name, f"{device.name} graph", c.seconds(device) * 1e3, "ms"),
                Row(case, name, f"{device.name} eager", _eager(c, device) * 1e3, "ms"),
            ]
    return rows


def _eager(costs: Costs, device: Device) -> float:
    return costs.seconds(device) + LAUNCH * costs.launches


def _memory_ratios(networks, steps, trainings) -> list[Row]:
    """VideoFusion / VDM*, by quantity."""
    case = "memory by what is counted (computed, but for the paper's)"
    sizes = _sizes(networks)
    decomposed = sizes["base"] + sizes["residual"]
    pairs = {
        "weights alone, bf16": (2 * sizes["vdm"], 2 * decomposed),
        "weights alone, bf16, two phases": (2 * sizes["vdm"], 2 * sizes["base"]),
    }
    for name, costs in steps.items():
        for way in (INTERLEAVED, TWO_PHASE, BASE_KEPT):
            pairs[f"inference, {name}, {way.removeprefix('VideoFusion, ')}"] = (
                costs[VDM_STAR].peak_bytes,
                costs[way].peak_bytes,
            )
    for name, costs in trainings.items():
        plain, joint = costs[VDM_STAR].peak_bytes, costs["VideoFusion"].peak_bytes
        pairs[f"training, {name}"] = plain, joint
        if name == "mixed precision, 1 clip":
            averaged = plain + 4 * sizes["vdm"], joint + 4 * decomposed
            pairs[f"training, {name}, averaged weights too"] = averaged
    pairs["the paper, measured"] = tuple(1e9 * value for value in PAPER_MEMORY.values())
    rows = []
    for name, (plain, joint) in pairs.items():
        rows += [
            Row(case, name, "VDM*", plain / 1e9, "GB"),
            Row(case, name, "VideoFusion", joint / 1e9, "GB"),
            Row(case, name, "ratio", 100 * joint / plain, "%"),
        ]
    return rows


def _latency_ratios(steps, trainings) -> list[Row]:
    """VideoFusion / VDM* in FLOPs and in projected times."""
    case = "latency, VideoFusion / VDM* (computed, but for the paper's)"
    pairs = {f"denoising, {k}": (v[VDM_STAR], v[TWO_PHASE]) for k, v in steps.items()}
    pairs |= {
        f"training, {k}": (v[VDM_STAR], v["VideoFusion"])
        for k, v in trainings.items()
        if "mixed" in k
    }
    rows = []
    for name, (plain, joint) in pairs.items():
        rows.append(Row(case, name, "FLOPs", 100 * joint.flops / plain.flops, "%"))
        for device in DEVICES:
            graph = 100 * joint.seconds(device) / plain.seconds(device)
            eager = 100 * _eager(joint, device) / _eager(plain, device)
            rows.append(Row(case, name, f"{device.name} graph", graph, "%"))
            rows.append(Row(case, name, f"{device.name} eager", eager, "%"))
    paper = 100 * PAPER_LATENCY["VideoFusion"] / PAPER_LATENCY["VDM*"]
    return [*rows, Row(case, "the paper, measured", "unknown GPU", paper, "%")]


def bench_paper_scale(benchmark, capsys):
    with capsys.disabled():
        rows = benchmark.pedantic(measure, rounds=1)
        print(table(rows))


if __name__ == "__main__":
    main(measure, __doc__)
