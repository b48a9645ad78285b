"""Convolutions in Winograd's form (csrc/cpu/gemm/winograd.cpp), on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from seeded import normal
from test_row_kernels import all_dtypes, isa, threads  # noqa: F401  fixtures
from torch import Tensor, nn
from triton_tools import guarded

from vfengine.native import vfengine_native
from vfengine.ops._dispatch import DTYPE_NUMBERS as NUMBERS
from vfengine.plan.builder import Builder
from vfengine.plan.forms import FeatureMap, convolution
from vfengine.plan.packing import Weights, pack, pack_winograd, takes_winograd
from vfengine.plan.walk import Packed, Planner

SHAPES = {  # items, height, width, channels, columns
    "3x3": (2, 8, 6, 64, 96, False),
    "odd sizes": (3, 7, 5, 34, 50, False),
    "one pixel": (2, 1, 1, 8, 9, False),
    "one row": (1, 1, 5, 6, 70, False),
    "many tiles": (2, 33, 31, 32, 64, False),
    "wide": (1, 4, 4, 272, 272, False),
    "frames": (2, 16, 9, 64, 80, True),
    "odd frames": (1, 5, 7, 30, 20, True),
    "single frame": (2, 1, 6, 16, 48, True),
    "wide frames": (1, 3, 2, 1040, 20, True),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_weights = pytest.mark.parametrize("transformed", [True, False], ids=["transformed", "taps"])


VECTOR_ISAS = [name for name in vfengine_native.cpu_isas if not name.startswith("amx")]


@pytest.fixture(params=VECTOR_ISAS)
def vector_isa(request):
    """Every instruction set of this machine without a matrix unit in turn."""
    former = vfengine_native.cpu_isa()
    vfengine_native.set_cpu_isa(request.param)
    yield
    vfengine_native.set_cpu_isa(former)


HALF = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
INTO = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
BACK = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])


def in_winograd(pictures: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """F(2, 3) as published, in fp64 but for the transformed pixels and weights, which are rounded.

    images [I, C, H, W] -> [I, C', H, W]
    """
    flat, (height, width) = weight.shape[-1] == 1, pictures.shape[2:]
    across = torch.ones(1, 1) if flat else None
    into, half, back = (across if flat else part for part in (INTO, HALF, BACK))
    padded = F.pad(pictures.float(), (0, 0) if flat else (1, 2 + width % 2))
    padded = F.pad(padded, (0, 0, 1, 2 + height % 2)).unfold(2, 4, 2)  # [I, C, h, W, 4]
    tiles = padded.unsqueeze(-1) if flat else padded.unfold(3, 4, 2)  # [I, C, h, w, 4, 4]
    pixels = torch.einsum("ai,bj,ncyxij->ncyxab", INTO, into, tiles).to(dtype).double()
    taps = torch.einsum("ai,bj,ocij->ocab", HALF, half, weight).to(dtype).double()
    sums = torch.einsum("ncyxab,ocab->noyxab", pixels, taps)
    out = torch.einsum("ia,jb,noyxab->noyixj", BACK.double(), back.double(), sums)
    return out.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transformed: bool) -> Weights:
    if transformed:
        return pack_winograd(weight, bias, dtype)
    return pack(weight.permute(0, 2, 3, 1).flatten(1), bias, dtype)


def convolve(
    shape, dtype, shared=0, residual=None, transformed=True
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's result, in place of the residual; `in_winograd`'s; the convolution's in fp64.

    shared: rows of one bias each
    """
    items, height, width, channels, columns, flat = shape
    count = items * height * width
    x = normal(count, channels).to(dtype)
    weight = normal(columns, channels, 3, 1 if flat else 3, seed=2).to(dtype).float()
    bias = normal(count // shared if shared else 1, columns, seed=3)
    build = Builder(dtype)
    rows, table = build.rows(*x.shape), build.rows(*bias.shape, torch.float32)
    weights = packed(weight, None if shared else bias[0], dtype, transformed)
    place = None if residual is None else build.rows(count, columns)
    given = (table, 0, shared) if shared else None
    options = {"flat": flat, "transformed": transformed, "bias": given}
    out = build.winograd(rows, weights, shape[:3], residual=place, out=place, **options)
    program = build.program()
    program.view(rows).copy_(x)
    program.view(table).copy_(bias)
    if residual is not None:
        program.view(place).copy_(residual)
    program.run()
    pictures = x.double().view(items, height, width, channels).permute(0, 3, 1, 2)
    direct = F.conv2d(pictures, weight.double(), padding=(1, 0) if flat else 1)
    expected = []
    for pictured in (in_winograd(pictures, weight, dtype), direct):
        exact = pictured.permute(0, 2, 3, 1).reshape(count, columns)
        exact = exact + bias.double().repeat_interleave(count // len(bias), 0)
        expected.append(exact if residual is None else exact + residual.to(dtype).double())
    return program.view(out).clone(), *expected


def assert_close(out: Tensor, expected: Tensor, direct: Tensor) -> None:
    """One rounding from the formula, sums in fp32; from the convolution what the form costs."""

    def error(exact: Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    eps = torch.finfo(out.dtype).eps
    assert error(expected) <= (eps / 4 if out.dtype is torch.bfloat16 else 8 * eps)
    assert error(direct) <= (eps if out.dtype is torch.bfloat16 else 16 * eps)


@both_weights
@all_dtypes
@all_shapes
def test_winograd_matches_a_convolution(shape, dtype, transformed, vector_isa):
    assert_close(*convolve(shape, dtype, transformed=transformed))


@all_dtypes
@all_shapes
def test_winograd_adds_each_items_bias_and_a_residual_in_place(shape, dtype, vector_isa):
    items, height, width, _, columns, _ = shape
    residual = normal(items * height * width, columns, seed=5)
    assert_close(*convolve(shape, dtype, shared=height * width, residual=residual))


@both_weights
@all_dtypes
@all_shapes
def test_winograd_is_the_same_on_any_number_of_threads(
    shape,
    dtype,
    transformed,
    vector_isa,
    threads,  # noqa: F811
):
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(convolve(shape, dtype, transformed=transformed)[0])
    for other in results[1:]:
        assert torch.equal(other, results[0])


@both_weights
@all_dtypes
@all_shapes
def test_winograd_stays_within_its_memory(shape, dtype, transformed, vector_isa):
    """Buffers end where inaccessible pages begin."""
    items, height, width, channels, columns, flat = shape
    weight = normal(columns, channels, 3, 1 if flat else 3, seed=2)
    x = guarded(normal(items * height * width, channels).to(dtype))
    weights = guarded(packed(weight, None, dtype, transformed).packed)
    bias, out = guarded(normal(columns)), guarded(normal(len(x), columns).to(dtype))
    args = vfengine_native.WinogradArgs(
        x=x.data_ptr(),
        weights=weights.data_ptr(),
        bias=bias.data_ptr(),
        residual=out.data_ptr(),
        out=out.data_ptr(),
        items=items,
        height=height,
        width=width,
        channels=channels,
        columns=columns,
        flat=flat,
        transformed=transformed,
        dtype=NUMBERS[dtype],
    )
    vfengine_native.winograd_cpu(args, 2)
    assert out.isfinite().all()


def test_winograd_rejects_bf16_beside_a_matrix_unit_alone(isa):  # noqa: F811
    if isa in VECTOR_ISAS:
        convolve(SHAPES["3x3"], torch.bfloat16)
        return
    with pytest.raises(ValueError, match="expected fp32 beside a matrix unit, got bf16"):
        convolve(SHAPES["3x3"], torch.bfloat16)


def test_winograd_is_not_for_convolutions_of_few_channels():
    def conv(inputs, outputs, kernel=(3, 3)):
        return nn.Conv2d(inputs, outputs, kernel, device="meta")

    for taken in (conv(32, 32), conv(1280, 640), conv(128, 128, (3, 1))):
        assert takes_winograd(taken)
    for refused in (conv(4, 64), conv(64, 4), conv(64, 64, (3, 1))):
        assert not takes_winograd(refused)


@pytest.mark.parametrize(
    "shape, flat, kernel",
    [
        ((1, 8, 8), False, "row_matmul"),
        ((1, 16, 15), False, "winograd"),
        ((2, 3, 4), True, "row_matmul"),
        ((16, 3, 3), True, "winograd"),
    ],
)
def test_heavy_weights_are_transformed_where_a_clip_has_many_tiles(shape, flat, kernel):
    """shape: frames, height, width; the same bits in a batch."""
    taps, padding = ((3, 1), (1, 0)) if flat else ((3, 3), (1, 1))
    conv = nn.Conv2d(656, 640, taps, padding=padding).requires_grad_(False)
    form, (frames, height, width) = convolution(conv, torch.float32), shape
    x, results = normal(3 * frames * height * width, 656), []
    for batch in (1, 3):
        build = Builder(torch.float32)
        planner = Planner(build, Packed(), batch, frames, None, False, 0)
        rows = build.rows(batch * frames * height * width, 656)
        out = form.emit(planner, FeatureMap((rows,), height, width)).rows
        program = build.program(out)
        assert [op for op, _ in program._unbound] == [kernel]
        program.view(rows).copy_(x[: rows.count])
        program.run()
        results.append(program.view(out).clone())
    assert torch.equal(results[1][: len(results[0])], results[0])
