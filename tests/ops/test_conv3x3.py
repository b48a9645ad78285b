"""conv3x3 and its gradients against their references: vfengine/ops/conv3x3.py, csrc/cpu/gemm."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    as_it_is,
    assert_as_close_as_pytorch,
    misaligned,
    on_every_isa_and_thread_count,
    rows_placed,
)
from torch import Tensor

from vfengine.native import vfengine_native
from vfengine.ops import (
    conv3x3,
    conv3x3_reference,
    conv3x3_weight_gradient,
    conv3x3_weight_gradient_reference,
)
from vfengine.ops.conv3x3 import conv3x3_pays, differentiable_conv3x3

SHAPES = {  # B, C, H, W, C'
    "model": (8, 96, 8, 8, 160),
    "odd": (3, 34, 7, 5, 50),
    "one pixel": (2, 8, 1, 1, 10),
    "one row": (1, 6, 1, 5, 70),
    "many tiles": (3, 16, 33, 31, 24),  # several blocks of them, the last one short
    "wide": (2, 272, 4, 4, 36),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
VECTOR_ISAS = [name for name in vfengine_native.cpu_isas if not name.startswith("amx")]


@pytest.fixture(autouse=True)
def without_matrix_unit():
    """In the best instruction set of this machine that has none."""
    former = vfengine_native.cpu_isa()
    vfengine_native.set_cpu_isa(VECTOR_ISAS[-1])
    yield
    vfengine_native.set_cpu_isa(former)


def drawn(shape, dtype, place=as_it_is) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the results."""
    batch, channels, height, width, made = shape
    random = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    x = rows_placed(normal(batch, channels, height, width).to(dtype), place)
    grad = rows_placed(normal(batch, made, height, width).to(dtype), place)
    weight = rows_placed(normal(made, channels, 3, 3) / (9 * channels) ** 0.5, place)
    return x, weight, place(normal(made)), grad


def assert_near(out: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """To fp32's rounding in fp32; in bf16 as far as transformed factors are rounded once more."""
    error = float((out.double() - exact).norm() / exact.norm())
    assert error <= (16 * torch.finfo(dtype).eps if dtype is torch.float32 else 2**-7), error


@both_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_results_match_reference(shape, dtype, place):
    x, weight, bias, _ = drawn(shape, dtype, place)
    exact = conv3x3_reference(x.double(), weight.double(), bias.double())
    out = rows_placed(torch.empty_like(exact, dtype=dtype), place)
    assert conv3x3(x, weight, bias, out=out) is out
    assert_near(out, exact, dtype)


@both_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_gradients_of_pixels_match_reference(shape, dtype, place):
    _, weight, _, grad = drawn(shape, dtype, place)
    exact = conv3x3_reference(grad.double(), weight.double(), transposed=True)
    assert_near(conv3x3(grad, weight, transposed=True), exact, dtype)


@both_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_gradients_of_weights_match_reference(shape, dtype, place):
    x, _, _, grad = drawn(shape, dtype, place)
    exact = conv3x3_weight_gradient_reference(grad.double(), x.double())
    out = conv3x3_weight_gradient(grad, x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out, exact, dtype)


@all_shapes
def test_references_are_those_of_autograd(shape):
    x, weight, bias, grad = (value.double().requires_grad_() for value in drawn(shape, torch.float))
    y = F.conv2d(x, weight, bias, padding=1)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), grad)
    with torch.no_grad():
        torch.testing.assert_close(conv3x3_reference(x, weight, bias), y)
        torch.testing.assert_close(conv3x3_reference(grad, weight, transposed=True), of_x)
        torch.testing.assert_close(conv3x3_weight_gradient_reference(grad, x), of_weight)


@both_dtypes
def test_autograd_takes_the_kernels(dtype):
    x, weight, bias, grad = drawn(SHAPES["model"], dtype)
    given = [value.requires_grad_() for value in (x, weight, bias)]
    y = differentiable_conv3x3(*given)
    of_x, of_weight, of_bias = torch.autograd.grad(y, given, grad)
    with torch.no_grad():
        assert torch.equal(y, conv3x3(x, weight, bias))
        assert torch.equal(of_x, conv3x3(grad, weight, transposed=True))
        assert torch.equal(of_weight, conv3x3_weight_gradient(grad, x))
    exact = grad.double().sum((0, 2, 3))
    assert_as_close_as_pytorch(of_bias, exact, grad.float().sum((0, 2, 3)))


@both_dtypes
@all_shapes
def test_a_residual_is_added(shape, dtype):
    x, weight, bias, residual = drawn(shape, dtype)
    exact = conv3x3_reference(
        x.double(), weight.double(), bias.double(), residual=residual.double()
    )
    assert_near(conv3x3(x, weight, bias, residual=residual), exact, dtype)


def test_a_residual_takes_the_whole_gradient():
    x, weight, bias, grad = drawn(SHAPES["odd"], torch.float32)
    residual = torch.randn_like(grad).requires_grad_()
    y = differentiable_conv3x3(x, weight.requires_grad_(), bias, residual)
    (found,) = torch.autograd.grad(y, [residual], grad)
    assert torch.equal(found, grad)


def test_only_what_is_needed_is_computed():
    x, weight, bias, grad = drawn(SHAPES["odd"], torch.float32)
    y = differentiable_conv3x3(x, weight.requires_grad_(), bias)
    (of_weight,) = torch.autograd.grad(y, [weight], grad)
    assert torch.equal(of_weight, conv3x3_weight_gradient(grad, x))


@both_dtypes
def test_the_same_bits_on_any_number_of_threads(dtype):
    """Per instruction set: each has lanes of its own to sum in."""
    x, weight, bias, grad = drawn(SHAPES["many tiles"], dtype)

    def all_three() -> Tensor:
        if vfengine_native.cpu_has_tiles() and dtype is torch.bfloat16:
            return torch.zeros(1)  # refused: test_bf16_beside_a_matrix_unit_is_refused
        found = conv3x3(x, weight, bias), conv3x3(grad, weight, transposed=True)
        return torch.cat([part.flatten().float() for part in (*found, _weights())])

    def _weights() -> Tensor:
        return conv3x3_weight_gradient(grad, x)

    results = on_every_isa_and_thread_count(all_three)
    for one, two, three in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("name", VECTOR_ISAS)
@both_dtypes
def test_every_instruction_set_computes_it(name, dtype):
    vfengine_native.set_cpu_isa(name)
    x, weight, bias, grad = drawn(SHAPES["odd"], dtype)
    assert_near(
        conv3x3(x, weight, bias),
        conv3x3_reference(x.double(), weight.double(), bias.double()),
        dtype,
    )
    assert_near(
        conv3x3(grad, weight, transposed=True),
        conv3x3_reference(grad.double(), weight.double(), transposed=True),
        dtype,
    )
    exact = conv3x3_weight_gradient_reference(grad.double(), x.double())
    assert_near(conv3x3_weight_gradient(grad, x), exact, dtype)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_and_order(kind):
    x, weight, bias, _ = drawn(SHAPES["odd"], torch.float32)
    weight = weight.to(kind).contiguous()
    expected = conv3x3(x, weight.float().contiguous(memory_format=torch.channels_last), bias)
    assert torch.equal(conv3x3(x, weight, bias), expected)


def test_reference_backend_of_convolutions():
    x, weight, bias, grad = drawn(SHAPES["odd"], torch.float32)
    out = conv3x3(x, weight, bias, backend="reference")
    assert torch.equal(out, conv3x3_reference(x, weight, bias))
    out = conv3x3_weight_gradient(grad, x, backend="reference")
    assert torch.equal(out, conv3x3_weight_gradient_reference(grad, x))


def test_convolutions_register():
    x, weight, bias, grad = drawn(SHAPES["odd"], torch.float32)
    out, of_weight = torch.empty_like(grad), torch.empty_like(weight)
    ops = torch.ops.vfengine
    torch.library.opcheck(ops.conv3x3.default, (x, weight, bias, grad, False, "cpu", out))
    arguments = (grad, x, "cpu", of_weight)
    torch.library.opcheck(ops.conv3x3_weight_gradient.default, arguments)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": 1.0}, TypeError, "x must be a tensor"),
        ({"x": "double"}, TypeError, "x must be fp32 or bf16"),
        ({"x": "half"}, TypeError, "x must be fp32 or bf16"),
        ({"x": "contiguous"}, ValueError, "x must be in channels_last memory"),
        ({"x": "empty"}, ValueError, "x must be .* not empty"),
        ({"weight": "long"}, TypeError, "weight must be of floats"),
        ({"weight": "taps"}, ValueError, r"weight must be \[C', C, 3, 3\]"),
        ({"weight": "channels"}, ValueError, "x must have the 33 channels"),
        ({"bias": "long"}, TypeError, "bias must be torch.float32"),
        ({"bias": "short"}, ValueError, r"bias must be \[50\]"),
        ({"out": "bf16"}, ValueError, "out must be torch.float32"),
        ({"out": "small"}, ValueError, "out must be"),
        ({"residual": "small"}, ValueError, "residual must be"),
        ({"residual": "contiguous"}, ValueError, "residual must be in channels_last memory"),
        ({"transposed": True}, ValueError, "x must have the 50 channels"),
        ({"transposed": 1}, TypeError, "transposed must be True or False"),
        ({"backend": "triton"}, ValueError, "only kernels for cpu"),
        ({"backend": "best"}, ValueError, "is unknown"),
        ({"x": "recorded"}, ValueError, "has no derivative"),
    ],
    ids=str,
)
def test_convolutions_refuse(change, error, words):
    x, weight, bias, grad = drawn(SHAPES["odd"], torch.float32)
    made = {
        "x": {
            "double": x.double(),
            "half": x.half(),
            "contiguous": x.contiguous(),
            "empty": x[:0],
            "recorded": x.clone().requires_grad_(),
        },
        "weight": {"long": weight.long(), "taps": weight[..., :2], "channels": weight[:, :33]},
        "bias": {"long": bias.long(), "short": bias[:3]},
        "residual": {"small": grad[:1], "contiguous": grad.contiguous()},
        "out": {"bf16": grad.bfloat16(), "small": grad[:1]},
    }
    change = {name: made.get(name, {}).get(value, value) for name, value in change.items()}
    with pytest.raises(error, match=words):
        conv3x3(**{"x": x, "weight": weight, "bias": bias, **change})


def test_out_must_not_be_an_argument():
    x, weight, _, _ = drawn((2, 8, 4, 4, 8), torch.float32)
    with pytest.raises(ValueError, match="out shares memory with x"):
        conv3x3(x, weight, out=x)


def test_weight_gradients_refuse():
    x, _, _, grad = drawn(SHAPES["odd"], torch.float32)
    for change, error, words in (
        ({"grad": grad.bfloat16()}, ValueError, "grad must be torch.float32"),
        ({"grad": grad[:1]}, ValueError, "grad must have the pictures of x"),
        ({"grad": grad.contiguous()}, ValueError, "grad must be in channels_last memory"),
        ({"x": x.half()}, TypeError, "x must be fp32 or bf16"),
        ({"backend": "cuda"}, ValueError, "only kernels for cpu"),
    ):
        with pytest.raises(error, match=words):
            conv3x3_weight_gradient(**{"grad": grad, "x": x, **change})


def test_odd_channels_in_bf16_are_refused():
    x, weight, _, _ = drawn((2, 33, 4, 4, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="even number of channels, got 33"):
        conv3x3(x, weight)


def test_bf16_beside_a_matrix_unit_is_refused():
    x, weight, _, grad = drawn(SHAPES["model"], torch.bfloat16)
    assert conv3x3_pays(x, weight)
    vfengine_native.set_cpu_isa("amx_emulated")
    assert not conv3x3_pays(x, weight)
    assert conv3x3_pays(x.float(), weight)
    with pytest.raises(ValueError, match="fp32 beside a matrix unit"):
        conv3x3(x, weight)
    with pytest.raises(ValueError, match="fp32 beside a matrix unit"):
        conv3x3_weight_gradient(grad, x)


def test_few_channels_do_not_pay():
    x, weight, _, _ = drawn((2, 30, 4, 4, 64), torch.float32)
    assert not conv3x3_pays(x, weight)
