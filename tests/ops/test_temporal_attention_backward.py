"""temporal_attention_backward against its reference, and the op differentiated by autograd."""

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
from test_layer_norm_backward import (
    assert_checkpoints,
    assert_differentiates,
    assert_not_twice,
    assert_same_on_any_number_of_threads,
)
from test_temporal_attention import SHAPES, SMALL, all_shapes
from test_temporal_attention import in_own_dtype as attention_in_own_dtype
from test_temporal_attention import make_case as forward_case

from vfengine.ops import (
    differentiable_temporal_attention,
    temporal_attention_backward,
    temporal_attention_backward_reference,
    temporal_attention_reference,
)
from vfengine.ops.temporal_attention_backward import temporal_attention_takes

GPU = {"model": SHAPES["model"], "odd": SHAPES["odd"]}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU}


def make_case(shape=SMALL["odd"], dtype=torch.float32, biased=True, device="cpu"):
    """Keyword arguments of a call."""
    batch, frames, pixels, heads, head_dim = shape
    random = torch.Generator().manual_seed(sum(shape) + 1)
    grad = torch.randn(batch, frames, pixels, heads * head_dim, generator=random)
    return {"grad": grad.to(device, dtype), **forward_case(shape, dtype, biased, device)}


def in_own_dtype(grad, qkv, num_heads, bias=None):
    """By autograd of the formula in plain PyTorch, with the bias in fp32."""
    inputs = [t.detach().requires_grad_() for t in (qkv, bias) if t is not None]
    y = attention_in_own_dtype(inputs[0], num_heads, *inputs[1:]).to(qkv.dtype)
    return torch.autograd.grad(y, inputs, grad)


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["qkv"]))
    results = temporal_attention_backward(**case, out=out, backend=backend)
    assert results[0] is out
    assert (results[1] is None) == ("bias" not in case)
    exact = temporal_attention_backward_reference(**doubled(case))
    for result, right, peer in zip(results, exact, in_own_dtype(**case), strict=False):
        assert_as_close_as_pytorch(result, right, peer)


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend, with and without bias."""
    cases = list(itertools.product(shapes.values(), dtypes, (True, False)))
    for shape, dtype, biased in cases:
        assert_matches(placed(make_case(shape, dtype, biased, device), place), backend, place)
    for dtype in dtypes:
        assert_masks(backend, dtype, device)
    return len(cases)


def assert_masks(backend, dtype, device="cpu"):
    """Frames that a bias of -inf hides have no gradient, be it all of the first that are seen."""
    case = make_case((1, 33, 1, 1, 8), dtype, device=device)
    case["bias"][:, :, :32] = float("-inf")
    grad_qkv, grad_bias = temporal_attention_backward(**case, backend=backend)
    of_q, of_k, of_v = grad_qkv.chunk(3, -1)
    for hidden in (of_q, of_k, of_v[:, :32], grad_bias):
        assert not hidden.any()
    torch.testing.assert_close(of_v[:, 32], case["grad"].float().sum(1).to(dtype))


@all_dtypes
@all_shapes
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_temporal_attention_backward_matches_reference(dtype, shape, biased, place):
    assert_matches(placed(make_case(shape, dtype, biased), place), "cpu", place)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_hidden_frames_have_no_gradient(dtype, backend):
    assert_masks(backend, dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_the_formula_is_the_derivative_of_attention(shape, biased):
    """The reference beside autograd of the forward reference, both in fp64."""
    case = doubled(make_case(shape, biased=biased))
    inputs = [case[name].requires_grad_() for name in ("qkv", "bias") if name in case]
    y = temporal_attention_reference(inputs[0], case["num_heads"], *inputs[1:])
    right = torch.autograd.grad(y, inputs, case["grad"])
    found = temporal_attention_backward_reference(**case)
    for got, expected in zip(found, right, strict=False):
        torch.testing.assert_close(got, expected)


@all_dtypes
@pytest.mark.parametrize("shape", [SHAPES["model"], (1, 6, 1100, 1, 8)])
def test_gradients_of_attention_on_any_number_of_threads(dtype, shape):
    """The second shape has several pixels a task beyond those of the first."""
    case = make_case(shape, dtype)
    assert_same_on_any_number_of_threads(lambda: temporal_attention_backward(**case))


@all_dtypes
@pytest.mark.parametrize("wrt", [("qkv", "bias"), ("qkv",), ("bias",)])
def test_temporal_attention_differentiates(dtype, wrt):
    case = forward_case(dtype=dtype)
    heads = case.pop("num_heads")
    assert_differentiates(
        differentiable_temporal_attention,
        temporal_attention_reference,
        case,
        wrt,
        dtype,
        num_heads=heads,
    )


def test_temporal_attention_is_checkpointed_and_differentiated_once():
    qkv, heads, bias = forward_case().values()
    linear = torch.nn.Linear(360, 360)
    assert_checkpoints(lambda x: differentiable_temporal_attention(linear(x), heads, bias), qkv)
    assert_not_twice(lambda x: differentiable_temporal_attention(x, heads, bias), qkv)


def test_which_frames_and_heads_have_kernels():
    assert temporal_attention_takes(128, 256)
    for frames, head_dim in ((129, 64), (16, 12), (16, 264)):
        assert not temporal_attention_takes(frames, head_dim)


@all_dtypes
def test_reference_backend_of_temporal_attention_backward(dtype):
    case = make_case(dtype=dtype)
    results = temporal_attention_backward(**case, backend="reference")
    expected = temporal_attention_backward_reference(**case)
    for got, right in zip(results, expected, strict=True):
        assert torch.equal(got, right.to(got.dtype))


def test_temporal_attention_backward_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    written = torch.empty_like(case["qkv"]), torch.empty_like(case["bias"])
    arguments = (case["grad"], case["qkv"], case["bias"], 3, backend, *written)
    torch.library.opcheck(torch.ops.vfengine.temporal_attention_backward.default, arguments)


def test_temporal_attention_backward_rejects_what_kernels_cannot_take():
    case = make_case()
    grad, qkv, bias = case["grad"], case["qkv"], case["bias"]
    out = torch.empty_like(qkv)
    long = {"qkv": torch.ones(1, 129, 1, 24), "grad": torch.ones(1, 129, 1, 8), "num_heads": 1}
    for change, error, words in (
        ({"qkv": qkv.double()}, TypeError, "qkv must be fp32, fp16 or bf16"),
        ({"grad": None}, TypeError, "grad must be a tensor"),
        ({"grad": grad.half()}, TypeError, "grad must be torch.float32"),
        ({"bias": bias.half()}, TypeError, "bias must be torch.float32"),
        ({"out": out.half()}, TypeError, "out must be torch.float32"),
        ({"qkv": qkv[0]}, ValueError, r"qkv must be \[B, N, P, 3\*H\*D\]"),
        ({"num_heads": 7}, ValueError, "360 channels are not q, k, v of num_heads=7"),
        ({"num_heads": 30}, ValueError, "must be a multiple of 8, at most 256, got 4"),
        ({"qkv": qkv.transpose(1, 2)}, ValueError, "must be contiguous"),
        ({"grad": grad[..., 1:]}, ValueError, r"grad must be \[1, 5, 11, 120\]"),
        ({"bias": bias[:, 1:]}, ValueError, r"bias must be \[3, 5, 5\]"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"out": qkv}, ValueError, "out shares memory with qkv"),
        (long, ValueError, "at most 128 frames"),
        ({"grad": grad.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
    ):
        with pytest.raises(error, match=words):
            temporal_attention_backward(**{**case, **change})
