"""decomposed_noise against its reference: vfengine/ops/decomposed_noise.py, csrc, kernels."""

from itertools import product

import pytest
import torch
from kernel_cases import (
    ALL_DTYPES,
    DTYPES,
    SHAPES,
    all_dtypes,
    all_shapes,
    as_it_is,
    misaligned,
    on_every_isa_and_thread_count,
)

from vfengine.ops import decomposed_noise, decomposed_noise_reference
from vfengine.ops.decomposed_noise import _cos_and_sin, _radius

PLACE = {"step": 5, "sample_offset": 3, "frame_offset": 2}
SEEDS = {  # the second is negative as int64
    "base": {"base_seed": 2**32 + 11},
    "residual": {"residual_seed": 2**63 + 7},
}


def make_case(shape, part):
    """Shape of out and keyword arguments of a call."""
    return (shape[:1] + shape[2:] if part == "base" else shape), {**SEEDS[part], **PLACE}


def assert_matches(shape, dtype, part, backend, device="cpu", place=as_it_is):
    """The reference's very bits, rounded once to dtype; int32: its words."""
    shape, options = make_case(shape, part)
    out = place(torch.zeros(shape, dtype=dtype, device=device))
    assert decomposed_noise(out, **options, backend=backend) is out
    expected = decomposed_noise_reference(shape, **options, words=dtype == torch.int32)
    assert torch.equal(out.cpu(), expected.to(dtype)), (shape, dtype, part)


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, parts and dtypes on one backend, words among them; returns their number."""
    cases = list(product(shapes.values(), [*dtypes, torch.int32], SEEDS))
    for case in cases:
        assert_matches(*case, backend, device, place)
    return len(cases)


@all_dtypes
@all_shapes
@pytest.mark.parametrize("part", SEEDS)
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_decomposed_noise_is_the_reference_bit_for_bit(dtype, shape, part, place):
    assert_matches(shape, dtype, part, "cpu", place=place)


@all_shapes
@pytest.mark.parametrize("part", SEEDS)
def test_every_word_is_the_reference_s(shape, part):
    assert_matches(shape, torch.int32, part, "cpu")


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.int32])
def test_same_bits_on_any_threads_and_instruction_set(dtype):
    on_every_isa_and_thread_count(
        lambda: assert_matches((2, 9, 3, 61, 67), dtype, "residual", "cpu")
    )


def test_radius_is_within_one_unit_of_every_exact_one():
    w = torch.arange(2**24, dtype=torch.int32)
    exact = (-2.0 * ((w + 1).double() * 2.0**-24).log()).sqrt()
    assert units(_radius(w)[:-1], exact[:-1]) < 1.0
    assert _radius(w)[-1] == 0  # u = 1


def test_cos_and_sin_are_within_one_unit_of_every_exact_one():
    w = torch.arange(2**24, dtype=torch.int32)
    # Reduced to [-π/4, π/4] in integers: float64 of 2π w / 2^24 itself would be the larger error.
    quadrant = (w + 2**21) >> 22
    angle = (w - (quadrant << 22)).double() * (torch.pi / 2**23)
    cos, sin = angle.cos(), angle.sin()
    for name, drawn, turn in zip(("cos", "sin"), _cos_and_sin(w), (0, 3), strict=True):
        q = (quadrant + turn) % 4  # sin x = cos(x + 3 π/2)
        even, odd = torch.where(q == 0, cos, -cos), torch.where(q == 3, sin, -sin)
        assert units(drawn, torch.where(q % 2 == 0, even, odd)) < 1.0, name


def test_normals_are_close_to_the_exact_ones():
    """What the units of the two factors and of their product add up to, on a million numbers."""
    shape = (1, 4, 1, 512, 512)
    words = decomposed_noise_reference(shape, residual_seed=1, words=True).view(-1, 4) >> 8
    u, v = (words[:, ::2] + 1).double() * 2.0**-24, words[:, 1::2].double() * 2.0**-24
    radius, angle = (-2 * u.log()).sqrt(), 2 * torch.pi * v
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    drawn = decomposed_noise(torch.empty(shape), residual_seed=1).view(-1, 2, 2)
    assert units(drawn, exact) < 2.5


def test_rejects_seeds_and_places():
    out = torch.empty(1, 2, 1, 2, 2)
    for seeds, got in (({}, "none"), ({"base_seed": 0, "residual_seed": 1}, "both")):
        with pytest.raises(ValueError, match=f"expected base_seed or residual_seed, got {got}"):
            decomposed_noise(out, **seeds)
    for seed, error in ((-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="residual_seed must be"):
            decomposed_noise(out, residual_seed=seed)
    for name in PLACE:
        with pytest.raises(ValueError, match=f"decomposed_noise: {name} must be an int in"):
            decomposed_noise(out, residual_seed=0, **{name: -1})
    with pytest.raises(ValueError, match="step must be an int in"):
        decomposed_noise(out, residual_seed=0, step=2**24)


def test_rejects_out():
    for out in (torch.empty(2, 1, 2, 2), torch.empty(0, 2, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"out must be \[B, N, C, H, W\] and not empty"):
            decomposed_noise(out, residual_seed=0)
    with pytest.raises(ValueError, match=r"out must be \[B, C, H, W\]"):
        decomposed_noise(torch.empty(1, 2, 1, 2, 2), 0)
    with pytest.raises(TypeError, match="out must be fp32, fp16, bf16 or int32"):
        decomposed_noise(torch.empty(1, 1, 2, 2).double(), 0)
    with pytest.raises(ValueError, match="out must be contiguous"):
        decomposed_noise(torch.empty(1, 1, 2, 3).mT, 0)
    with pytest.raises(ValueError, match="no derivative"):
        decomposed_noise(torch.empty(1, 1, 2, 2, requires_grad=True), 0)


@pytest.mark.parametrize("backend", ["cuda", "triton", "fastest"])
def test_rejects_backend_that_cannot_run(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"backend='{backend}'"):
        decomposed_noise(torch.empty(1, 1, 2, 2), 0, backend=backend)


@pytest.mark.parametrize("part", SEEDS)
def test_decomposed_noise_registers(part):
    check_registration("cpu", part)


def check_registration(device, part="residual"):
    shape, options = make_case(SHAPES["odd"], part)
    seeds = [options.get(name) for name in ("base_seed", "residual_seed")]
    seeds = [s if s is None or s < 2**63 else s - 2**64 for s in seeds]
    arguments = (torch.zeros(shape, device=device), *seeds, 5, 3, 2, "auto")
    torch.library.opcheck(torch.ops.vfengine.decomposed_noise.default, arguments)


def units(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of fp32 x, in units in the last place of the exact value."""
    rounded = exact.abs().float()
    unit = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    return ((x.double() - exact).abs() / unit).max().item()
