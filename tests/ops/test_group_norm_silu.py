"""group_norm_silu against its reference: vfengine/ops/group_norm_silu.py, csrc, kernels."""

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
    rows_placed,
)

from vfengine.ops import group_norm_silu, group_norm_silu_reference

# (B, C, H, W), groups, num_frames, and how many of the C channels are in a second tensor
SHAPES = {
    "model": ((32, 96, 8, 8), 8, 16),
    "odd": ((10, 20, 7, 11), 5, 5),  # whole vectors of fp32 but not of bf16
    "no_vectors": ((4, 21, 9, 7), 7, 2),
    "tiny": ((1, 1, 1, 1), 1, 1),
    "single_frame": ((2, 64, 8, 8), 8, 1),
    "wide": ((2, 2600, 2, 2), 4, 2),  # more channels than a block has threads for
    "many_chunks": ((4, 16, 48, 40), 4, 4),
    "large_set": ((2, 24, 80, 40), 2, 2),  # more than a block of one launch takes in any dtype
    "wide_groups": ((1, 4112, 3, 3), 1, 1),  # wider than a block in every dtype
    "tall": ((1, 16, 48, 32), 1, 1),  # in fp32 more than the emulated GPU's shared memory holds
    # Two tensors, and a group with channels of both.
    "pair": ((32, 96, 8, 8), 8, 16, 32),
    "odd_pair": ((10, 20, 7, 11), 5, 5, 7),  # a border within what would be a vector
    "single_last": ((2, 9, 5, 5), 3, 1, 1),
    "wide_pair": ((2, 2600, 2, 2), 4, 2, 1001),
    "large_pair": ((2, 24, 80, 40), 2, 2, 8),
    "wide_groups_of_a_pair": ((1, 4112, 3, 3), 1, 1, 2000),
    "tall_pair": ((1, 16, 48, 32), 1, 1, 8),
}
SMALL = {
    **{name: SHAPES[name] for name in SHAPES if name not in ("model", "many_chunks", "pair")},
    "large_set": ((2, 48, 30, 24), 1, 2),
    "large_pair": ((2, 48, 30, 24), 1, 2, 16),
}
RACE = {
    "one_chunk": ((2, 8, 2, 2), 2, 2),
    "two_chunks": ((1, 8, 8, 8), 2, 1),
    "no_vectors": ((1, 6, 8, 8), 2, 1),
    "pair": ((1, 16, 4, 4), 1, 1, 8),
    "no_vectors_of_a_pair": ((1, 6, 4, 4), 1, 1, 3),
}
GPU = {name: SHAPES[name] for name in ("model", "odd", "pair")}
SETS = {"all": SHAPES, "small": SMALL, "race": RACE, "gpu": GPU}
FORMS = {
    "plain": (),
    "whole": ("weight", "scale"),
    "of_sets": ("scale", "of_sets"),  # a row of a wider table for the images of a set
    "linear": ("weight", "linear"),
}
BACKENDS = ("cpu", "reference")

all_cases = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def make_case(
    shape=SHAPES["odd"],
    dtype=torch.float32,
    form=FORMS["whole"],
    device="cpu",
    place=as_it_is,
    mean=0.5,
    std=1.5,
):
    """Keyword arguments of a call."""
    size, groups, frames, *of_second = shape
    random = torch.Generator().manual_seed(sum(size))
    table = lambda *size: place(torch.randn(*size, generator=random).to(device))  # noqa: E731

    drawn = (torch.randn(size, generator=random) * std + mean).to(device, dtype)
    parts = drawn.split([size[1] - sum(of_second), *of_second], 1)
    pictures = [rows_placed(part, place) for part in parts]
    case = dict(zip(("x", "second"), pictures, strict=False))
    case |= {"num_groups": groups, "num_frames": frames}
    if "weight" in form:
        case |= {"weight": table(size[1]), "bias": table(size[1])}
    if "of_sets" in form:
        _, scale, shift = table(size[0] // frames, 3 * size[1]).chunk(3, 1)
        case |= {"scale": scale, "shift": shift}
    elif "scale" in form:
        case |= {"scale": table(*size[:2]), "shift": table(*size[:2])}
    return {**case, "silu": "linear" not in form}


def joined(x, second=None):
    """In channels_last memory."""
    return x if second is None else torch.cat([x, second], 1)


def in_own_dtype(
    x, num_groups, num_frames, silu, weight=None, bias=None, scale=None, shift=None, second=None
):
    """The formula in plain PyTorch: every operation rounds to the dtype of x."""
    x = joined(x, second)
    cast = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
    clips = x.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(3)
    y = torch.group_norm(clips, num_groups, cast(weight), cast(bias))  # F refuses single pixels
    y = y.transpose(1, 2).reshape(x.shape)
    if scale is not None:
        scale, shift = (cast(t).repeat_interleave(len(x) // len(t), 0) for t in (scale, shift))
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


def assert_matches(case, backend, place=as_it_is):
    out = rows_placed(torch.empty_like(joined(case["x"], case.get("second"))), place)
    assert group_norm_silu(**case, out=out, backend=backend) is out
    exact = group_norm_silu_reference(**doubled(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, forms and dtypes on one backend, and the same bits twice."""
    count = 0
    for shape, dtype, form in itertools.product(shapes.values(), dtypes, FORMS.values()):
        case = make_case(shape, dtype, form, device, place)
        out = assert_matches(case, backend, place)
        if form == FORMS["plain"]:
            again = group_norm_silu(**case, backend=backend)
            assert torch.equal(out, again), "another call, other bits"
        count += 1
    for dtype in dtypes:
        shape = next(iter(shapes.values()))
        assert_matches(make_case(shape, dtype, (), device, mean=1e3, std=1.0), backend)
    return count


@all_dtypes
@all_cases
@all_forms
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_group_norm_silu_matches_reference(dtype, shape, form, place):
    assert_matches(make_case(shape, dtype, form, place=place), "cpu", place)


@all_dtypes
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_from_zero_leaves_the_variance_alone(dtype, backend):
    """E[x²] - μ² in fp32 would lose all of a variance of 1 beside a mean of 1000."""
    case = make_case(SHAPES["model"], dtype, form=(), mean=1e3, std=1.0)
    out = assert_matches(case, backend)
    if dtype == torch.float32:
        exact = group_norm_silu_reference(**doubled(case))
        assert (out - exact).abs().max() < 2e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_of_num_frames_images(backend):
    x = torch.randn(6, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    out = group_norm_silu(x, 2, num_frames=3, silu=False, backend=backend)
    sets = out.view(2, 3, 2, 4, 16).transpose(1, 2).flatten(2)
    torch.testing.assert_close(sets.mean(2), torch.zeros(2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(sets.var(2, unbiased=False), torch.ones(2, 2), atol=1e-3, rtol=0)


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    out = group_norm_silu(**case, backend="reference")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, group_norm_silu_reference(**case).to(dtype))


def test_a_second_tensor_has_the_channels_that_follow():
    case = make_case(SHAPES["odd_pair"])
    whole = {**case, "x": joined(case["x"], case["second"]), "second": None}
    for backend in BACKENDS:
        out = group_norm_silu(**case, backend=backend)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, group_norm_silu(**whole, backend=backend))


def test_group_norm_silu_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    for shape in (SHAPES["odd"], SHAPES["odd_pair"]):
        case = make_case(shape, device=device)
        names = ("x", "second", "weight", "bias", "scale", "shift")
        tensors = [case.get(name) for name in names]
        out = torch.empty_like(joined(case["x"], case.get("second")))
        rest = (5, 1e-5, 5, True, backend, out, None)
        torch.library.opcheck(torch.ops.vfengine.group_norm_silu.default, (*tensors, *rest))


def test_rejects_other_dtype_shape_layout_and_device():
    case = make_case()
    other = lambda change: {**case, "out": change(case["x"].clone())}  # noqa: E731
    with pytest.raises(TypeError, match=r"group_norm_silu: out must be torch\.float32"):
        group_norm_silu(**other(torch.Tensor.half))
    with pytest.raises(ValueError, match=r"out must be \[10, 20, 7, 11\]"):
        group_norm_silu(**other(lambda t: torch.cat([t, t])))
    with pytest.raises(ValueError, match="out must be in channels_last memory"):
        group_norm_silu(**other(torch.Tensor.contiguous))
    with pytest.raises(ValueError, match="out must be on cpu"):
        group_norm_silu(**other(lambda t: t.to("meta")))


def test_rejects_another_second_tensor():
    case = make_case(SHAPES["odd_pair"])
    second = case["second"]
    other = lambda change: {**case, "second": change(second)}  # noqa: E731
    with pytest.raises(TypeError, match=r"second must be torch\.float32, got torch\.float16"):
        group_norm_silu(**other(torch.Tensor.half))
    with pytest.raises(TypeError, match="second must be a tensor"):
        group_norm_silu(**other(lambda t: 1))
    for change, words in (
        (lambda t: t[0], r"second must be \[B, C2, H, W\] and not empty, got \[7, 7, 11\]"),
        (lambda t: t[:, :0], r"second must be \[B, C2, H, W\] and not empty"),
        (lambda t: t[:5], r"second must be \[10, 7, 7, 11\], got \[5, 7, 7, 11\]"),
        (torch.Tensor.contiguous, "second must be in channels_last memory"),
        (lambda t: t.to("meta"), "second must be on cpu"),
        (lambda t: t[:, 1:], "num_groups must divide 19 channels, got 5"),
        (lambda t: t.clone().requires_grad_(), "has no derivative"),
    ):
        with pytest.raises(ValueError, match=words):
            group_norm_silu(**other(change))
    out = torch.empty_like(joined(case["x"], second))
    within = out.permute(0, 2, 3, 1).flatten()[: second.numel()].view(10, 7, 11, 7)
    with pytest.raises(ValueError, match="out shares memory with second"):
        group_norm_silu(**other(lambda t: within.permute(0, 3, 1, 2)), out=out)
    with pytest.raises(ValueError, match=r"out must be \[10, 20, 7, 11\]"):
        group_norm_silu(**case, out=torch.empty_like(case["x"]))


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift"])
def test_rejects_other_tables(name):
    case = make_case()
    with pytest.raises(TypeError, match=f"{name} must be torch.float32"):
        group_norm_silu(**{**case, name: case[name].bfloat16()})
    with pytest.raises(ValueError, match=rf"{name} must be \["):
        group_norm_silu(**{**case, name: case[name][..., 1:]})


def test_rejects_values():
    case = make_case()
    for change, words in (
        ({"x": case["x"].contiguous()}, "x must be in channels_last memory"),
        ({"x": case["x"][0]}, r"x must be \[B, C, H, W\]"),
        ({"num_groups": 3}, "num_groups must divide 20 channels, got 3"),
        ({"num_frames": 4}, "num_frames must divide 10 images, got 4"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"shift": None}, "expected scale and shift, or neither"),
        ({"out": case["x"]}, "out shares memory with x"),
        ({"backend": "cuda"}, "backend='cuda' takes CUDA tensors"),
        ({"weight": case["weight"].clone().requires_grad_()}, "has no derivative"),
    ):
        with pytest.raises(ValueError, match=words):
            group_norm_silu(**{**case, **change})
    with pytest.raises(TypeError, match="x must be fp32, fp16 or bf16"):
        group_norm_silu(**{**case, "x": case["x"].double()})
    with pytest.raises(TypeError, match="x must be a tensor"):
        group_norm_silu(**{**case, "x": None})
