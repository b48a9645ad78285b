"""Every op on every backend of a GPU: as its reference; what a step is made of, the CPU's bits."""

import importlib
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from kernel_cases import (
    LOOP_OPS,
    OPS,
    SETS,
    SHAPES,
    as_it_is,
    assert_same_bits,
    misaligned,
    on_cpu,
)
from torch import Tensor

from vfengine import ops
from vfengine.ops import _tuning

from .graphs import in_a_graph, late_side_stream

CUDA = [op for op, kernels in OPS.items() if "cuda" in kernels]
ALL = [(op, name) for op, kernels in OPS.items() for name in ("cuda", "triton") if name in kernels]
BF16 = torch.bfloat16
# Triton builds each combination anew: shapes of SETS["gpu"], dtypes, place in memory.
TRITON = {
    "model": ("model", (torch.float32, BF16), as_it_is),
    "odd": ("odd", (torch.float32,), as_it_is),
    "misaligned": ("odd", (BF16,), misaligned),
}
LARGE = {  # beyond a GPU's caches
    "residual_step": ((2, 16, 3, 512, 512), BF16),
    "decomposed_noise": ((2, 16, 3, 512, 512), BF16),
    "group_norm_silu": (((64, 128, 64, 64), 8, 16), BF16),
    "temporal_attention": ((1, 16, 4096, 2, 32), BF16),
}
SOURCES = {  # an argument of each op that its result depends on
    "residual_step": "u",
    "decomposed_step": "z",
    "remove_base": "z",
    "temporal_attention": "qkv",
    "spatial_attention": "q",
    "model_input": "z",
    "noise_estimate": "z",
    "temporal_attention_backward": "qkv",
}

every_backend = pytest.mark.parametrize(
    ("op", "backend"), ALL, ids=["-".join(pair) for pair in ALL]
)


def tests_of(op: str):
    """tests/ops/test_<op>.py, which has the op's cases."""
    return importlib.import_module(f"test_{op}")


def shapes_of(op: str, name: str) -> dict:
    return getattr(tests_of(op), "SETS", SETS)[name]


@dataclass
class Call:
    """A call of an op: `run()` writes `out`, from `source` among others; noise comes from none."""

    run: partial
    source: Tensor | None
    out: Tensor


def make_call(op: str, backend: str, device: str) -> Call:
    """In fp32, on the odd shape."""
    tests, function, shape = tests_of(op), getattr(ops, op), shapes_of(op, "gpu")["odd"]
    if op == "decomposed_noise":
        shape, options = tests.make_case(shape, "residual")
        out = torch.zeros(shape, device=device)
        return Call(partial(function, out, **options, backend=backend), None, out)
    case = tests.make_case(shape, device=device)
    source = case[SOURCES.get(op, "x")]
    made = source if op.endswith(("_step", "base")) else function(**case)
    out = torch.empty_like(made[0] if isinstance(made, tuple) else made)  # gradients of tables last
    return Call(partial(function, **{**case, "out": out}, backend=backend), source, out)


@pytest.mark.parametrize("op", CUDA)
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_cuda_kernels(op, place, device):
    """All shapes and dtypes: these are built already. (A CPU does with less of its own kernels.)"""
    shapes = shapes_of(op, "all" if device == "cuda" else "small")
    tests_of(op).run_cases("cuda", shapes, device, place)


@pytest.mark.parametrize("run", TRITON)
@pytest.mark.parametrize("op", OPS)
def test_triton_kernels(op, run, device):
    name, dtypes, place = TRITON[run]
    shapes = {name: shapes_of(op, "gpu")[name]}
    tests_of(op).run_cases("triton", shapes, device, place, dtypes)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", LOOP_OPS)
def test_steps_of_a_loop(op, backend, device):
    """The very bits of the ops that they are made of on a CPU, and the clock moved on."""
    tests = tests_of(op)
    if backend == "cuda":
        for place in (as_it_is, misaligned):
            tests.run_steps(backend, SHAPES, device, place)
    else:
        tests.run_steps(backend, SETS["gpu"], device, as_it_is, (torch.float32,))
    if device == "cuda":
        tests.run_cases(backend, {}, device, as_it_is)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", LARGE)
def test_large_sizes(op, backend, device):
    tests, (shape, dtype) = tests_of(op), LARGE[op]
    if device == "cpu":
        shape = shapes_of(op, "gpu")["odd"]
    if op == "decomposed_noise":
        tests.assert_matches(shape, dtype, "residual", backend, device)
        return
    case = tests.make_case(shape, dtype, device=device)
    out = tests.assert_matches(case, backend)
    if op == "residual_step":
        assert_same_bits(ops.residual_step(**on_cpu(case), backend="cpu"), out.cpu())


def test_every_tile_and_form_of_implicit_gemm(device, monkeypatch):
    tests = tests_of("implicit_gemm")
    tests.run_cases("triton", tests.SETS["forms"], device, as_it_is, (BF16,))
    tests.run_tiles(device, monkeypatch, BF16)


def test_measured_choices_of_implicit_gemm_are_right(device, monkeypatch):
    """The fastest of all tiles and torch's own product, which is tested by itself as well."""
    if device == "cpu":
        return  # there is nothing to measure
    monkeypatch.setenv("VFENGINE_TUNING", "process")
    tests = tests_of("implicit_gemm")
    tests.run_torch(device, (BF16,))
    before = _tuning.measured().keys()
    tests.run_cases("auto", {"model": tests.SHAPES["model"]}, device, as_it_is, (BF16,))
    (key,) = _tuning.measured().keys() - before
    assert "torch" in _tuning.measured()[key]


@pytest.mark.parametrize("op", OPS)
def test_registers(op, device):
    runs = device == "cuda" or "cpu" in OPS[op]
    tests_of(op).check_registration(device, *([] if runs else ["reference"]))


@every_backend
def test_runs_on_the_current_stream(op, backend, device):
    """Behind what the stream has yet to do: another would read zeros, or be overwritten."""
    call = make_call(op, backend, device)
    call.run()
    expected, read = call.out.clone(), call.source if call.source is not None else call.out
    value = read.clone() if read is call.source else torch.zeros_like(read)
    read.zero_()
    call.out.zero_()
    with late_side_stream(device):
        read.copy_(value)
        call.run()
    assert torch.equal(call.out, expected)


@every_backend
def test_replays_from_a_graph(op, backend, device):
    call = make_call(op, backend, device)
    replay = in_a_graph(call.run, device)
    results = []
    for _ in range(2):
        call.run()
        results.append(call.out.clone())
        call.out.zero_()
        replay()
        assert torch.equal(call.out, results[-1])
        if call.source is not None:
            call.source.mul_(0.5)
    assert torch.equal(*results) == (call.source is None)


def test_a_step_outside_the_table_is_nan_in_a_graph(device):
    """The counter is read at every replay, and so is what the kernel refuses."""
    if device == "cpu":
        return  # there it raises
    tests = tests_of("residual_step")
    case = tests.make_case(SHAPES["odd"], device=device)
    out = torch.zeros_like(case["u"])
    replay = in_a_graph(partial(ops.residual_step, **case, out=out), device)
    for step, refused in ((2, False), (3, True), (1, False), (-1, True)):
        case["step"].fill_(step)
        replay()
        assert bool(out.isnan().all()) is refused, step
        assert bool(out.isnan().any()) is refused, step
