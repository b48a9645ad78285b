"""Products of rows (csrc/cpu/gemm/row_matmul.cpp).

Every case runs on every instruction set of this machine, in fp32 and bf16.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import test_layer_norm
import torch
import torch.nn.functional as F
from kernel_cases import SMALL, as_it_is, assert_as_close_as_pytorch
from seeded import normal
from torch import Tensor

from vfengine.native import vfengine_native
from vfengine.plan import gather as taps
from vfengine.plan import packing as packed
from vfengine.plan.builder import Builder, Source
from vfengine.plan.packing import pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW_OPS = ("group_norm_silu", "geglu", "spatial_attention", "temporal_attention")


@dataclass
class Case:
    """Inputs in fp32; `formula` computes the result from them in their dtype, with PyTorch.

    sources: (rows, table, rows of an item) of each
    bias:    [columns], or [items, columns] with `shared` rows of the result each
    """

    sources: list[tuple[Tensor, Tensor | None, int]]
    weight: Tensor
    formula: Callable[..., Tensor]  # (sources, weight, bias)
    bias: Tensor | None = None
    shared: int = 0
    rows: int | None = None
    item_rows: int | None = None
    options: dict = field(default_factory=dict)

    def exact(self, dtype: torch.dtype, compute: torch.dtype, residual: Tensor | None) -> Tensor:
        """In `compute`, of what a product in `dtype` is given."""
        given = [x.to(dtype).to(compute) for x, _, _ in self.sources]
        bias = None if self.bias is None else self.bias.to(compute)
        out = self.formula(given, self.weight.to(dtype).to(compute), bias)
        return out if residual is None else out + residual.to(dtype).to(compute)


def multiply(case: Case, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
    """The case in a program of its own; the residual's place becomes the result's."""
    build = Builder(dtype)
    sources = [Source(build.rows(*x.shape), *read) for x, *read in case.sources]
    single = case.bias is None or case.bias.dim() == 1
    weights = pack(case.weight, case.bias if single else None, dtype, case.options.get("epilogue"))
    options = {name: v for name, v in case.options.items() if name != "epilogue"}
    table = None
    if not single:  # in the middle of wider rows, as a network's embeddings are
        table = build.rows(len(case.bias), case.bias.shape[1] + 5, torch.float32)
        options["bias"] = (table, 3, case.shared)
    if residual is not None:
        options["residual"] = options["out"] = build.rows(*residual.shape)
    if case.item_rows is not None:
        options["items"] = (case.rows // case.item_rows, case.item_rows)
    out = build.matmul(sources, weights, **options)
    program = build.program()
    for source, (x, _, _) in zip(sources, case.sources, strict=True):
        program.view(source.rows).copy_(x)
    if table is not None:
        program.view(table).fill_(float("nan"))[:, 3:-2] = case.bias
    if residual is not None:
        program.view(out).copy_(residual)
    program.run()
    return program.view(out).clone()


def linear(rows: int, depth: int, columns: int, **changes) -> Case:
    return Case(
        [(normal(rows, depth), None, 0)],
        normal(columns, depth, seed=2) / depth**0.5,
        lambda x, weight, bias: F.linear(x[0], weight, bias),
        **changes,
    )


def shared_bias(rows: int, depth: int, columns: int, shared: int) -> Case:
    case = linear(rows, depth, columns, bias=normal(rows // shared, columns, seed=3), shared=shared)
    case.formula = lambda x, weight, bias: (
        F.linear(x[0], weight) + bias.repeat_interleave(shared, 0)
    )
    return case


def gated(rows: int, depth: int, columns: int) -> Case:
    def formula(x, weight, bias):
        value, gate = F.linear(x[0], weight, bias).chunk(2, -1)
        return value * F.gelu(gate)

    case = linear(rows, depth, 2 * columns, bias=normal(2 * columns, seed=3))
    case.formula, case.options = formula, {"epilogue": "geglu"}
    return case


def activated(rows: int, depth: int, columns: int, name: str) -> Case:
    activation = {"gelu": F.gelu, "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h)}[name]
    case = linear(rows, depth, columns, bias=normal(columns, seed=3))
    case.formula = lambda x, weight, bias: activation(F.linear(x[0], weight, bias))
    case.options = {"epilogue": name}
    return case


def convolution(
    size: tuple[int, int],
    channels: tuple[int, int],
    table: Tensor,
    stride: int = 1,
    images: int = 2,
    joined: tuple[int, ...] = (),
    before: int = 1,
    **changes,
) -> Case:
    """3x3; with 1x1 of `joined` sources of these widths, at the result's resolution.

    before: rows and columns of zeros above and to the left; there is one of each at the other sides
    """
    height, width = size
    kernel = normal(channels[1], channels[0], 3, 3, seed=2) / (3 * channels[0] ** 0.5)
    conv = torch.nn.Conv2d(*channels, 3)
    conv.weight.data = kernel
    weight = torch.cat(
        [packed.conv_weight(conv, torch.float32, even=True)]
        + [normal(channels[1], c, seed=4) / c**0.5 for c in joined],
        1,
    )
    pixels = table.shape[1]
    even = channels[0] + channels[0] % 2
    rows = F.pad(normal(images * height * width, channels[0]), (0, channels[0] % 2))
    others = [(normal(images * pixels, c, seed=5 + i), None, 0) for i, c in enumerate(joined)]

    def formula(x, weight, bias):
        picture = x[0].view(images, height, width, even).permute(0, 3, 1, 2)
        taps, *points = weight.split([9 * even, *joined], 1)
        taps = taps.reshape(channels[1], 3, 3, even).permute(0, 3, 1, 2)
        per_image = bias is not None and bias.dim() == 2
        picture = F.pad(picture, (before, 1, before, 1))
        out = F.conv2d(picture, taps, None if per_image else bias, stride)
        if per_image:
            out = out + bias[:, :, None, None]
        out = out.permute(0, 2, 3, 1).reshape(-1, channels[1])
        return out + sum(F.linear(*pair) for pair in zip(x[1:], points, strict=True))

    sources = [(rows, table, height * width), *others]
    return Case(sources, weight, formula, rows=images * pixels, item_rows=pixels, **changes)


def in_time(clips: int, frames: int, pixels: int, channels: int, columns: int) -> Case:
    """Three neighbouring frames of each pixel."""
    weight = normal(columns, 3 * channels, seed=2) / (3 * channels) ** 0.5

    def formula(x, weight, bias):
        clip = x[0].view(clips, frames, pixels, channels).permute(0, 3, 1, 2)
        kernel = weight.view(columns, 3, channels).permute(0, 2, 1)[..., None]
        out = F.conv2d(clip, kernel.contiguous(), bias, padding=(1, 0))
        return out.permute(0, 2, 3, 1).reshape(-1, columns)

    count = clips * frames * pixels
    table = taps.neighbours(frames, pixels)
    source = (normal(count, channels), table, frames * pixels)
    bias = normal(columns, seed=3)
    return Case([source], weight, formula, bias, rows=count, item_rows=frames * pixels)


CASES = {
    "linear": lambda: linear(50, 48, 64, bias=normal(64, seed=3)),
    "one row": lambda: linear(1, 34, 40),
    "one column": lambda: linear(7, 6, 1, bias=normal(1, seed=3)),
    "odd widths": lambda: linear(13, 22, 71, bias=normal(71, seed=3)),
    "least depth": lambda: linear(9, 2, 17),
    "eight rows": lambda: linear(8, 32, 33),
    "many rows": lambda: linear(1201, 18, 27, bias=normal(27, seed=3)),
    "many columns": lambda: linear(5, 26, 1000),
    "deep": lambda: linear(17, 2600, 37, bias=normal(37, seed=3)),
    "shared bias": lambda: shared_bias(36, 16, 21, 6),
    "geglu": lambda: gated(50, 24, 40),
    "geglu, odd": lambda: gated(7, 10, 19),
    "geglu, one row": lambda: gated(1, 64, 72),
    "gelu": lambda: activated(50, 24, 40, "gelu"),
    "gelu, odd": lambda: activated(7, 10, 19, "gelu"),
    "quick gelu": lambda: activated(50, 24, 40, "quick_gelu"),
    "quick gelu, odd": lambda: activated(7, 10, 19, "quick_gelu"),
    "3x3": lambda: convolution((6, 5), (16, 24), taps.same(6, 5), bias=normal(24, seed=3)),
    "3x3, odd channels": lambda: convolution((5, 7), (3, 13), taps.same(5, 7)),
    "3x3 of one pixel": lambda: convolution((1, 1), (8, 9), taps.same(1, 1)),
    "3x3 of one row": lambda: convolution((1, 6), (8, 20), taps.same(1, 6)),
    "stride 2": lambda: convolution((6, 8), (16, 16), taps.halved(6, 8), stride=2),
    "stride 2, odd size": lambda: convolution(
        (7, 5), (10, 18), taps.halved(7, 5), stride=2, bias=normal(18, seed=3), images=3
    ),
    "stride 2, zeros at one side": lambda: convolution(
        (6, 8), (10, 18), taps.halved_after(6, 8), stride=2, before=0
    ),
    "3x3, a bias for each image": lambda: convolution(
        (5, 5), (12, 20), taps.same(5, 5), bias=normal(2, 20, seed=3), shared=25
    ),
    "3x3 and 1x1": lambda: convolution((4, 6), (12, 20), taps.same(4, 6), joined=(6,)),
    "3x3 and two of 1x1": lambda: convolution(
        (5, 3), (8, 33), taps.same(5, 3), joined=(14, 2), bias=normal(33, seed=3)
    ),
    "3x3 in parts": lambda: convolution(
        (3, 4), (1280, 35), taps.same(3, 4), bias=normal(35, seed=3)
    ),
    "temporal": lambda: in_time(2, 5, 6, 16, 24),
    "temporal, one frame": lambda: in_time(2, 1, 3, 8, 9),
    "temporal, two frames": lambda: in_time(1, 2, 7, 6, 40),
}


@pytest.fixture(params=vfengine_native.cpu_isas)
def isa(request):
    """Every instruction set of this machine in turn."""
    former = vfengine_native.cpu_isa()
    vfengine_native.set_cpu_isa(request.param)
    yield request.param
    vfengine_native.set_cpu_isa(former)


@pytest.fixture
def threads():
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)


all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
all_cases = pytest.mark.parametrize("name", CASES)


@all_dtypes
@all_cases
def test_row_matmul_matches_pytorch(name, dtype, isa):
    case = CASES[name]()
    exact, out = case.exact(dtype, torch.float64, None), multiply(case, dtype)
    if (
        dtype is torch.float32 and name == "geglu, one row"
    ):  # too few numbers to compare largest ones
        error = (out.double() - exact).abs().max()
        bound = torch.finfo(dtype).eps / 2 * case.weight.shape[1] ** 0.5 * exact.abs().max()
        assert error <= bound, f"{error:.3g}, bound {bound:.3g}"
    else:
        assert_as_close_as_pytorch(out, exact, case.exact(dtype, dtype, None))


@all_dtypes
@pytest.mark.parametrize(
    "name", ["linear", "odd widths", "geglu, odd", "gelu, odd", "3x3 and 1x1", "temporal"]
)
def test_row_matmul_adds_to_a_residual_in_place(name, dtype, isa):
    case = CASES[name]()
    columns = len(case.weight) // (2 if case.options.get("epilogue") == "geglu" else 1)
    residual = normal(case.rows or len(case.sources[0][0]), columns, seed=9)
    exact = case.exact(dtype, torch.float64, residual)
    out = multiply(case, dtype, residual)
    assert_as_close_as_pytorch(out, exact, case.exact(dtype, dtype, residual))


@pytest.mark.parametrize("name", ["linear", "odd widths", "one row", "3x3 in parts"])
def test_row_matmul_keeps_fp32_of_bf16_rows(name, isa):
    case = CASES[name]()
    case.options = {"out_dtype": torch.float32}
    out = multiply(case, torch.bfloat16)
    assert out.dtype is torch.float32
    exact = case.exact(torch.bfloat16, torch.float64, None)
    error = (out.double() - exact).norm() / exact.norm()
    assert error <= 5e-8 * case.weight.shape[1] ** 0.5


@all_dtypes
def test_row_matmul_scatters_the_quarters_of_an_upsampling(dtype, isa):
    images, height, width, channels, columns = 2, 3, 5, 12, 21
    build = Builder(dtype)
    x = build.rows(images * height * width, channels)
    out = build.rows(4 * x.count, columns)
    bias, kernels = normal(columns, seed=3), {}
    for index, (i, j) in enumerate(taps.QUARTERS):
        weight = normal(columns, 4 * channels, seed=4 + index) / (4 * channels) ** 0.5
        kernels[i, j] = weight.to(dtype)
        table, places = taps.quarter(height, width, i, j)
        build.matmul(
            [Source(x, table, height * width)],
            pack(weight, bias, dtype),
            items=(images, height * width),
            out=out,
            scatter=(places, 4 * height * width),
        )
    program = build.program()
    program.view(x).copy_(normal(x.count, channels))
    program.view(out).fill_(float("nan"))
    program.run()
    picture = program.view(x).view(images, height, width, channels).permute(0, 3, 1, 2)

    def in_dtype(compute):
        whole = torch.empty(images, 2 * height, 2 * width, columns, dtype=compute)
        for (i, j), weight in kernels.items():
            padded = F.pad(picture.to(compute), (1 - j, j, 1 - i, i))
            kernel = weight.to(compute).view(columns, 2, 2, channels).permute(0, 3, 1, 2)
            part = F.conv2d(padded, kernel.contiguous(), bias.to(compute))
            whole[:, i::2, j::2] = part.permute(0, 2, 3, 1)
        return whole.flatten(0, 2)

    assert_as_close_as_pytorch(program.view(out), in_dtype(torch.float64), in_dtype(dtype))


@all_dtypes
@all_cases
def test_row_matmul_is_the_same_on_any_number_of_threads(name, dtype, threads):
    case, results = CASES[name](), []
    for count in (1, 2, 3):
        threads(count)
        results.append(multiply(case, dtype))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@all_dtypes
def test_row_matmul_of_a_row_does_not_depend_on_the_others(dtype):
    whole = linear(23, 2600, 37)
    out = multiply(whole, dtype)
    for first, last in ((0, 1), (3, 5), (4, 8), (10, 23)):
        part = linear(23, 2600, 37)
        part.sources = [(whole.sources[0][0][first:last], None, 0)]
        assert torch.equal(multiply(part, dtype), out[first:last])


@pytest.mark.parametrize("op", ROW_OPS)
def test_row_ops_match_their_references(op, isa):
    """Also bf16 products, which most instruction sets emulate."""
    module = importlib.import_module(f"test_{op}")
    shapes = getattr(module, "SETS", {"small": SMALL})["small"]
    assert module.run_cases("cpu", shapes, "cpu", as_it_is) > 0


@all_dtypes
@pytest.mark.parametrize("shape", test_layer_norm.SMALL.values(), ids=test_layer_norm.SMALL)
def test_layer_norm_matches_its_reference(shape, dtype, isa):
    test_layer_norm.assert_matches(test_layer_norm.make_case(shape, dtype), "cpu")


# -- memory ----------------------------------------------------------------------------------------


def test_the_native_product_refuses_more_than_it_has_room_for():
    def arguments(count, taps=1):
        source = vfengine_native.RowSource(x=0, stride=2, width=2, taps=taps, item_rows=1)
        rest = {"rows": 1, "item_rows": 1, "columns": 1, "out_stride": 1, "dtype": 0}
        return vfengine_native.RowMatmulArgs(sources=(source,) * count, weights=0, out=0, **rest)

    for count in (0, 4):
        with pytest.raises(TypeError, match="RowMatmulArgs: sources must be 1 to 3 of RowSource"):
            arguments(count)
    with pytest.raises(ValueError, match="row_matmul: too many taps, 66"):
        vfengine_native.row_matmul_cpu(arguments(3, taps=22), 1)


def test_row_kernels_stay_within_their_memory():
    """Each buffer ends where an inaccessible page begins."""
    script = Path(__file__).with_name("guarded_rows.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert child.returncode == 0, f"returncode {child.returncode}\n{child.stdout}{child.stderr}"
    assert child.stdout.split() == list(vfengine_native.cpu_isas)
