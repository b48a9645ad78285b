"""The loops of vfengine/sampling can be captured: audited whole, on latents and on pixels."""

from dataclasses import dataclass

import fake_cuda
import pytest
import torch
from pixel_model import pixel_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.diffusion.noise import NoisePlace, decomposed_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import SOLVERS, solver_table
from vfengine.formats.checkpoint import DecomposedConfig, load_network, read_config
from vfengine.models import UNet, VideoGenerator, vdm_config
from vfengine.models.layers import GroupNorm, Transformer
from vfengine.plan.cuda import CudaUNet
from vfengine.sampling.guidance import GuidedModel, ModelSpec
from vfengine.sampling.in_loop import Steps, in_loop
from vfengine.sampling.interleaved import InterleavedLoop, InterleavedSpec
from vfengine.sampling.loop import LoopSpec, steps_in_a_graph
from vfengine.sampling.two_phase import BaseSpec, Motion, PathSpec, ResidualSpec
from vfengine.training.objectives import build_networks

STEPS = 5
FRAMES = 6
CONFIGS = {"shipped": read_config(), "pixels": pixel_config()}
SCHEDULE = NoiseSchedule.linear()
PHASES = ("base", "residual", "clean", "windows", "cycle", "interleaved", "video")


PHASE_NETWORKS = {"base": ("base",), "interleaved": ("base", "residual"), "video": ("video",)}
MOST_KERNELS = {  # of a step
    "pixels": {"base": 110, "residual": 150, "video": 140},
    "shipped": {"base": 250, "residual": 320, "video": 340},
}
NETWORK_OPS = (
    *("model_input", "noise_estimate"),
    *("group_norm_silu", "layer_norm", "temporal_attention"),
)


def network_ops(ops: list[str]) -> dict[str, int]:
    """How often each of these ops of networks runs."""
    return {op: ops.count(f"vfengine.{op}.default") for op in NETWORK_OPS}


def ops_of_layers(networks: list[nn.Module]) -> dict[str, int]:
    """The same, from the layers that they have, each of which runs once."""
    kinds = {"group_norm_silu": GroupNorm, "layer_norm": nn.LayerNorm}
    layers = [layer for network in networks for layer in network.modules()]
    counts = {op: sum(isinstance(layer, kind) for layer in layers) for op, kind in kinds.items()}
    transformers = [layer for layer in layers if isinstance(layer, Transformer)]
    counts["temporal_attention"] = sum(layer.axis == "time" for layer in transformers)
    return {"model_input": len(networks), "noise_estimate": len(networks), **counts}


@dataclass(frozen=True)
class Networks:
    """Those of one of CONFIGS in bf16, on the CPU, by name; guided like a pipeline's."""

    kind: str
    by_name: dict[str, nn.Module | None]

    @property
    def config(self) -> DecomposedConfig:
        return CONFIGS[self.kind]

    def shape(self, frames: int | None) -> tuple[int, ...]:
        """Of a clip, or of a picture."""
        config = self.config
        size = (config.channels, config.height, config.width)
        return (1, *size) if frames is None else (1, frames, *size)

    def guided(self, name: str) -> GuidedModel:
        network, text = self.by_name[name], self.config.text_encoder
        if text is None:
            condition = {"labels": torch.tensor([3, self.config.null_class])}
        else:
            condition = {"context": torch.zeros(2, text.max_length, text.width)}
        return ModelSpec(network, scale=2.0, **condition).build(torch.device("cpu"))


NO_NETWORKS = Networks("pixels", {"base": None, "residual": None, "video": None})


@pytest.fixture(scope="module", params=list(CONFIGS))
def networks(request):
    """Base, residual and the VDM* of the base, untrained: a graph does not depend on weights.

    The audit replaces their tensors, so every test takes a fresh call of this.
    """
    config = CONFIGS[request.param]

    def make() -> Networks:
        networks = build_networks(config)
        video = UNet(vdm_config(config.base))
        networks["video"] = VideoGenerator(video, SCHEDULE, config.base_std)
        for network in networks.values():
            network.bfloat16().eval().requires_grad_(False)
        return Networks(request.param, networks)

    return make


def make_loop(phase, networks, table, frames=FRAMES):
    """A phase's loop on the CPU, and all objects whose tensors it reaches."""
    noise = decomposed_noise(networks.shape(frames), 0, 1)
    base, residual, video = (networks.guided(name) for name in ("base", "residual", "video"))
    states = torch.zeros(len(table) + 1, *networks.shape(None))
    with torch.inference_mode():
        if phase == "base":
            return BaseSpec.of(noise.base, table, NoisePlace(2)).build(base), [base]
        if phase == "interleaved":
            more = {"base": LoopSpec.of(noise.base, table, NoisePlace(2)), "lam": 0.5}
            spec = InterleavedSpec.of(noise.residual, table, NoisePlace(3), **more)
            return InterleavedLoop(base, residual, spec), [base, residual]
        if phase == "video":
            return ResidualSpec.of(noise.residual, table, NoisePlace(2)).build(video), [video]
        windows, path = (5, None) if phase == "windows" else None, PathSpec.of(states, shared=True)
        motion = Motion(0.5, windows, phase == "clean", phase == "cycle")
        spec = ResidualSpec.of(noise.residual, table, NoisePlace(3), motion=motion, path=path)
        loop = spec.build(residual)
        return loop, [residual, loop.model]


def fake_loop(phase, networks, table):
    """The loop on fake CUDA tensors, and the tensors that live across its steps, by name."""
    loop, parts = make_loop(phase, networks, table)
    mode, memo = FakeTensorMode(), {}
    models = [part for part in parts if isinstance(part, GuidedModel)]
    for part in (loop, *parts, *[model.network for model in models]):
        fake_cuda.to_fake_cuda(part, mode, memo)
    with mode, torch.inference_mode():
        for model in models:
            model.network.unet = CudaUNet(model.network.unet, torch.bfloat16)
        tie(loop, phase, networks, *models)
        loop.step()  # what is made once and kept
    buffers = dict(vars(loop))
    for name in ("mix", "mix_base", "mix_residual"):
        if name in buffers:
            mixing = buffers.pop(name)
            buffers |= {f"{name}.{k}": slot for k, slot in enumerate(mixing.history)}
    return loop, buffers


def tie(loop, phase: str, networks: Networks, *models: GuidedModel) -> None:
    """Ties a loop to its models anew, now that their networks have the form for CUDA."""

    def tied(model, frames=None):
        shape = torch.Size(networks.shape(frames))
        steps = Steps(loop.timesteps, loop.counter, shape, torch.float32)
        model = in_loop(model, steps)
        model.start()
        return model

    if phase == "interleaved":
        loop.base_model, loop.residual_model = tied(models[0]), tied(models[1], FRAMES)
    elif phase == "windows":
        loop.model.model = tied(*models, 5)
    elif phase == "cycle":
        loop.model.model = tied(*models, FRAMES)
    else:
        loop.model = tied(*models, None if phase == "base" else FRAMES)


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


def without_gradients(step):
    def call():
        with torch.inference_mode():
            step()

    return call


@pytest.mark.parametrize(
    ("phase", "solver"),
    [
        *((phase, "ddim") for phase in PHASES),
        *(("base", solver) for solver in SOLVERS[1:]),
        *((phase, solver) for phase in PHASES[1:] for solver in ("ddpm", "unipc")),
    ],
)
def test_whole_loop_can_be_captured(phase, solver, networks, cuda_guard):
    """No wait, no host copy, the same memory, and on every step the same list of ops."""
    table = solver_table(solver, SCHEDULE, STEPS)
    networks = networks()
    loop, buffers = fake_loop(phase, networks, table)
    report = fake_cuda.audit(without_gradients(loop.step), buffers, calls=STEPS)
    assert report.clean, report
    assert len(report.ops) == STEPS
    assert all(ops == report.ops[0] for ops in report.ops)
    step_ops = {"base": "base_step", "interleaved": "decomposed_step_"}
    name = step_ops.get(phase, "path_step")
    assert report.ops[0].count(f"vfengine.{name}.default") == 1
    if phase != "interleaved":
        assert report.ops[0][-1] == f"vfengine.{name}.default"  # it counts the step too
    most = MOST_KERNELS[networks.kind]
    if phase in most and solver == "ddim":
        kernels = [op for op in fake_cuda.launched(report.ops[0]) if op != "aten.to.dtype"]
        norms = kernels.count("vfengine.group_norm_silu.default")  # of one launch or two
        assert len(kernels) + norms <= most[phase], kernels
    in_step = PHASE_NETWORKS.get(phase, ("residual",))
    runs = {"windows": 2, "cycle": 3}.get(phase, 1)
    once = ops_of_layers([networks.by_name[name].unet.unet for name in in_step])
    assert network_ops(report.ops[0]) == {op: runs * count for op, count in once.items()}


def test_step_that_waits_is_reported(networks, cuda_guard):
    """λ as a list has to be brought from the host in every step."""
    table = solver_table("ddim", SCHEDULE, STEPS)
    loop, parts = make_loop("residual", networks(), table)
    parts[0].lam = [0.5] * FRAMES
    mode, memo = FakeTensorMode(), {}
    for part in (loop, parts[0], parts[0].network):
        fake_cuda.to_fake_cuda(part, mode, memo)
    report = fake_cuda.audit(without_gradients(loop.step), vars(loop))
    assert not report.clean
    assert any("host" in problem for problem in report.problems), report.problems


class WholeLoop(torch.nn.Module):
    """All steps of a loop as one module: its buffers are the loop's, its input the loop's state."""

    def __init__(self, loop, state, networks):
        super().__init__()
        self.loop, self.state, self.networks = loop, state, torch.nn.ModuleList(networks)
        self.places = []
        for part in [loop, *(v for v in vars(loop).values() if type(v).__name__ == "Mixing")]:
            for name, value in vars(part).items():
                for k, tensor in enumerate(value if isinstance(value, tuple) else [value]):
                    if isinstance(tensor, Tensor):
                        self.register_buffer(f"buffer_{len(self.places)}", tensor)
                        self.places.append((part, name, k if isinstance(value, tuple) else None))

    def forward(self, start):
        gathered = {}
        for i, (part, name, k) in enumerate(self.places):
            tensor = getattr(self, f"buffer_{i}")
            if k is None:
                setattr(part, name, tensor)
            else:
                gathered.setdefault((id(part), name), (part, name, []))[2].append(tensor)
        for part, name, tensors in gathered.values():
            setattr(part, name, tuple(tensors))
        self.loop.clock.rewind()
        self.loop.mix.clear()
        getattr(self.loop, self.state).copy_(start)
        for _ in range(len(self.loop)):
            self.loop.step()
        return getattr(self.loop, self.state).clone()


@pytest.mark.parametrize(
    ("phase", "state", "solver"), [("base", "z", "ddim"), ("residual", "u", "unipc")]
)
def test_whole_loop_is_one_static_program(phase, state, solver, tiny_checkpoint):
    """torch.export takes all steps at once, and what it wrote returns the loop's bits."""
    config = read_config(tiny_checkpoint)
    table = solver_table(solver, config.noise_schedule(), 3)
    labels = torch.tensor([1])
    noise = decomposed_noise((1, 4, 3, 16, 16), 0, 1)
    network = load_network(tiny_checkpoint, config, phase)

    def model(z, t):
        return network(z, t, class_labels=labels)

    if phase == "base":
        loop, start = (
            BaseSpec.of(noise.base, table, NoisePlace(0)).build(model),
            noise.base,
        )
    else:
        states = torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        path, start = PathSpec.of(states, shared=True), noise.residual
        spec = ResidualSpec.of(start, table, NoisePlace(0), motion=Motion(0.5), path=path)
        loop = spec.build(model)
    whole = WholeLoop(loop, state, [network])
    with torch.no_grad():
        program = torch.export.export(whole, (start,), strict=False)
        expected = whole(start)
        result = program.module()(start)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    name = {"base": "decomposed_step", "residual": "residual_step"}[phase]
    assert sum(name in call for call in calls) == 3
    assert torch.equal(result, expected)


# -- which loops are captured -----------------------------------------------------------


def test_on_a_cpu_the_step_itself_runs():
    loop, _ = make_loop("base", NO_NETWORKS, solver_table("ddim", SCHEDULE, 2))
    steps = loop.stepper(capture=True)
    assert (steps.take, steps.count) == (loop.step, 1)


def test_float64_cannot_be_captured():
    loop, _ = make_loop("base", NO_NETWORKS, solver_table("ddim", SCHEDULE, 2))
    loop.device, loop.dtype = torch.device("cuda", 0), torch.float64
    with pytest.raises(RuntimeError, match="float64 clips cannot be captured"):
        loop.stepper(capture=True)


@pytest.mark.parametrize(
    ("total", "count"),
    [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (10, 2), (12, 3), (13, 1), (16, 4), (20, 5), (50, 5)],
)
def test_steps_in_a_graph_divide_the_loop(total, count):
    assert steps_in_a_graph(total) == count


def test_a_graph_holds_no_part_of_a_loop_that_leaves_a_rest():
    loop, _ = make_loop("base", NO_NETWORKS, solver_table("ddim", SCHEDULE, 5))
    loop.device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="at_once must divide the loop's 5 steps, got 2"):
        loop.stepper(capture=True, at_once=2)
