"""group_norm_silu_backward against its reference, and against autograd."""

import itertools

import pytest
import torch
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    misaligned,
    on_every_isa_and_thread_count,
    placed,
    rows_placed,
)
from torch import Tensor

from vfengine.ops import (
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_backward_reference,
    group_norm_silu_reference,
)
from vfengine.ops.group_norm_silu_backward import differentiable_group_norm_silu

SHAPES = {  # (B, C, H, W), groups, num_frames
    "model": ((16, 96, 8, 8), 8, 8),
    "odd": ((6, 20, 7, 11), 5, 3),
    "no_vectors": ((4, 21, 9, 7), 7, 2),
    "tiny": ((1, 2, 1, 2), 1, 1),
    "single_frame": ((2, 64, 8, 8), 8, 1),
    "wide": ((2, 2600, 2, 2), 4, 2),
    "many_chunks": ((2, 16, 72, 40), 4, 2),
}
SMALL = {name: SHAPES[name] for name in ("odd", "no_vectors", "tiny", "single_frame")}
GPU = {name: SHAPES[name] for name in ("model", "odd")}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU}
FORMS = {
    "plain": (),
    "whole": ("weight", "scale"),
    "no_scale": ("weight",),
    "linear": ("weight", "scale", "linear"),
}
all_cases = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
TABLES = ("weight", "bias", "scale", "shift")


def make_case(shape=SHAPES["odd"], dtype=torch.float32, form=FORMS["whole"], device="cpu", **drawn):
    """Keyword arguments of a call."""
    size, groups, frames = shape
    random = torch.Generator().manual_seed(sum(size))
    normal = lambda *size: torch.randn(*size, generator=random)  # noqa: E731
    x = normal(*size) * drawn.get("std", 1.5) + drawn.get("mean", 0.5)
    case = {"grad": normal(*size), "x": x}
    case = {name: value.to(device, dtype) for name, value in case.items()}
    if "weight" in form:
        case |= {"weight": normal(size[1]).to(device), "bias": normal(size[1]).to(device)}
    if "scale" in form:
        case |= {"scale": normal(*size[:2]).to(device), "shift": normal(*size[:2]).to(device)}
    others = {"num_groups": groups, "num_frames": frames, "silu": "linear" not in form}
    return {**in_rows(case, as_it_is), **others}


def in_rows(case, place):
    """The case with its pictures in channels_last memory, and all tensors at another place."""
    pictures = {name: rows_placed(case[name], place) for name in ("grad", "x")}
    return {**placed(case, place), **pictures}


def in_own_dtype(case):
    """By autograd of the formula in plain PyTorch, every operation rounded to the dtype of x."""
    dtype = case["x"].dtype
    given = {name: case[name].to(dtype) for name in ("x", *TABLES) if name in case}
    given = {name: value.detach().requires_grad_() for name, value in given.items()}
    x = given["x"]
    clips = x.unflatten(0, (-1, case["num_frames"])).transpose(1, 2).flatten(3)
    u = torch.group_norm(clips, case["num_groups"], given.get("weight"), given.get("bias"))
    u = u.transpose(1, 2).reshape(x.shape)
    if "scale" in given:
        u = u * (1 + given["scale"][..., None, None]) + given["shift"][..., None, None]
    y = torch.nn.functional.silu(u) if case["silu"] else u
    (of_x,) = torch.autograd.grad(y, [x], case["grad"])
    return of_x


def doubled(case):
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}


def assert_matches(case, backend, place=as_it_is):
    out = rows_placed(torch.empty_like(case["x"]), place)
    found, sums = group_norm_silu_backward(**case, out=out, backend=backend)
    assert found is out
    exact, exact_sums = group_norm_silu_backward_reference(**doubled(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(case))
    size = exact_sums.abs().max()
    # sums of few terms, whose factors in 16 bits come from fits well below a rounding
    allowed = 1e-4 if case["x"].dtype is torch.float32 else 4e-3
    assert (sums.double() - exact_sums).abs().max() <= allowed * size


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, forms and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), FORMS.values(), dtypes))
    for shape, form, dtype in cases:
        assert_matches(in_rows(make_case(shape, dtype, form, device), place), backend, place)
    return len(cases)


@all_dtypes
@all_cases
@all_forms
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_group_norm_gradients_match_reference(dtype, shape, form, place):
    assert_matches(in_rows(make_case(shape, dtype, form), place), "cpu", place)


@all_cases
@all_forms
def test_reference_is_that_of_autograd(shape, form):
    case = doubled(make_case(shape, form=form))
    given = {name: case[name].requires_grad_() for name in ("x", *TABLES) if name in case}
    others = {name: case[name] for name in ("num_groups", "num_frames", "silu")}
    y = group_norm_silu_reference(**given, **others)
    grads = dict(zip(given, torch.autograd.grad(y, given.values(), case["grad"]), strict=True))
    with torch.no_grad():
        out, (plain, normed) = group_norm_silu_backward_reference(**case)
        gained = [plain, normed]
        expected = {"x": out}
        if "scale" in given:
            gained = [(1 + case["scale"]) * part for part in gained]
            expected["shift"] = plain
            expected["scale"] = normed * case["weight"] + plain * case["bias"]
        if "weight" in given:
            expected["bias"], expected["weight"] = (part.sum(0) for part in gained)
    for name, grad in grads.items():
        torch.testing.assert_close(expected[name], grad, rtol=1e-8, atol=1e-9)


@all_dtypes
@pytest.mark.parametrize("with_scale", [True, False])
def test_autograd_of_the_differentiable_norm(dtype, with_scale):
    case = make_case(((6, 20, 7, 11), 5, 1), dtype, FORMS["whole" if with_scale else "no_scale"])
    names = [name for name in ("x", *TABLES) if name in case]
    given = [case[name].requires_grad_() for name in names]
    scale, shift = case.get("scale"), case.get("shift")
    y = differentiable_group_norm_silu(
        case["x"], 5, case["weight"], case["bias"], 1e-5, scale, shift
    )
    found = torch.autograd.grad(y, given, case["grad"])
    exact = {name: case[name].detach().double().requires_grad_() for name in names}
    z = group_norm_silu_reference(**exact, num_groups=5)
    expected = torch.autograd.grad(z, exact.values(), case["grad"].double())
    eps = torch.finfo(dtype).eps
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.dtype is case[name].dtype
        error = float((one.double() - other).norm() / other.norm())
        assert error <= 4 * eps if dtype is not torch.float32 else error <= 1e-5, (name, error)


def test_frozen_tables_have_no_gradient():
    case = make_case(((6, 20, 7, 11), 5, 1))
    x = case["x"].requires_grad_()
    y = differentiable_group_norm_silu(x, 5, case["weight"], case["bias"], 1e-5)
    y.backward(case["grad"])
    assert x.grad is not None
    assert case["weight"].grad is None


@all_dtypes
def test_norm_gradients_have_the_same_bits_on_any_number_of_threads(dtype):
    case = make_case(SHAPES["many_chunks"], dtype)

    def both() -> Tensor:
        out, sums = group_norm_silu_backward(**case)
        return torch.cat([out.flatten().float(), sums.flatten()])

    results = on_every_isa_and_thread_count(both)
    for one, two, three in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_far_mean_costs_no_digits():
    case = make_case(((2, 64, 16, 16), 8, 1), mean=300.0, std=0.5)
    exact, _ = group_norm_silu_backward_reference(**doubled(case))
    out, _ = group_norm_silu_backward(**case)
    assert float((out.double() - exact).norm() / exact.norm()) < 1e-4


@all_dtypes
def test_reference_backend_of_norm_gradients(dtype):
    case = make_case(dtype=dtype)
    out, sums = group_norm_silu_backward(**case, backend="reference")
    expected, expected_sums = group_norm_silu_backward_reference(**case)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(sums, expected_sums)


def test_norm_gradients_register():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    tables = [case[name] for name in TABLES]
    sums = torch.empty(2, 6, 20, device=device)
    numbers = (5, 1e-5, 3, True, backend)
    arguments = (case["grad"], case["x"], *tables, *numbers, torch.empty_like(case["x"]), sums)
    torch.library.opcheck(torch.ops.vfengine.group_norm_silu_backward.default, arguments)


def test_norm_gradients_refuse():
    case = make_case()
    x = case["x"]
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"grad": case["grad"].half()}, TypeError, "grad must be torch.float32"),
        ({"grad": case["grad"][:3]}, ValueError, "grad must be"),
        ({"grad": case["grad"].contiguous()}, ValueError, "grad must be in channels_last memory"),
        ({"x": x[:0], "grad": x[:0]}, ValueError, "not empty"),
        ({"num_groups": 3}, ValueError, "num_groups must divide 20 channels, got 3"),
        ({"num_frames": 4}, ValueError, "num_frames must divide 6 images, got 4"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"shift": None}, ValueError, "expected scale and shift, or neither"),
        ({"scale": case["scale"][:3]}, ValueError, r"scale must be \[6, 20\]"),
        ({"weight": case["weight"].half()}, TypeError, "weight must be torch.float32"),
        ({"out": case["grad"]}, ValueError, "out shares memory with grad"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
        ({"x": x.clone().requires_grad_()}, ValueError, "has no derivative"),
    ):
        with pytest.raises(error, match=words):
            group_norm_silu_backward(**{**case, **change})


def test_forward_op_refuses_autograd_and_the_differentiable_one_does_not():
    case = make_case(((6, 20, 7, 11), 5, 1))
    x = case["x"].requires_grad_()
    with pytest.raises(ValueError, match="has no derivative"):
        group_norm_silu(x, 5)
    y = differentiable_group_norm_silu(x, 5, case["weight"], case["bias"], 1e-5)
    with torch.no_grad():
        assert torch.equal(y, group_norm_silu(x, 5, case["weight"], case["bias"]))
