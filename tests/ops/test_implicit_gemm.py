"""implicit_gemm against its reference: vfengine/ops/implicit_gemm.py, kernels."""

import itertools
from dataclasses import dataclass

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

from vfengine.kernels import gemm_tiles
from vfengine.ops import implicit_gemm, implicit_gemm_reference
from vfengine.ops.implicit_gemm import Product, _run_torch


@dataclass(frozen=True)
class Shape:
    """x [B, H, W, C], N output channels, and what else there is of a call."""

    x: tuple[int, int, int, int]
    columns: int
    kernel: tuple[int, int] = (3, 3)
    second: int = 0
    stride: int = 1
    upsample: int = 1
    terms: tuple[str, ...] = ("bias",)
    runs: int = 1  # rows of shift and coefficients
    gated: bool = False
    silu: bool = False


EVERY_TERM = ("bias", "shift", "residual")
SHAPES = {
    "model": Shape((4, 16, 16, 64), 64, terms=EVERY_TERM, runs=2),
    "split": Shape((1, 8, 8, 128), 48, terms=EVERY_TERM),  # K in several runs
    "odd": Shape((3, 7, 5, 20), 11, second=9, terms=EVERY_TERM, runs=3),
    "down": Shape((2, 9, 8, 32), 16, stride=2),
    "up": Shape((2, 4, 5, 16), 32, upsample=2),
    "frames": Shape((2, 6, 35, 32), 32, kernel=(3, 1), terms=("bias", "residual")),
    "single_frame": Shape((1, 1, 6, 16), 16, kernel=(3, 1), terms=()),
    "linear": Shape((1, 77, 1, 48), 80, kernel=(1, 1), terms=("residual",)),
    "tiny": Shape((1, 1, 1, 1), 1, kernel=(1, 1)),
    "norm": Shape((4, 5, 7, 32), 32, second=16, terms=("bias", "coefficients"), runs=2, silu=True),
    "affine": Shape((1, 8, 8, 16), 16, kernel=(1, 1), terms=("coefficients",)),
    "geglu": Shape((1, 70, 1, 512), 48, kernel=(1, 1), gated=True),
    "odd_geglu": Shape((1, 17, 1, 76), 20, kernel=(1, 1), terms=EVERY_TERM, gated=True),
}
SMALL = {name: shape for name, shape in SHAPES.items() if name != "model"}
GPU = {"model": SHAPES["model"], "odd": SHAPES["odd"]}
FORMS = {name: SHAPES[name] for name in ("down", "up", "frames", "linear", "norm", "affine")}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU, "forms": FORMS}

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape=SHAPES["odd"], dtype=torch.float32, device="cpu"):
    """Keyword arguments of a call."""
    random = torch.Generator().manual_seed(sum(shape.x) + shape.columns)
    normal = lambda *size: torch.randn(*size, generator=random).to(device)  # noqa: E731
    pictures, height, width, channels = shape.x
    total, rows = channels + shape.second, shape.columns * (1 + shape.gated)
    taps = shape.kernel[0] * shape.kernel[1]
    padding = tuple(size // 2 for size in shape.kernel)
    out = [
        (size * shape.upsample + 2 * pad - kernel) // shape.stride + 1
        for size, pad, kernel in zip((height, width), padding, shape.kernel, strict=True)
    ]
    everything = {
        "bias": normal(rows),
        # rows of a wider table
        "shift": normal(shape.runs, 2 * shape.columns)[:, shape.columns :],
        "residual": normal(pictures, *out, shape.columns).to(dtype),
        "coefficients": normal(shape.runs, total, 2),
    }
    second = normal(pictures, height, width, shape.second).to(dtype) if shape.second else None
    return {
        "x": normal(*shape.x).to(dtype),
        "weight": (normal(rows, *shape.kernel, total) * (taps * total) ** -0.5).to(dtype),
        **{name: everything[name] for name in shape.terms},
        "second": second,
        "stride": shape.stride,
        "padding": padding,
        "upsample": shape.upsample,
        "silu": shape.silu,
        "gated": shape.gated,
    }


def in_own_dtype(case):
    """The formula in plain PyTorch: every operation rounds to the dtype of x."""
    dtype, pictures = case["x"].dtype, len(case["x"])
    of_pictures = lambda rows: rows.to(dtype).repeat_interleave(pictures // len(rows), 0)  # noqa: E731
    x = case["x"] if case["second"] is None else torch.cat([case["x"], case["second"]], -1)
    if "coefficients" in case:
        scale, offset = of_pictures(case["coefficients"])[:, None, None].unbind(-1)
        x = scale * x + offset
        x = F.silu(x) if case["silu"] else x
    x = x.permute(0, 3, 1, 2)
    x = F.interpolate(x, scale_factor=2.0) if case["upsample"] == 2 else x
    weight = case["weight"].permute(0, 3, 1, 2)
    y = F.conv2d(x, weight, None, case["stride"], case["padding"]).permute(0, 2, 3, 1)
    y = y + case["bias"].to(dtype) if "bias" in case else y
    if case["gated"]:
        value, gate = y.chunk(2, -1)
        y = value * F.gelu(gate)
    y = y + of_pictures(case["shift"])[:, None, None] if "shift" in case else y
    return y + case["residual"] if "residual" in case else y


def assert_matches(case, backend, place=as_it_is, **options):
    exact = implicit_gemm_reference(**doubled(case))
    out = place(torch.empty(exact.shape, dtype=case["x"].dtype, device=case["x"].device))
    assert implicit_gemm(**case, out=out, backend=backend, **options) is out
    assert_as_close_as_pytorch(out, exact, in_own_dtype(case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend; twice, for what the first call leaves behind."""
    cases = list(itertools.product(shapes.values(), dtypes))
    for shape, dtype in cases:
        case = placed(make_case(shape, dtype, device), place)
        first = assert_matches(case, backend, place)
        assert torch.equal(first, assert_matches(case, backend, place))
    return len(cases)


def run_torch(device, dtypes=ALL_DTYPES):
    """Products of torch's own libraries, rounded, and what they leave out, where they suit."""
    for shape, dtype in itertools.product(SHAPES.values(), dtypes):
        case = make_case(shape, dtype, device)
        exact = implicit_gemm_reference(**doubled(case))
        bare = {name: value for name, value in doubled(case).items() if name not in EVERY_TERM}
        alone = implicit_gemm_reference(**bare)
        exact += alone.to(dtype) - alone
        out = torch.empty(exact.shape, dtype=dtype, device=device)
        tables = {"bias": None, "shift": None, "residual": None, "coefficients": None}
        product = Product(**{**tables, **case}, out=out)
        if product.suits_torch:
            _run_torch(product)
            assert_as_close_as_pytorch(out, exact, in_own_dtype(case))


def run_tiles(device, monkeypatch, dtype):
    """Each tile, whatever the shape; with K in several runs where the tile allows it."""
    tables = {
        "split": gemm_tiles.TILES if dtype.itemsize == 2 else gemm_tiles.FP32_TILES,
        "geglu": gemm_tiles.GATED_TILES if dtype.itemsize == 2 else gemm_tiles.FP32_TILES,
    }
    for name, tiles in tables.items():
        case = make_case(SHAPES[name], dtype, device)
        for tile in tiles:
            monkeypatch.setattr(gemm_tiles, "tiles_for", lambda size, tile=tile: [tile])
            first = assert_matches(case, "triton")
            assert torch.equal(first, assert_matches(case, "triton")), tile


@all_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_implicit_gemm_matches_reference(dtype, shape, place):
    assert_matches(placed(make_case(shape, dtype), place), "reference", place)


@all_dtypes
def test_out_dtype(dtype):
    case = make_case(dtype=dtype)
    out = implicit_gemm(**case, out_dtype=torch.float32, backend="reference")
    assert torch.equal(out, implicit_gemm_reference(**case))


def test_reference_is_the_layers():
    """A convolution of torch's, doubled pixels and a linear layer, by their own names."""
    x, weight, bias = torch.randn(2, 6, 5, 8), torch.randn(4, 8, 3, 3), torch.randn(4)
    rows = weight.permute(0, 2, 3, 1).contiguous()
    picture = x.permute(0, 3, 1, 2)
    for upsample, stride in ((1, 1), (1, 2), (2, 1)):
        doubled_picture = F.interpolate(picture, scale_factor=float(upsample))
        y = F.conv2d(doubled_picture, weight, bias, stride, 1)
        out = implicit_gemm_reference(
            x, rows, bias, stride=stride, padding=(1, 1), upsample=upsample
        )
        torch.testing.assert_close(out, y.permute(0, 2, 3, 1))
    weight = torch.randn(6, 8)
    out = implicit_gemm_reference(x, weight[:, None, None])
    torch.testing.assert_close(out, F.linear(x, weight))


def test_implicit_gemm_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="triton"):
    case = make_case(device=device)
    out = torch.empty(3, 7, 5, 11, device=device)
    names = ("x", "weight", "bias", "second", "stride", "padding", "upsample", "shift", "residual")
    arguments = (*map(case.get, names), None, False, False, backend, out)
    torch.library.opcheck(torch.ops.vfengine.implicit_gemm.default, arguments)


def test_rejects_what_the_kernel_cannot_take():
    case = make_case()
    x, weight, out = case["x"], case["weight"], torch.empty(3, 7, 5, 11)
    pairs = torch.zeros(3, 29, 2)
    for change, error, words in (
        ({"x": x.double()}, TypeError, "x must be fp32, fp16 or bf16"),
        ({"x": 1.0}, TypeError, "x must be a tensor"),
        ({"x": x[0]}, ValueError, r"x must be \[B, H, W, C\]"),
        ({"x": x[:0]}, ValueError, "not empty"),
        ({"x": x.transpose(1, 2)}, ValueError, "x must be contiguous"),
        ({"weight": weight.half()}, TypeError, "weight must be torch.float32"),
        ({"weight": weight[..., :28]}, ValueError, r"weight must be \[11, 3, 3, 29\]"),
        ({"weight": weight[:, :2]}, ValueError, "a kernel 3x3, 1x1 or 3x1"),
        ({"weight": weight.transpose(1, 2)}, ValueError, "weight must be contiguous"),
        ({"bias": torch.zeros(12)}, ValueError, r"bias must be \[11\]"),
        ({"bias": case["bias"].half()}, TypeError, "bias must be torch.float32"),
        ({"second": x[:2]}, ValueError, r"second must be \[3, 7, 5, 20\]"),
        ({"second": x[:0]}, ValueError, "second must be"),
        ({"stride": 3}, ValueError, "stride and upsample must be 1 or 2, got 3 and 1"),
        ({"upsample": 2.5}, TypeError, "upsample must be an int, got float"),
        ({"upsample": 3}, ValueError, "got 1 and 3"),
        ({"padding": (1, 2)}, ValueError, r"padding must be two of 0 and 1, got \(1, 2\)"),
        ({"shift": torch.zeros(2, 11)}, ValueError, r"shift must be \[R, 11\] where R divides 3"),
        ({"shift": torch.zeros(3, 22)[:, ::2]}, ValueError, "rows of shift must be contiguous"),
        ({"shift": case["shift"].half()}, TypeError, "shift must be torch.float32"),
        ({"shift": case["shift"].to("meta")}, ValueError, "shift must be on cpu"),
        ({"residual": out[:, :2]}, ValueError, r"residual must be \[3, 7, 5, 11\]"),
        ({"coefficients": pairs[..., :1]}, ValueError, r"coefficients must be \[R, 29, 2\]"),
        ({"silu": True}, ValueError, "silu needs coefficients"),
        ({"gated": True}, ValueError, "gated takes weight"),
        ({"out": out[:1]}, ValueError, r"out must be \[3, 7, 5, 11\]"),
        ({"out": out, "out_dtype": torch.half}, TypeError, "out must be torch.float16"),
        ({"out_dtype": torch.double}, TypeError, "out must be fp32, fp16 or bf16"),
        ({"out": case["residual"]}, ValueError, "out shares memory with residual"),
        ({"x": x.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "auto"}, ValueError, "no kernel for CPU tensors, say backend='reference'"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton"),
    ):
        with pytest.raises(error, match=words):
            implicit_gemm(**{**case, "backend": "reference", **change})


def test_rejects_a_kernel_larger_than_its_picture():
    with pytest.raises(ValueError, match="larger than x, padded"):
        implicit_gemm(torch.zeros(1, 2, 2, 4), torch.zeros(4, 3, 3, 4), backend="reference")
