"""noise_estimate against its reference: vfengine/ops/noise_estimate.py, kernels."""

import itertools

import generator_cases
import pytest
import torch
import torch.nn.functional as F
from generator_cases import SHAPES, WEIGHTS, clip_case
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    placed,
)

from vfengine.ops import noise_estimate, noise_estimate_reference

SETS = generator_cases.SETS

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape=SHAPES["odd"], dtype=torch.float32, device="cpu"):
    """Keyword arguments of a call; some weights of blends are far out, where one image is all."""
    (batch, frames, channels, height, width), patch, kind, guided = shape
    size = (batch * frames * (2 if guided else 1), height // patch, width // patch)
    random = torch.Generator().manual_seed(height)
    rows = torch.randn(*size, (channels + WEIGHTS[kind]) * patch**2, generator=random)
    rows[..., channels * patch**2 :] *= 8
    case = {**clip_case(shape[0], dtype, device), "rows": rows.to(device)}
    return {**case, "guidance_scale": 2.5 if guided else 1.0}


def in_own_dtype(z, coeffs, step, rows, guidance_scale):
    """The formula of vfengine/models/denoisers.py: each operation rounds to the dtype of z."""
    images = F.pixel_shuffle(rows.permute(0, 3, 1, 2), z.shape[-1] // rows.shape[2]).to(z.dtype)
    numbers = coeffs[int(step)].to(z.dtype).unbind(-1)
    unit, _, shrink, signal, gain = (number.view(-1, 1, 1, 1) for number in numbers)
    guides = images.unflatten(0, (-1, *z.shape[:2]))
    parts = [estimated(z * unit, clip, shrink, signal, gain) for clip in guides]
    return parts[0] if len(parts) == 1 else torch.lerp(parts[1], parts[0], guidance_scale)


def estimated(frames, out, shrink, signal, gain):
    channels, m = frames.shape[2], frames.shape[1] // 2
    paint, weights = out[:, :, :channels], out[:, :, channels:]
    if weights.shape[2] == 0:
        return gain * frames + signal * paint
    if weights.shape[2] == 1:
        clean = torch.lerp(paint, frames * shrink, weights.sigmoid())
        return (frames - signal * clean) * gain
    base = frames[:, m : m + 1]
    _, seen, painted = weights.softmax(2).split(1, dim=2)
    change = seen * ((frames - base) * shrink) + painted * (paint - base)
    eps = (frames - base - signal * change) * gain
    eps[:, m] = 0
    return eps


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.full_like(case["z"], float("nan")))
    assert noise_estimate(**case, out=out, backend=backend) is out
    exact = noise_estimate_reference(**{**case, "z": case["z"].double()})
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), dtypes))
    for shape, dtype in cases:
        assert_matches(placed(make_case(shape, dtype, device), place), backend, place)
    return len(cases)


@all_dtypes
@all_shapes
def test_noise_estimate_is_as_exact_as_pytorch(dtype, shape):
    assert_matches(make_case(shape, dtype), "reference")


@pytest.mark.parametrize("guided", [False, True])
def test_the_base_frame_of_a_residual_clip_has_no_noise_of_its_own(guided):
    case = make_case(((2, 5, 3, 6, 10), 2, "residual", guided))
    out = noise_estimate(**case, backend="reference")
    assert not out[:, 2].any()
    assert out[:, [0, 1, 3, 4]].all()


def test_a_step_outside_the_coefficients_is_refused():
    case = make_case()
    case["step"].fill_(-1)
    with pytest.raises(ValueError, match="step -1 lies outside coeffs, which has 3 rows"):
        noise_estimate(**case, backend="reference")


def test_noise_estimate_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    arguments = [case[name] for name in ("z", "rows", "coeffs", "step", "guidance_scale")]
    op = torch.ops.vfengine.noise_estimate.default
    torch.library.opcheck(op, (*arguments, backend, torch.zeros_like(case["z"])))


def test_rejects_other_dtype_shape_strides_and_device():
    case = make_case()
    z, rows, coeffs = case["z"], case["rows"], case["coeffs"]
    for change, error, words in (
        ({"z": z.double()}, TypeError, "z must be fp32, fp16 or bf16"),
        ({"rows": None}, TypeError, "rows must be a tensor"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale must be a number"),
        ({"rows": rows.half()}, TypeError, "rows must be torch.float32"),
        ({"out": z.half()}, TypeError, "out must be torch.float32"),
        ({"z": z[:, :0]}, ValueError, "not empty"),
        ({"z": z.transpose(0, 1)}, ValueError, "z must be contiguous"),
        ({"coeffs": coeffs[..., :4]}, ValueError, r"coeffs must be \[3, 5, 5\]"),
        ({"step": torch.zeros((), dtype=torch.int32)}, ValueError, r"step must be \[1\]"),
        ({"rows": rows[:7]}, ValueError, r"rows must be \[10 or 20, 6/p, 10/p, K\], got \[7,"),
        ({"rows": rows[..., :20].contiguous()}, ValueError, r"one of \[12, 16, 24\] channels"),
        ({"rows": rows.transpose(1, 2)}, ValueError, "rows must be"),
        ({"out": z[:1].clone()}, ValueError, r"out must be \[2, 5, 3, 6, 10\]"),
        ({"out": z}, ValueError, "out shares memory with z"),
        ({"out": z.to("meta")}, ValueError, "out must be on cpu"),
        ({"z": z.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "auto"}, ValueError, "no kernel for CPU tensors, say backend='reference'"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton"),
    ):
        with pytest.raises(error, match=words):
            noise_estimate(**{**case, "backend": "reference", **change})
