"""layer_norm against its reference: vfengine/ops/layer_norm.py, csrc/cpu, kernels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    doubled,
    misaligned,
    placed,
)

from vfengine.ops import layer_norm, layer_norm_reference
from vfengine.ops._dispatch import choose_backend

SHAPES = {
    "model": (2, 16, 64, 64),
    "odd": (5, 77, 20),
    "no_vectors": (7, 11),
    "tiny": (1,),
    "single_row": (1, 320),
    "wide": (3, 2600),
}
SMALL = {name: SHAPES[name] for name in ("odd", "no_vectors", "tiny", "single_row", "wide")}
GPU = {"model": SHAPES["model"], "odd": SHAPES["odd"]}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU}

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape=SHAPES["odd"], dtype=torch.float32, affine=True, device="cpu", mean=0.5):
    """Keyword arguments of a call."""
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=random) + mean
    case = {"x": x.to(device, dtype)}
    if affine:
        table = torch.randn(2, shape[-1], generator=random).to(device)
        case |= {"weight": table[0].clone(), "bias": table[1].clone()}
    return case


def in_own_dtype(x, weight=None, bias=None):
    """PyTorch's own, in the dtype of x."""
    cast = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
    return F.layer_norm(x, x.shape[-1:], cast(weight), cast(bias))


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["x"]))
    assert layer_norm(**case, out=out, backend=backend) is out
    assert_as_close_as_pytorch(out, layer_norm_reference(**doubled(case)), in_own_dtype(**case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend."""
    count = 0
    for shape, dtype, affine in itertools.product(shapes.values(), dtypes, (True, False)):
        assert_matches(placed(make_case(shape, dtype, affine, device), place), backend, place)
        count += 1
    for dtype in dtypes:
        assert_matches(make_case(SHAPES["odd"], dtype, False, device, mean=1e3), backend)
    return count


@all_dtypes
@all_shapes
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_layer_norm_matches_reference(dtype, shape, affine, place):
    assert_matches(placed(make_case(shape, dtype, affine), place), "cpu", place)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mean_far_from_zero_leaves_the_variance_alone(dtype, backend):
    assert_matches(make_case(SHAPES["model"], dtype, affine=False, mean=1e3), backend)


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    out = layer_norm(**case, backend="reference")
    assert torch.equal(out, layer_norm_reference(**case).to(dtype))


def test_takes_triton_on_cuda_where_there_is_no_cuda_kernel():
    device = torch.device("cuda")
    assert choose_backend("layer_norm", "auto", device, ("triton", "cpu")) == "triton"


def test_layer_norm_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    arguments = (*case.values(), 1e-5, backend, torch.empty_like(case["x"]))
    torch.library.opcheck(torch.ops.vfengine.layer_norm.default, arguments)


def test_rejects_other_dtype_shape_strides_and_device():
    case = make_case()
    x, weight = case["x"], case["weight"]
    out = torch.empty_like(x)
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"out": out.half()}, TypeError, "out must be torch.float32"),
        ({"weight": weight.half()}, TypeError, "weight must be torch.float32"),
        ({"x": x[:0]}, ValueError, "not empty"),
        ({"x": x.transpose(0, 1)}, ValueError, "x must be contiguous"),
        ({"out": out[:1]}, ValueError, r"out must be \[5, 77, 20\]"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"bias": weight[1:]}, ValueError, r"bias must be \[20\]"),
        ({"out": x}, ValueError, "out shares memory with x"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"weight": weight.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
    ):
        with pytest.raises(error, match=words):
            layer_norm(**{**case, **change})
