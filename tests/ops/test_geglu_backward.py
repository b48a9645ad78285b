"""geglu_backward against its reference, and geglu differentiated by autograd."""

import itertools

import pytest
import torch
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    doubled,
    misaligned,
    placed,
)
from test_geglu import SETS, SHAPES, all_shapes
from test_geglu import in_own_dtype as geglu_in_own_dtype
from test_geglu import make_case as forward_case
from test_layer_norm_backward import (
    assert_checkpoints,
    assert_differentiates,
    assert_not_twice,
    assert_same_on_any_number_of_threads,
)

from vfengine.ops import (
    differentiable_geglu,
    geglu_backward,
    geglu_backward_reference,
    geglu_reference,
)

__all__ = ["SETS"]  # of shapes, for kernel_cases


def make_case(shape=SHAPES["odd"], dtype=torch.float32, device="cpu"):
    """Keyword arguments of a call."""
    x = forward_case(shape, dtype, device)["x"]
    random = torch.Generator().manual_seed(sum(shape) + 1)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=random).to(device, dtype)
    return {"grad": grad, "x": x}


def in_own_dtype(grad, x):
    """PyTorch's own derivative: every operation rounds to the dtype of x."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(geglu_in_own_dtype(x), x, grad)[0]


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["x"]))
    assert geglu_backward(**case, out=out, backend=backend) is out
    exact = geglu_backward_reference(**doubled(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), dtypes))
    for shape, dtype in cases:
        assert_matches(placed(make_case(shape, dtype, device), place), backend, place)
    return len(cases)


@all_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_geglu_backward_matches_reference(dtype, shape, place):
    assert_matches(placed(make_case(shape, dtype), place), "cpu", place)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_formula_is_the_derivative_of_geglu(shape):
    """The reference beside autograd of the forward reference, both in fp64."""
    grad, x = doubled(make_case(shape)).values()
    right = torch.autograd.grad(geglu_reference(x.requires_grad_()), x, grad)[0]
    torch.testing.assert_close(geglu_backward_reference(grad, x), right)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_slopes_of_gates_far_out(dtype, backend):
    """gelu' is 0 at -30 and 1 at 30; NaN stays."""
    gate = torch.tensor([-30.0, 30.0, float("nan")], dtype=dtype)
    ones = torch.ones_like(gate)
    out = geglu_backward(ones, torch.cat([ones, gate]), backend=backend)
    nan = float("nan")
    expected = torch.tensor([0.0, 30.0, nan, 0.0, 1.0, nan], dtype=dtype)
    torch.testing.assert_close(out, expected, equal_nan=True)


@all_dtypes
def test_gradients_of_geglu_on_any_number_of_threads(dtype):
    case = make_case(SHAPES["model"], dtype)
    assert_same_on_any_number_of_threads(lambda: (geglu_backward(**case),))


@all_dtypes
def test_geglu_differentiates(dtype):
    inputs = forward_case(dtype=dtype)
    assert_differentiates(differentiable_geglu, geglu_reference, inputs, ("x",), dtype)


def test_geglu_is_checkpointed_and_differentiated_once():
    x, linear = forward_case()["x"], torch.nn.Linear(40, 40)
    assert_checkpoints(lambda x: differentiable_geglu(linear(x)), x)
    assert_not_twice(differentiable_geglu, x)


@all_dtypes
def test_reference_backend_of_geglu_backward(dtype):
    case = make_case(dtype=dtype)
    out = geglu_backward(**case, backend="reference")
    assert torch.equal(out, geglu_backward_reference(**case).to(dtype))


def test_geglu_backward_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    arguments = (*case.values(), backend, torch.empty_like(case["x"]))
    torch.library.opcheck(torch.ops.vfengine.geglu_backward.default, arguments)


def test_geglu_backward_rejects_what_kernels_cannot_take():
    case = make_case()
    grad, x = case.values()
    out = torch.empty_like(x)
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"grad": 1.0}, TypeError, "grad must be a tensor"),
        ({"grad": grad.half()}, TypeError, "grad must be torch.float32"),
        ({"out": out.half()}, TypeError, "out must be torch.float32"),
        ({"x": x[..., :39]}, ValueError, r"x must be \[..., 2K\]"),
        ({"x": x[:0]}, ValueError, "not empty"),
        ({"grad": grad[:1]}, ValueError, r"grad must be \[5, 77, 20\]"),
        ({"x": x.transpose(0, 1)}, ValueError, "x must be contiguous"),
        ({"out": out[:1]}, ValueError, r"out must be \[5, 77, 40\]"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"out": x}, ValueError, "out shares memory with x"),
        ({"x": x.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
    ):
        with pytest.raises(error, match=words):
            geglu_backward(**{**case, **change})
