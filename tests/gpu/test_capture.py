"""Loops replayed from CUDA graphs, and phases overlapped, against the same run step by step.

Plain and captured runs launch the same kernels, so equal bits are expected; a library that chooses
another algorithm on another stream is told of in a warning, within what its rounding explains.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from held import networks_of
from torch import Tensor, nn

from vfengine.diffusion.noise import NoisePlace, decomposed_noise
from vfengine.diffusion.solvers import solver_table
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.ops import residual_step
from vfengine.pipelines.videofusion import VideoFusionPipeline
from vfengine.plan.cuda import CudaUNet
from vfengine.sampling.features import Kept
from vfengine.sampling.guidance import GuidedModel, ModelSpec
from vfengine.sampling.in_loop import LoopModel, Steps, in_loop
from vfengine.sampling.interleaved import InterleavedLoop, InterleavedSpec
from vfengine.sampling.loop import Loop, LoopSpec
from vfengine.sampling.overlap import run_overlapped
from vfengine.sampling.two_phase import BaseSpec, Motion, PathSpec, ResidualSpec

from .graphs import assert_same, in_a_graph

STEPS = 6
SLOW = 200_000  # cycles, about 0.1 ms: as much as a step of the other network
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": FP32, "bf16": BF16}
TOLERANCES = {FP32: 1e-4, BF16: 0.05}  # of states of about 1, after some steps of a network
PHASES = ("base", "residual", "clean", "windows", "cycle", "interleaved", "video")
LOOPS = [
    *((phase, "ddim", dtype) for phase in PHASES for dtype in DTYPES),
    *((phase, solver, "bf16") for phase in PHASES for solver in ("ddpm", "unipc")),
]


# -- a loop of one op ------------------------------------------------------------------------------


class StepLoop:
    """50 steps of residual_step around a stand-in network, on static buffers."""

    count = 50

    def __init__(self, device: str, backend: str) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (2, 16, 3, 64, 64)
        self.backend = backend
        self.noise = torch.randn(shape, generator=random).to(device)
        self.g = torch.randn(shape[0], *shape[2:], generator=random).to(device)
        self.lam = torch.linspace(0, 1, shape[1]).to(device)
        k = torch.arange(self.count) / self.count
        self.coeffs = torch.stack([0.9 + 0.1 * k, -0.1 * k, 0.05 * (1 - k)], 1).to(device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.u, self.r = torch.empty_like(self.noise), torch.empty_like(self.noise)

    def advance(self) -> None:
        torch.tanh(self.u, out=self.r)
        tables = (self.g, self.lam, self.coeffs, self.step)
        residual_step(self.u, self.r, *tables, seed=7, backend=self.backend)
        self.step.add_(1)

    def run(self, advance) -> Tensor:
        self.u.copy_(self.noise)
        self.step.zero_()
        for _ in range(self.count):
            advance()
        return self.u.clone()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_one_captured_step_is_all_of_them(backend, device):
    """Bit for bit; and the CPU's loop but for tanh, another function there, in 50 steps."""
    loop, on_cpu = StepLoop(device, backend), StepLoop("cpu", "cpu")
    plain = loop.run(loop.advance)
    loop.step.zero_()
    assert torch.equal(loop.run(in_a_graph(loop.advance, device)), plain)
    assert (plain.cpu() - on_cpu.run(on_cpu.advance)).abs().max() < 1e-3


# -- loops of vfengine/sampling -------------------------------------------------------------------


def load(name: str, folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """A network, on CUDA in its form for that."""
    network = load_network(folder, read_config(folder), name, device, dtype)
    if device != "cpu":
        network.unet = CudaUNet(network.unet, dtype)
    return network


def make_loop(phase, solver, dtype, device, folders) -> tuple[Loop, list[nn.Module]]:
    """Two clips of a tiny model, states in fp32; and its networks."""
    decomposed, video = folders
    table = solver_table(solver, read_config(decomposed).noise_schedule(), STEPS)
    noise = noise_of(0, device)
    labels = torch.tensor([0, 2], device=device)
    names = {"base": ["base"], "video": ["video"], "interleaved": ["base", "residual"]}
    networks = {
        name: load(name, video if name == "video" else decomposed, device, dtype)
        for name in names.get(phase, ["residual"])
    }
    models = [ModelSpec(network, labels).build(device) for network in networks.values()]
    with torch.inference_mode():
        if phase == "base":
            loop = BaseSpec.of(noise.base, table, NoisePlace(2)).build(*models)
        elif phase == "video":
            loop = ResidualSpec.of(noise.residual, table, NoisePlace(2)).build(*models)
        elif phase == "interleaved":
            more = {"base": LoopSpec.of(noise.base, table, NoisePlace(2)), "lam": 0.5}
            spec = InterleavedSpec.of(noise.residual, table, NoisePlace(3), **more)
            loop = InterleavedLoop(*models, spec)
        else:
            random = torch.Generator().manual_seed(1)
            states = torch.randn(STEPS + 1, 2, 3, 16, 16, generator=random).to(device)
            windows = (3, None) if phase == "windows" else None
            motion = Motion(0.5, windows, phase == "clean", phase == "cycle")
            path = PathSpec.of(states, shared=True)
            spec = ResidualSpec.of(noise.residual, table, NoisePlace(3), motion=motion, path=path)
            loop = spec.build(*models)
    return loop, list(networks.values())


def noise_of(seed: int, device: str):
    return decomposed_noise((2, 4, 3, 16, 16), seed, seed + 1, device=device)


def run(loop: Loop, seed: int, capture: bool, at_once: int | None = None) -> Tensor:
    """The loop's result from this noise; a base loop's whole path."""
    noise = noise_of(seed, loop.device)
    with torch.inference_mode():
        step = loop.stepper(capture, at_once)
        if loop.phase == "interleaved":
            loop.start(*noise)
        else:
            loop.start(noise.base if loop.phase == "base" else noise.residual)
        loop.run(step)
        result = loop.states if loop.phase == "base" else getattr(loop, "u", None)
        return (loop.z if result is None else result).clone()


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tiny_video_checkpoint):
    return tiny_checkpoint, tiny_video_checkpoint


@pytest.mark.parametrize(("phase", "solver", "dtype"), LOOPS)
def test_captured_loop_is_the_plain_one(phase, solver, dtype, device, folders):
    """With the noise of the capture, and with other noise."""
    dtype = DTYPES[dtype]
    loop, _ = make_loop(phase, solver, dtype, device, folders)
    for seed in (0, 8):
        plain = run(loop, seed, capture=False)
        assert plain.isfinite().all()
        assert_same(run(loop, seed, True), plain, TOLERANCES[dtype], f"{phase}, {solver}")
    assert not torch.equal(run(loop, 0, True), plain)


@pytest.mark.parametrize("at_once", [2, 3, 6])
@pytest.mark.parametrize("phase", ["base", "residual", "video"])
def test_several_steps_in_a_graph_are_the_plain_ones(phase, at_once, device, folders):
    loop, _ = make_loop(phase, "unipc", FP32, device, folders)
    for seed in (0, 8):
        plain = run(loop, seed, capture=False)
        told = f"{phase}, {at_once} steps a graph"
        assert_same(run(loop, seed, True, at_once), plain, TOLERANCES[FP32], told)


@pytest.mark.parametrize("phase", ["base", "windows", "video"])
def test_a_whole_and_a_shallow_graph_are_the_plain_steps(phase, device, folders):
    """What one graph keeps, the other reads: places that both were captured with."""
    loop, _ = make_loop(phase, "unipc", FP32, device, folders)
    loop.reuse_every, loop.kept = 4, Kept()
    for seed in (0, 8):
        plain = run(loop, seed, capture=False)
        told = f"{phase}, features reused, seed {seed}"
        assert_same(run(loop, seed, True), plain, TOLERANCES[FP32], told)


class Late:
    """A model whose steps take longer than those of the other phase."""

    def __init__(self, model: GuidedModel) -> None:
        self.model = model

    def in_loop(self, steps: Steps) -> LoopModel:
        self.model = in_loop(self.model, steps)
        return self

    def start(self) -> None:
        self.model.start()

    def __call__(self, z: Tensor, t: Tensor, *kept: Kept) -> Tensor:
        if z.is_cuda:
            torch.cuda._sleep(SLOW)
        return self.model(z, t, *kept)


@pytest.mark.parametrize("late", ["base", "residual"])
@pytest.mark.parametrize(
    ("steps", "every"),
    [(6, 1), (8, 1), (20, 1), (8, 3)],
    ids=["1 a graph", "2 a graph", "5 a graph", "features reused, on two streams"],
)
def test_both_phases_at_once_are_one_after_the_other(steps, every, late, device, tiny_checkpoint):
    """Whichever branch is the slower one; with other noise the same graphs are replayed."""
    table = solver_table("unipc", read_config(tiny_checkpoint).noise_schedule(), steps)
    labels = torch.tensor([0, 2], device=device)

    def model(name: str):
        made = ModelSpec(load(name, tiny_checkpoint, device, FP32), labels).build(device)
        return Late(made) if name == late else made

    noise = noise_of(0, device)
    with torch.inference_mode():
        how = {"reuse_every": every}
        base = BaseSpec.of(noise.base, table, NoisePlace(2), **how).build(model("base"))
        path = PathSpec.of(base.states, shared=True)
        how |= {"motion": Motion(0.5), "path": path}
        spec = ResidualSpec.of(noise.residual, table, NoisePlace(3), **how)
        residual = spec.build(model("residual"))
        for seed in (0, 8):
            noise = noise_of(seed, device)
            for loop, start in ((base, noise.base), (residual, noise.residual)):
                loop.start(start)
                loop.run(loop.stepper(capture=False))
            states, clip = base.states.clone(), residual.u.clone()
            for buffer in (base.states, residual.u):
                buffer.fill_(torch.nan)
            run_overlapped(base, residual, *noise, capture=True)
            told = f"late {late}, seed {seed}"
            assert_same(base.states, states, TOLERANCES[FP32], f"path, {told}")
            assert_same(residual.u, clip, TOLERANCES[FP32], f"clip, {told}")
    assert len(residual.beside) == (device != "cpu" and every == 1)


@pytest.mark.parametrize("phase", ["base", "residual"])
def test_dependent_launches_change_no_bits(phase, device, folders, monkeypatch):
    """A kernel that began before the one ahead of it had ended would read what is not yet there."""
    clips = {}
    for switch in ("off", "on"):
        monkeypatch.setenv("VFENGINE_PDL", switch)
        loop, _ = make_loop(phase, "unipc", BF16, device, folders)
        for seed in (0, 8):
            clips[switch, seed] = run(loop, seed, True, STEPS)
    for seed in (0, 8):
        assert_same(clips["on", seed], clips["off", seed], TOLERANCES[BF16], phase)


@pytest.mark.parametrize("phase", ["base", "residual", "video"])
def test_graph_reads_weights_where_they_lie(phase, device, folders):
    """The next replay reads new numbers in the same memory."""
    loop, (network,) = make_loop(phase, "ddim", FP32, device, folders)
    before = run(loop, 0, capture=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.75)
    after = run(loop, 0, capture=True)
    assert not torch.equal(after, before)
    assert_same(after, run(loop, 0, capture=False), TOLERANCES[FP32], phase)


def test_float64_cannot_be_captured(device, folders):
    if device == "cpu":
        return  # nothing is captured there
    noise = torch.randn(1, 3, 8, 8, device=device, dtype=torch.float64)
    table = solver_table("ddim", read_config(folders[0]).noise_schedule(), 2)
    loop = BaseSpec.of(noise, table, NoisePlace(0)).build(lambda z, t: z)
    with pytest.raises(RuntimeError, match="float64 clips cannot be captured"):
        loop.stepper(capture=True)


def test_step_that_waits_cannot_be_captured_and_leaves_cuda_usable(device, folders, alone):
    """It is refused in one sentence; afterwards plain and captured runs work as before."""
    loop, _ = make_loop("base", "ddim", FP32, device, folders)
    plain, model = run(loop, 0, capture=False), loop.model

    def waits(z, t):
        return model(z, t) * float(z.isfinite().all())

    if device != "cpu":
        loop.model = waits
        with pytest.raises(RuntimeError, match=r"cannot be captured.*capture=False"):
            run(loop, 0, capture=True)
        loop.model = model
    assert torch.equal(run(loop, 0, capture=False), plain)
    assert_same(run(loop, 0, capture=True), plain, TOLERANCES[FP32], "after a failed capture")


# -- pipelines -------------------------------------------------------------------------------------


@pytest.fixture
def captures(monkeypatch) -> Counter:
    """Counts the graphs that are captured, under "graphs"."""
    count, graph = Counter(), torch.cuda.graph

    def counted(*arguments, **options):
        count["graphs"] += 1
        return graph(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", counted)
    return count


def pipeline(device: str, dtype: torch.dtype, capture: bool, folder=None) -> VideoFusionPipeline:
    return VideoFusionPipeline.from_pretrained(folder, device=device, dtype=dtype, capture=capture)


def sample(pipe: VideoFusionPipeline, seed: int, label: str = "cartwheel", **settings) -> Tensor:
    """A clip by stepwise paths, pixels in 0..1."""
    steps = 10 if pipe.device.type == "cuda" else 3
    settings = {"num_inference_steps": steps, "offload_base": False, **settings}
    clip = pipe(label, base_seed=seed, base_path="stepwise", output_type="pt", **settings).frames
    assert clip.isfinite().all()
    return clip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_whole_clips_are_the_same_in_all_forms(dtype, device, captures):
    """The shipped model's clip: plain, captured, overlapped, both; a second seed replays."""
    plain = pipeline(device, dtype, capture=False)
    expected = {seed: sample(plain, seed) for seed in (3, 0)}
    assert captures["graphs"] == 0
    assert not torch.equal(expected[3], expected[0])
    forms = {"overlapped": (plain, True)}
    captured = pipeline(device, dtype, capture=True)
    forms |= {"captured": (captured, False), "captured, overlapped": (captured, True)}
    for form, (pipe, overlap) in forms.items():
        for seed, clip in expected.items():
            before = captures["graphs"]
            out = sample(pipe, seed, overlap_phases=overlap)
            assert_same(out, clip, TOLERANCES[dtype], f"{form}, seed {seed}")
            made = captures["graphs"] - before
            assert seed == 3 or made == 0, f"{form}: the second seed captured {made} graphs"
    assert captures["graphs"] >= 2 or device == "cpu"


@pytest.mark.parametrize("tf32", [False, True])
def test_graphs_go_with_the_precision_they_were_captured_in(tf32, device):
    """A switch that chooses other products, and with them convolutions, is seen at once."""
    forms = {capture: pipeline(device, FP32, capture) for capture in (False, True)}
    clips = {}
    for allowed in (tf32, not tf32):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        for capture, pipe in forms.items():
            clips[allowed, capture] = sample(pipe, 0)
    apart = (clips[True, False] - clips[False, False]).abs().max().item()
    assert apart > 0 or device == "cpu", "TF32 makes no difference here"
    for allowed in (False, True):
        out, expected = clips[allowed, True], clips[allowed, False]
        assert_same(out, expected, apart / 4, f"allow_tf32={allowed}")


def test_other_graphs_beside_a_pipeline_s(device, alone):
    """A pipeline captures in inference mode, and keeps its graphs; others may not be in it."""
    pipe = pipeline(device, BF16, capture=True)
    clip = sample(pipe, 0)
    loop = StepLoop(device, "triton" if device == "cuda" else "cpu")
    plain = loop.run(loop.advance)
    loop.step.zero_()
    assert torch.equal(loop.run(in_a_graph(loop.advance, device)), plain)
    assert torch.equal(sample(pipe, 0), clip)


def test_new_weights_are_never_sampled_with_an_old_graph(device, tiny_checkpoint):
    """A parameter that is replaced, at another address, after a graph was captured."""
    clips = {}
    for capture in (False, True):
        pipe = pipeline(device, FP32, capture, tiny_checkpoint)
        first = sample(pipe, 0, "walk")
        unet = networks_of(pipe)["residual"].unet
        layer = getattr(unet, "unet", unet).time_embedding[-1]  # planned, on a CPU
        layer.bias = nn.Parameter(layer.bias + 0.5, requires_grad=False)
        clips[capture] = sample(pipe, 0, "walk")
        assert not torch.equal(clips[capture], first)
    assert_same(clips[True], clips[False], TOLERANCES[FP32], "new weights")


def test_plain_video_model_is_captured(device, tiny_video_checkpoint):
    clips = [
        pipeline(device, BF16, capture, tiny_video_checkpoint)(
            "walk", num_inference_steps=STEPS, output_type="pt"
        ).frames
        for capture in (False, True)
    ]
    assert clips[0].isfinite().all()
    assert_same(clips[1], clips[0], TOLERANCES[BF16], "VDM*")


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
def test_two_threads_sample_at_once(overlap, device, alone):
    """Each with a pipeline of its own: both capture at the same moment, then replay."""
    labels, seeds = ("cartwheel", "jump"), range(3)
    settings = {"num_inference_steps": 4, "overlap_phases": overlap}
    expected = {}
    for label in labels:
        pipe = pipeline(device, BF16, capture=True)
        expected[label] = [sample(pipe, seed, label, **settings) for seed in seeds]

    def work(label: str) -> list[Tensor]:
        pipe = pipeline(device, BF16, capture=True)
        start.wait()
        return [sample(pipe, seed, label, **settings) for seed in seeds]

    for _ in range(2):
        start = Barrier(len(labels), timeout=60)
        with ThreadPoolExecutor(len(labels)) as pool:
            clips = dict(zip(labels, pool.map(work, labels), strict=True))
        for label in labels:
            for out, clip in zip(clips[label], expected[label], strict=True):
                assert_same(out, clip, TOLERANCES[BF16], f"{label}, beside another thread")
