"""group_norm_silu_backward against its reference: vfengine/ops, csrc/cpu."""

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
    on_every_isa_and_thread_count,
    rows_placed,
)

from vfengine.ops import group_norm_silu_backward, group_norm_silu_backward_reference
from vfengine.ops.group_norm_silu_backward import GroupNormSilu

SHAPES = {  # (B, C, H, W), groups
    "model": ((4, 96, 16, 16), 8),
    "odd": ((10, 20, 7, 11), 5),
    "no_vectors": ((4, 21, 9, 7), 7),
    "tiny": ((1, 4, 1, 2), 1),
    "clip": ((2, 64, 16, 16), 8),  # [B, C, N, H*W]
    "many_chunks": ((2, 16, 48, 60), 4),
}
SMALL = {name: SHAPES[name] for name in ("odd", "no_vectors", "tiny")}
GPU = {name: SHAPES[name] for name in ("model", "odd")}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU}
FORMS = {
    "plain": (),
    "whole": ("weight", "scale"),
    "of_pairs": ("scale", "rows"),  # a row of scale and shift for two images
    "linear": ("weight", "linear"),
}


def make_case(shape=SHAPES["odd"], form=("weight", "scale"), dtype=torch.float32, device="cpu"):
    """Keyword arguments of a call."""
    (size, groups), random = shape, torch.Generator().manual_seed(sum(shape[0]))
    normal = lambda *size: torch.randn(*size, generator=random).to(device)  # noqa: E731
    batch, channels = size[:2]
    case = {"grad": rows_placed(normal(*size).to(dtype), as_it_is)}
    case |= {"x": rows_placed((normal(*size) * 2 + 0.5).to(dtype), as_it_is)}
    case |= {"num_groups": groups, "silu": "linear" not in form}
    if "weight" in form:
        case |= {"weight": normal(channels), "bias": normal(channels)}
    if "scale" in form:
        rows = batch // 2 if "rows" in form and batch % 2 == 0 else batch
        table = normal(rows, 2 * channels)
        case["scale"], case["shift"] = table.chunk(2, 1)
    return case


def in_own_dtype(grad, x, num_groups, weight=None, bias=None, scale=None, shift=None, silu=True):
    """∂x by plain PyTorch: every operation rounds to the dtype of x."""
    x = x.detach().requires_grad_()
    weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
    y = F.group_norm(x, num_groups, weight, bias)
    if scale is not None:
        scale, shift = (
            t.to(x.dtype).repeat_interleave(len(x) // len(t), 0)[..., None, None]
            for t in (scale, shift)
        )
        y = y * (1 + scale) + shift
    return torch.autograd.grad(F.silu(y) if silu else y, x, grad)[0]


def assert_matches(case, backend, place=as_it_is):
    case = {**case, "grad": rows_placed(case["grad"], place), "x": rows_placed(case["x"], place)}
    grad_x, sums = group_norm_silu_backward(**case, backend=backend)
    exact, exact_sums = group_norm_silu_backward_reference(**doubled(case))
    assert_as_close_as_pytorch(grad_x, exact, in_own_dtype(**case))
    # fp32 in any dtype; SiLU's own exponential is well below a rounding of the rows
    rounding = torch.finfo(case["x"].dtype).eps / 8
    error = (sums - exact_sums).abs().max() / case["grad"].double().abs().sum((2, 3)).max()
    assert error <= max(rounding, 1e-6), float(error)


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, forms and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), FORMS.values(), dtypes))
    for shape, form, dtype in cases:
        assert_matches(make_case(shape, form, dtype, device), backend, place)
    return len(cases)


@all_dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_group_norm_silu_backward_matches_reference(dtype, shape, form, place):
    assert_matches(make_case(shape, form, dtype), "cpu", place)


def test_same_bits_on_any_number_of_threads():
    case = make_case(dtype=torch.bfloat16)
    results = on_every_isa_and_thread_count(lambda: group_norm_silu_backward(**case)[0])
    for i in range(0, len(results), 3):
        assert torch.equal(results[i], results[i + 1])
        assert torch.equal(results[i], results[i + 2])


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    expected = group_norm_silu_backward_reference(**case)
    for got, value in zip(
        group_norm_silu_backward(**case, backend="reference"), expected, strict=True
    ):
        assert torch.equal(got, value.to(got.dtype))


@pytest.mark.parametrize("modulated", [True, False])
def test_every_gradient_is_that_of_pytorch(modulated):
    case = make_case(form=("weight", "scale") if modulated else ("weight",))
    names = ["x", "weight", "bias"] + ["scale", "shift"] * modulated
    given = {name: case[name].clone().requires_grad_() for name in names}
    tables = [given.get(name) for name in ("scale", "shift")]
    ours = GroupNormSilu.apply(*list(given.values())[:3], *tables, 5, 1e-5, True)
    plain = F.group_norm(given["x"], 5, given["weight"], given["bias"])
    if modulated:
        plain = plain * (1 + tables[0][..., None, None]) + tables[1][..., None, None]
    plain = F.silu(plain)
    torch.testing.assert_close(ours, plain)
    grads = (torch.autograd.grad(y, list(given.values()), case["grad"]) for y in (ours, plain))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_group_norm_silu_backward_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    tables = [case[name] for name in ("weight", "bias", "scale", "shift")]
    out = torch.empty_like(case["x"]), torch.empty(10, 2, 20, device=device)
    arguments = (case["grad"], case["x"], *tables, 5, 1e-5, True, backend, *out)
    torch.library.opcheck(torch.ops.vfengine.group_norm_silu_backward.default, arguments)


def test_rejects_other_dtype_shape_layout_and_device():
    case = make_case()
    x, grad, scale = case["x"], case["grad"], case["scale"]
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"grad": grad.half()}, TypeError, "grad must be torch.float32"),
        ({"grad": 1.0}, TypeError, "grad must be a tensor"),
        ({"x": x[0]}, ValueError, r"x must be \[B, C, H, W\]"),
        ({"grad": grad[:1]}, ValueError, r"grad must be \[10, 20, 7, 11\]"),
        ({"grad": grad.contiguous()}, ValueError, "grad must be in channels_last memory"),
        ({"grad": grad.to("meta")}, ValueError, "grad must be on cpu"),
        ({"weight": case["weight"][:3]}, ValueError, r"weight must be \[20\]"),
        ({"scale": scale.half()}, TypeError, "scale must be torch.float32"),
        ({"shift": None}, ValueError, "expected scale and shift, or neither"),
        ({"num_groups": 3}, ValueError, "num_groups must divide 20 channels"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"x": x.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "only kernels for cpu"),
    ):
        with pytest.raises(error, match=words):
            group_norm_silu_backward(**{**case, **change})
