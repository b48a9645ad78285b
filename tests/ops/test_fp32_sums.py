"""fp32 sums of the CPU kernels err by a few roundings however deep they are, on every ISA.

Errors are relative (L2) against fp64, of given numbers, so that they do not depend on what else
this machine computes with. A plain chain of additions errs with the root of its length: at 9,216
terms by 17 eps.
"""

import copy
import functools
import statistics

import pytest
import torch
import torch.nn.functional as F
from seeded import filled, normal
from test_planned import VIDEO, cast, plan
from test_row_kernels import convolution, isa, linear, multiply  # noqa: F401  isa is a fixture
from test_winograd import convolve
from torch import Tensor

from vfengine import ops
from vfengine.models import UNet
from vfengine.plan import gather as taps

EPS = torch.finfo(torch.float32).eps
DEPTHS = (128, 129, 1024, 9216, 20480)


def error(out: Tensor, exact: Tensor) -> float:
    """In units of EPS."""
    return float((out.double() - exact).norm() / exact.norm()) / EPS


@pytest.mark.parametrize("depth", DEPTHS)
def test_products_of_any_depth(depth, isa):  # noqa: F811
    case = linear(25, depth, 70, bias=normal(70, seed=3))
    exact = case.exact(torch.float32, torch.float64, None)
    assert error(multiply(case, torch.float32), exact) < 4


@pytest.mark.parametrize("depth", DEPTHS)
def test_products_of_any_depth_of_one_sign(depth, isa):  # noqa: F811
    case = linear(25, depth, 70)
    case.sources = [(case.sources[0][0].abs(), None, 0)]
    case.weight = case.weight.abs()
    exact = case.exact(torch.float32, torch.float64, None)
    assert error(multiply(case, torch.float32), exact) < 2


@pytest.mark.parametrize("channels, joined", [(1024, ()), (1000, (700,))])
def test_convolutions_of_many_channels(channels, joined, isa):  # noqa: F811
    """9,216 terms; and runs that end within taps and go on in another source."""
    case = convolution((5, 3), (channels, 70), taps.same(5, 3), joined=joined)
    exact = case.exact(torch.float32, torch.float64, None)
    assert error(multiply(case, torch.float32), exact) < 4


@pytest.mark.parametrize("flat", [False, True], ids=["3x3", "frames"])
def test_winograd_of_many_channels(flat, isa):  # noqa: F811
    out, _, exact = convolve((1, 6, 6, 640, 70, flat), torch.float32)
    assert error(out, exact) < 4


@pytest.mark.parametrize("keys", [128, 4096, 16384])
def test_attention_to_many_keys(keys, isa):  # noqa: F811
    q, k, v = (normal(1, 20 if seed == 1 else keys, 2 * 32, seed=seed) for seed in (1, 2, 3))
    heads = (t.double().unflatten(-1, (2, 32)).transpose(1, 2) for t in (q, k, v))
    exact = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert error(ops.spatial_attention(q, k, v, 2, backend="cpu"), exact) < 5


@pytest.mark.parametrize("width", [112, 1280, 8192])
def test_layer_norm_of_wide_rows(width, isa):  # noqa: F811
    x = normal(9, width) + 3
    out = ops.layer_norm(x, backend="cpu")
    assert error(out, F.layer_norm(x.double(), (width,))) < 2.5


@pytest.mark.parametrize("pixels", [64, 4096, 16384])
def test_group_norm_of_many_pixels(pixels, isa):  # noqa: F811
    x = (normal(2, 16, pixels, 1) + 3).contiguous(memory_format=torch.channels_last)
    out = ops.group_norm_silu(x, 4, silu=False, backend="cpu")
    assert error(out, F.group_norm(x.double(), 4)) < 1


def test_an_image_is_summed_alike_in_any_batch(isa):  # noqa: F811
    """Its rows fall into other tiles, which skip other taps that are padding alone."""
    case = convolution((3, 7), (200, 70), taps.same(3, 7), images=4)
    whole, pixels = multiply(case, torch.float32), 21
    rows = case.sources[0][0]
    for first, count in ((1, 1), (2, 2), (1, 3)):
        part = slice(first * pixels, (first + count) * pixels)
        case.sources, case.rows = [(rows[part], taps.same(3, 7), pixels)], count * pixels
        assert torch.equal(multiply(case, torch.float32), whole[part])


@functools.cache
def amplified(count: int = 25) -> list[tuple[dict, Tensor, Tensor]]:
    """Inputs, the result in fp64, and that of fp64 sums rounded by every layer."""
    exact = filled(UNet(VIDEO)).double()
    rounding = copy.deepcopy(exact)
    for layer in rounding.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda *call: call[2].float().double())
    results = []
    for seed in range(count):
        values = {"x": normal(1, 128, 3, 2, 2, seed=seed), "t": torch.tensor([7])}
        given = cast(values, torch.float64)
        results.append((values, exact(**given), rounding(**given)))
    return results


@torch.no_grad()
def test_a_network_that_amplifies_roundings_errs_as_fp32_must(isa):  # noqa: F811
    """Compared with fp64 sums whose layers' results are rounded to fp32.

    Group norms over three nearly equal numbers can turn a single rounding into an error of 1e-5, so
    that the median over several inputs counts.
    """
    planned = plan(filled(UNet(VIDEO)))
    ours = [error(planned(**values), exact) for values, exact, _ in amplified()]
    rounded = [error(rounding, exact) for _, exact, rounding in amplified()]
    assert statistics.median(ours) < 2 * statistics.median(rounded)
