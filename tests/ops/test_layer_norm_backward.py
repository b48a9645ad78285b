"""layer_norm_backward against its reference, and layer_norm differentiated by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    assert_same_bits,
    doubled,
    misaligned,
    on_every_isa_and_thread_count,
    placed,
)
from test_layer_norm import SETS, SHAPES, all_shapes
from test_layer_norm import make_case as forward_case
from torch.utils.checkpoint import checkpoint

from vfengine.native import vfengine_native
from vfengine.ops import (
    differentiable_layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
    layer_norm_reference,
)

__all__ = ["SETS"]  # of shapes, for kernel_cases


def make_case(shape=SHAPES["odd"], dtype=torch.float32, affine=True, device="cpu", mean=0.5):
    """Keyword arguments of a call."""
    case = forward_case(shape, dtype, affine, device, mean)
    case.pop("bias", None)
    random = torch.Generator().manual_seed(sum(shape) + 1)
    return {"grad": torch.randn(shape, generator=random).to(device, dtype), **case}


def in_own_dtype(grad, x, weight=None):
    """PyTorch's own derivative, in the dtype of x."""
    x = x.detach().requires_grad_()
    channels = x.shape[-1:]
    tables = [torch.ones(channels), torch.zeros(channels)]
    if weight is not None:
        tables[0] = weight
    weight, bias = (t.to(x.device, x.dtype).requires_grad_() for t in tables)
    return torch.autograd.grad(F.layer_norm(x, channels, weight, bias), (x, weight, bias), grad)


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["x"]))
    results = layer_norm_backward(**case, out=out, backend=backend)
    assert results[0] is out
    assert all(table.dtype is torch.float32 for table in results[1:])
    exact = layer_norm_backward_reference(**doubled(case))
    for result, right, peer in zip(results, exact, in_own_dtype(**case), strict=True):
        assert_as_close_as_pytorch(result, right, peer)


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend."""
    count = 0
    for shape, dtype, affine in itertools.product(shapes.values(), dtypes, (True, False)):
        assert_matches(placed(make_case(shape, dtype, affine, device), place), backend, place)
        count += 1
    return count


@all_dtypes
@all_shapes
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_layer_norm_backward_matches_reference(dtype, shape, affine, place):
    assert_matches(placed(make_case(shape, dtype, affine), place), "cpu", place)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_formula_is_the_derivative(shape):
    """The reference beside autograd of the forward reference, both in fp64."""
    case = doubled({**make_case(shape), "bias": torch.randn(shape[-1])})
    grad, inputs = case.pop("grad"), [t.requires_grad_() for t in case.values()]
    right = torch.autograd.grad(layer_norm_reference(*inputs), inputs, grad)
    found = layer_norm_backward_reference(grad, *inputs[:2])
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected)


@all_dtypes
def test_a_mean_far_from_zero_leaves_the_gradient_alone(dtype):
    assert_matches(make_case(SHAPES["model"], dtype, affine=False, mean=1e3), "cpu")


@all_dtypes
@pytest.mark.parametrize("shape", [SHAPES["model"], SHAPES["odd"]])
def test_gradients_of_layer_norm_on_any_number_of_threads(dtype, shape):
    case = make_case(shape, dtype)
    assert_same_on_any_number_of_threads(lambda: layer_norm_backward(**case))


def assert_same_on_any_number_of_threads(call):
    """The same bits of all results of call(), on each instruction set."""
    results = on_every_isa_and_thread_count(call)
    assert len(results) == 3 * len(vfengine_native.cpu_isas)
    for i, result in enumerate(results):
        for a, b in zip(results[i - i % 3], result, strict=True):
            assert_same_bits(a, b)


def assert_differentiates(differentiable, reference, inputs, wrt, dtype, **options):
    """Result and gradients of `inputs`, by name, as autograd of the reference has them in fp64.

    wrt: the names of inputs that have gradients; the tensor "x" or "qkv" alone is in `dtype`
    """
    leaves = {n: t.detach().requires_grad_(n in wrt) for n, t in inputs.items()}
    exact = {n: t.double().detach().requires_grad_(n in wrt) for n, t in inputs.items()}
    y, right = differentiable(**leaves, **options), reference(**exact, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert y.dtype is dtype
    found = torch.autograd.grad(y, [leaves[n] for n in wrt], grad)
    expected = torch.autograd.grad(right, [exact[n] for n in wrt], grad.double())
    for got, wanted in zip((y.detach(), *found), (right.detach(), *expected), strict=True):
        error, largest = (got.double() - wanted).abs().max(), wanted.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * largest, f"{error:.3g} of {largest:.3g}"


@all_dtypes
@pytest.mark.parametrize("wrt", [("x", "weight", "bias"), ("x",), ("weight",)])
def test_layer_norm_differentiates(dtype, wrt):
    inputs = forward_case(dtype=dtype)
    assert_differentiates(differentiable_layer_norm, layer_norm_reference, inputs, wrt, dtype)


def test_layer_norm_without_tables_differentiates():
    inputs = forward_case(affine=False)
    assert_differentiates(
        differentiable_layer_norm, layer_norm_reference, inputs, ("x",), torch.float32
    )


def assert_checkpoints(function, x):
    """The same gradient where the forward pass is run again, under autocast too."""
    for enabled in (False, True):
        gradients = []
        for run in (lambda x: checkpoint(function, x, use_reentrant=False), function):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = run(leaf)
            y.float().square().sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
        assert gradients[0].abs().max() > 0


def assert_not_twice(function, x):
    """No derivative of the derivative."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_layer_norm_is_checkpointed_and_differentiated_once():
    x, weight, bias = forward_case().values()
    linear = torch.nn.Linear(20, 20)
    function = lambda x: differentiable_layer_norm(linear(x), weight, bias)  # noqa: E731
    assert_checkpoints(function, x)
    assert_not_twice(lambda x: differentiable_layer_norm(x, weight, bias), x)


@all_dtypes
def test_reference_backend_of_layer_norm_backward(dtype):
    case = make_case(dtype=dtype)
    results = layer_norm_backward(**case, backend="reference")
    for got, expected in zip(results, layer_norm_backward_reference(**case), strict=True):
        assert torch.equal(got, expected.to(got.dtype))


def test_layer_norm_backward_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    written = torch.empty_like(case["x"]), torch.empty(2, 20, device=device)
    arguments = (*case.values(), 1e-5, backend, *written)
    torch.library.opcheck(torch.ops.vfengine.layer_norm_backward.default, arguments)


def test_layer_norm_backward_rejects_what_kernels_cannot_take():
    case = make_case()
    grad, x, weight = case.values()
    out = torch.empty_like(x)
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"grad": None}, TypeError, "grad must be a tensor"),
        ({"grad": grad.half()}, TypeError, "grad must be torch.float32"),
        ({"out": out.half()}, TypeError, "out must be torch.float32"),
        ({"weight": weight.half()}, TypeError, "weight must be torch.float32"),
        ({"x": x[:0]}, ValueError, "not empty"),
        ({"x": x.transpose(0, 1)}, ValueError, "x must be contiguous"),
        ({"grad": grad[:1]}, ValueError, r"grad must be \[5, 77, 20\]"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"weight": weight[1:]}, ValueError, r"weight must be \[20\]"),
        ({"out": grad}, ValueError, "out shares memory with grad"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"grad": grad.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
    ):
        with pytest.raises(error, match=words):
            layer_norm_backward(**{**case, **change})
