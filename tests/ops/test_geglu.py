"""geglu against its reference: vfengine/ops/geglu.py, csrc/cpu, kernels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    misaligned,
    placed,
)

from vfengine.ops import geglu, geglu_reference

SHAPES = {
    "model": (2, 16, 64, 256),
    "odd": (5, 77, 40),
    "no_vectors": (7, 22),
    "tiny": (2,),
    "single_row": (1, 640),
    "wide": (3, 5200),
}
SMALL = {name: SHAPES[name] for name in ("odd", "no_vectors", "tiny", "single_row", "wide")}
GPU = {"model": SHAPES["model"], "odd": SHAPES["odd"]}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU}

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape=SHAPES["odd"], dtype=torch.float32, device="cpu"):
    """Keyword arguments of a call; some gates are far out, where gelu is 0 or the identity."""
    random = torch.Generator().manual_seed(sum(shape))
    return {"x": (3 * torch.randn(shape, generator=random)).to(device, dtype)}


def in_own_dtype(x):
    """The formula in plain PyTorch: every operation rounds to the dtype of x."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def assert_matches(case, backend, place=as_it_is):
    x = case["x"]
    out = place(torch.empty_like(x[..., : x.shape[-1] // 2].contiguous()))
    assert geglu(**case, out=out, backend=backend) is out
    assert_as_close_as_pytorch(out, geglu_reference(x.double()), in_own_dtype(x))


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), dtypes))
    for shape, dtype in cases:
        assert_matches(placed(make_case(shape, dtype, device), place), backend, place)
    return len(cases)


@all_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_geglu_matches_reference(dtype, shape, place):
    assert_matches(placed(make_case(shape, dtype), place), "cpu", place)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gates_beyond_every_slope(dtype, backend):
    """gelu(-30) is 0, gelu(30) is 30; infinity stays, and NaN."""
    gate = torch.tensor([-30.0, 30.0, float("inf"), float("nan")], dtype=dtype)
    out = geglu(torch.cat([torch.ones_like(gate), gate]), backend=backend)
    expected = torch.tensor([0.0, 30.0, float("inf"), float("nan")], dtype=dtype)
    torch.testing.assert_close(out, expected, equal_nan=True)


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    assert torch.equal(geglu(**case, backend="reference"), geglu_reference(**case).to(dtype))


def test_geglu_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    x = make_case(device=device)["x"]
    arguments = (x, backend, torch.empty(5, 77, 20, device=device))
    torch.library.opcheck(torch.ops.vfengine.geglu.default, arguments)


def test_rejects_other_dtype_shape_strides_and_device():
    x = make_case()["x"]
    out = torch.empty(5, 77, 20)
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"x": 1.0}, TypeError, "x must be a tensor"),
        ({"out": out.half()}, TypeError, "out must be torch.float32"),
        ({"x": x[..., :39]}, ValueError, r"x must be \[..., 2K\]"),
        ({"x": x[:0]}, ValueError, "not empty"),
        ({"x": x.transpose(0, 1)}, ValueError, "x must be contiguous"),
        ({"out": out[:1]}, ValueError, r"out must be \[5, 77, 20\]"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"out": x.view(-1)[: out.numel()].view(out.shape)}, ValueError, "out shares memory"),
        ({"x": x.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
    ):
        with pytest.raises(error, match=words):
            geglu(**{"x": x, **change})
