"""The audit of tests/tools/fake_cuda.py finds what a CUDA graph cannot replay, and nothing else."""

from collections.abc import Callable

import fake_cuda
import pytest
import torch
from fake_cuda import audit, ops_within
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine import ops


@pytest.fixture(scope="module", autouse=True)
def cuda_guard(tmp_path_factory):
    # A guard is global to the process, so it goes out again with this file's tests. Meanwhile only
    # ops on CUDA tensors ask for it; torch.cuda asks the CUDA runtime (test_torch_sees_no_gpu).
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@pytest.fixture
def buffers() -> dict[str, torch.Tensor]:
    """z: [2, 4, 8, 8], table: [50], step: [1] and count: [], both integers; fake, on cuda."""
    with FakeTensorMode():
        return {
            "z": torch.empty(2, 4, 8, 8, device="cuda"),
            "table": torch.empty(50, device="cuda"),
            "step": torch.zeros(1, dtype=torch.int32, device="cuda"),
            "count": torch.zeros((), dtype=torch.int64, device="cuda"),
        }


def test_clean_step_passes(buffers):
    z, table, step = buffers["z"], buffers["table"], buffers["step"]

    def advance():
        scale = table.index_select(0, step).view(1, 1, 1, 1)
        z.copy_(scale * z + table[step.long()])
        z[:, 1:].add_(z[:, :1].expand(2, 3, 8, 8), alpha=0.5)
        step.add_(1)

    report = audit(advance, buffers)
    assert report.clean, report
    assert report.ops[0] == report.ops[1]
    assert report.ops[0][-1] == "aten.add_.Tensor"
    assert report.allocated == [
        "aten.index_select.default",
        "aten.mul.Tensor",
        "aten._to_copy.default",
        "aten.index.Tensor",
        "aten.add.Tensor",
    ]


WAITS = "waits for the device"
COPIES = "copies between host and device"
HOST_VALUES = "makes a tensor from values of the host"
BAD_STEPS: dict[str, tuple[Callable, str]] = {
    "item": (lambda b: b["step"].item(), WAITS),
    "tolist": (lambda b: b["table"].tolist(), WAITS),
    "if": (lambda b: 1 if b["count"] > 0 else 0, WAITS),
    "indexed by a 0-dim tensor": (lambda b: b["table"][b["count"]], WAITS),
    "nonzero": (lambda b: b["z"].nonzero(), WAITS),
    "mask": (lambda b: b["z"][b["z"] > 0], WAITS),
    "masked store": (lambda b: b["z"].__setitem__(b["z"] > 0, b["table"][0]), WAITS),
    "cpu": (lambda b: b["z"].cpu(), COPIES),
    "copy_": (lambda b: b["z"].copy_(torch.zeros(2, 4, 8, 8)), COPIES),
    "to cuda": (lambda b: torch.tensor([1.0, 2.0]).to("cuda"), COPIES),
    "tensor on cuda": (lambda b: torch.tensor(3.0, device="cuda"), HOST_VALUES),
    "0-dim CPU tensor": (lambda b: b["z"].mul_(torch.ones(())), "0-dim CPU tensor"),
    "CPU indices": (lambda b: b["table"][torch.arange(3)], "CPU tensor among CUDA tensors"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_step_is_reported(name, buffers):
    step, problem = BAD_STEPS[name]
    report = audit(lambda: step(buffers), buffers)
    assert any(problem in found for found in report.problems), report
    assert not report.clean


def test_rebound_buffer_is_reported(buffers):
    def rebind():
        buffers["z"] = buffers["z"] * 2

    report = audit(rebind, buffers)
    assert report.moved == ["z"]
    assert report.allocated == ["aten.mul.Tensor"]
    assert not report.problems
    assert not report.clean


def test_what_changes_from_call_to_call_is_reported(buffers):
    calls = []

    def counts_on_the_host():
        calls.append("")
        buffers["z"].mul_(0.5 * len(calls))

    assert audit(counts_on_the_host, buffers).problems == [
        "aten.mul_.Tensor: a graph would keep [0.5], a later call has [1.0]"
    ]

    def branches_on_the_host():
        calls.append("")
        buffers["z"].zero_() if len(calls) % 2 else buffers["z"].neg_()

    assert audit(branches_on_the_host, buffers).problems == [
        "a later call runs other ops than the first"
    ]


def test_rejects_buffers_that_are_not_fake():
    with pytest.raises(ValueError, match="fake tensors of one FakeTensorMode"):
        audit(lambda: None, {"z": torch.zeros(1)})


# -- the ops of the project ------------------------------------------------------------------------


def op_and_buffers(op: str, device: str):
    """A call that advances one step, and the tensors that live across calls."""
    batch, frames, *image = shape = (2, 4, 3, 8, 8)
    clip, still = torch.ones(shape, device=device), torch.ones(batch, *image, device=device)
    lam = torch.full((frames,), 0.5, device=device)
    step = torch.zeros(1, dtype=torch.int32, device=device)
    shared = {"lam": lam, "step": step}
    if op == "remove_base":
        levels = torch.zeros(10, device=device)
        buffers = {**shared, "z": clip, "b": still, "noise_levels": levels, "out": clip.clone()}
        return lambda: ops.remove_base(**buffers), buffers
    shared |= {"r": clip.clone(), "coeffs": torch.zeros(10, 3, device=device)}
    if op == "decomposed_step":
        buffers = {**shared, "z": clip, "b": still}
        seeds = {"base_seed": 1, "residual_seed": 2**63}
        return lambda: ops.decomposed_step(**buffers, **seeds), buffers
    if op == "residual_step":
        buffers = {**shared, "r_uncond": clip.clone(), "u": clip, "g": still}
        return lambda: ops.residual_step(**buffers, guidance_scale=2.0, seed=2**63), buffers
    buffers = {"out": clip, "step": step}
    return lambda: ops.decomposed_noise(clip, residual_seed=2), buffers


def loop_op_and_buffers(op: str):
    """A call that takes a step of a sampling loop on fake CUDA, and its tensors."""
    batch, frames, *image = shape = (2, 4, 3, 8, 8)
    clip, still = (torch.ones(size, device="cuda") for size in (shape, (batch, *image)))
    number = torch.zeros(1, dtype=torch.int32, device="cuda")
    long = torch.zeros(10, dtype=torch.int64, device="cuda")
    clock = ops.Clock(number, number.clone(), long, long[:batch].clone())
    buffers = {"states": torch.ones(11, batch, *image, device="cuda"), **clock._asdict()}
    buffers["coeffs"] = coeffs = torch.zeros(10, 3, device="cuda")
    states = buffers["states"]
    if op == "path_step":
        lam, c1 = torch.ones(frames, device="cuda"), coeffs[:, 0].double()
        buffers |= {"u": clip, "r": clip.clone(), "lam": lam, "c1": c1}
        tables = buffers["r"], lam, coeffs, clock
        path = {"states": states, "c1": c1, "base_frame": 2}
        return lambda: ops.path_step(clip, *tables, **path, seed=2**63), buffers
    buffers |= {"z": still, "b": still.clone(), "levels": coeffs[:, 0].contiguous()}
    tables = states, buffers["levels"], coeffs, clock
    return lambda: ops.base_step(still, buffers["b"], *tables, seed=2**63), buffers


def network_op_and_buffers(op: str, device: str):
    """A call of an op that networks use, and the tensors that live across calls."""
    step = torch.zeros(1, dtype=torch.int32, device=device)
    shape = {
        "group_norm_silu": (2, 8, 4, 4),
        "layer_norm": (2, 4, 16),
        "geglu": (2, 4, 32),
        "temporal_attention": (1, 4, 6, 48),
        "spatial_attention": (2, 6, 16),
    }[op]
    x = torch.ones(shape, device=device)
    buffers = {"x": x, "step": step, "table": torch.ones(16, device=device)}
    if op == "group_norm_silu":
        x = buffers["x"] = x.contiguous(memory_format=torch.channels_last)
        rest = {"scale": torch.ones(2, 8, device=device), "shift": torch.ones(2, 8, device=device)}
        rest["out"] = torch.empty_like(x)
        buffers |= rest
        return lambda: ops.group_norm_silu(x, 2, num_frames=2, **rest), buffers
    if op == "layer_norm":
        out = buffers["out"] = torch.empty_like(x)
        table = buffers["table"]
        return lambda: ops.layer_norm(x, table, table, out=out), buffers
    if op == "geglu":
        out = buffers["out"] = x.new_empty(2, 4, 16)
        return lambda: ops.geglu(x, out=out), buffers
    if op == "temporal_attention":
        out = buffers["out"] = x.new_empty(1, 4, 6, 16)
        bias = buffers["bias"] = x.new_ones(2, 4, 4)
        return lambda: ops.temporal_attention(x, 2, bias, out=out), buffers
    out = buffers["out"] = torch.empty_like(x)
    return lambda: ops.spatial_attention(x, x, x, 2, out=out), buffers


OPS = {  # the op that a call dispatches, in place where it can be
    "residual_step": "vfengine.residual_step_.default",
    "decomposed_step": "vfengine.decomposed_step_.default",
    "remove_base": "vfengine.remove_base.default",
    "decomposed_noise": "vfengine.decomposed_noise.default",
}


@pytest.mark.parametrize("op", OPS)
def test_op_can_be_captured(op):
    """Neither synchronisation nor host copy nor new memory; the second call finds its buffers."""
    with FakeTensorMode():
        call, buffers = op_and_buffers(op, "cuda")

    def advance():
        call()
        buffers["step"].add_(1)

    report = audit(advance, buffers)
    assert report.clean, report
    assert report.ops[0] == [OPS[op], "aten.add_.Tensor"]
    assert not report.allocated


@pytest.mark.parametrize("op", ["path_step", "base_step"])
def test_step_of_a_loop_is_one_launch(op):
    """It reads its rows and counts by itself, in the memory that it is given."""
    with FakeTensorMode():
        call, buffers = loop_op_and_buffers(op)
    report = audit(call, buffers)
    assert report.clean, report
    assert report.ops[0] == [f"vfengine.{op}.default"]
    assert not report.allocated


NETWORK_OPS = {  # the op, and what its call allocates on CUDA where `out` is given
    "group_norm_silu": ["aten.empty.memory_format"],  # the workspace of its statistics
    "layer_norm": [],
    "geglu": [],
    "temporal_attention": [],
    "spatial_attention": [],
}


@pytest.mark.parametrize("op", NETWORK_OPS)
def test_op_of_networks_can_be_captured(op):
    with FakeTensorMode():
        call, buffers = network_op_and_buffers(op, "cuda")

    def advance():
        call()
        buffers["step"].add_(1)

    report = audit(advance, buffers)
    assert report.clean, report
    made = NETWORK_OPS[op]
    assert report.ops[0] == [*made, f"vfengine.{op}.default", "aten.add_.Tensor"]
    assert report.allocated == made


def generator_op_and_buffers(op: str):
    """The same of an op around a network's layers, guided, for clips in patches of 2."""
    z = torch.ones(1, 3, 3, 4, 4, device="cuda")
    step = torch.zeros(1, dtype=torch.int32, device="cuda")
    buffers = {"z": z, "coeffs": torch.ones(5, 3, 5, device="cuda"), "step": step}
    if op == "model_input":
        buffers["out"] = torch.ones(6, 2, 2, 32, dtype=torch.bfloat16, device="cuda")
        return lambda: ops.model_input(**buffers, conditioned=True), buffers
    buffers |= {"rows": torch.ones(6, 2, 2, 24, device="cuda"), "out": torch.empty_like(z)}
    return lambda: ops.noise_estimate(**buffers, guidance_scale=2.0), buffers


@pytest.mark.parametrize("op", ["model_input", "noise_estimate"])
def test_op_of_generators_can_be_captured(op):
    with FakeTensorMode():
        call, buffers = generator_op_and_buffers(op)

    def advance():
        call()
        buffers["step"].add_(1)

    report = audit(advance, buffers)
    assert report.clean, report
    assert report.ops[0] == [f"vfengine.{op}.default", "aten.add_.Tensor"]
    assert not report.allocated


@pytest.mark.parametrize("op", NETWORK_OPS)
def test_op_of_networks_runs_no_op_of_torch(op):
    call, _ = network_op_and_buffers(op, "cpu")
    assert ops_within(call) == [f"vfengine.{op}.default"]


@pytest.mark.parametrize("op", OPS)
def test_op_runs_no_op_of_torch(op):
    """So nothing inside can wait, copy or allocate either."""
    call, _ = op_and_buffers(op, "cpu")
    assert ops_within(call) == [OPS[op]]


def test_ops_within_looks_inside():
    out = torch.empty(1, 1, 2, 2)
    inside = ops_within(lambda: ops.decomposed_noise(out, 0, backend="reference"))
    assert "aten.sqrt.default" in inside


def test_torch_sees_no_gpu():
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
    if not torch.backends.cuda.is_built():
        assert not torch.cuda.is_available()
        with pytest.raises(AssertionError, match="not compiled with CUDA"):
            torch.empty(1, device="cuda")
