"""model_input against its reference: vfengine/ops/model_input.py, kernels/model_input.py."""

import itertools

import generator_cases
import pytest
import torch
import torch.nn.functional as F
from generator_cases import SHAPES, clip_case
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    placed,
)

from vfengine.ops import model_input, model_input_reference

SETS = generator_cases.SETS

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape=SHAPES["odd"], dtype=torch.float32, device="cpu"):
    """Keyword arguments of a call; the UNet of a clip in fp32 is in bf16."""
    (batch, frames, channels, height, width), patch, kind, guided = shape
    case = clip_case(shape[0], dtype, device)
    conditioned = kind == "residual"
    inputs = channels * patch**2 * (2 if conditioned else 1)
    size = (batch * frames * (2 if guided else 1), height // patch, width // patch)
    like = {"dtype": torch.bfloat16 if dtype is torch.float32 else dtype, "device": device}
    out = torch.full((*size, -(-inputs // 16) * 16), float("nan"), **like)
    return {**case, "out": out, "conditioned": conditioned}


def in_own_dtype(z, coeffs, step, out, conditioned):
    """The formula of vfengine/models/denoisers.py, rounding to out's dtype as a UNet does."""
    unit, scale = coeffs[int(step), :, :2].unbind(-1)
    frames = z * unit.view(-1, 1, 1, 1)
    base = frames[:, z.shape[1] // 2, None] if conditioned else 0.0
    x = (frames - base) * scale.view(-1, 1, 1, 1)
    x = torch.cat([x, (base * 2).expand_as(frames)], 2) if conditioned else x
    return F.pixel_unshuffle(x.flatten(0, 1).to(out.dtype), z.shape[-1] // out.shape[2])


def assert_matches(case, backend, place=as_it_is):
    z, coeffs, step, out = (case[name] for name in ("z", "coeffs", "step", "out"))
    assert model_input(**case, backend=backend) is out
    assert not out.isnan().any()
    options = {"patch_size": z.shape[-1] // out.shape[2], "conditioned": case["conditioned"]}
    exact = model_input_reference(z.double(), coeffs, step, **options)
    peer = in_own_dtype(**case).permute(0, 2, 3, 1)
    for copy in out.split(len(exact)):
        assert_as_close_as_pytorch(copy[..., : exact.shape[-1]], exact, peer)
        assert not copy[..., exact.shape[-1] :].any()
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), dtypes))
    for shape, dtype in cases:
        assert_matches(placed(make_case(shape, dtype, device), place), backend)
    return len(cases)


@all_dtypes
@all_shapes
def test_model_input_is_what_a_unet_sees(dtype, shape):
    assert_matches(make_case(shape, dtype), "reference")


def test_a_step_outside_the_coefficients_is_refused():
    case = make_case()
    case["step"].fill_(3)
    with pytest.raises(ValueError, match="step 3 lies outside coeffs, which has 3 rows"):
        model_input(**case, backend="reference")


def test_model_input_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    arguments = [case[name] for name in ("z", "coeffs", "step", "conditioned")]
    op = torch.ops.vfengine.model_input.default
    torch.library.opcheck(op, (*arguments, backend, torch.zeros_like(case["out"])))


def test_rejects_other_dtype_shape_strides_and_device():
    case = make_case()
    z, coeffs, out = case["z"], case["coeffs"], case["out"]
    for change, error, words in (
        ({"z": z.double()}, TypeError, "z must be fp32, fp16 or bf16"),
        ({"z": 1.0}, TypeError, "z must be a tensor"),
        ({"out": out.double()}, TypeError, "out must be fp32, fp16 or bf16"),
        ({"coeffs": coeffs.double()}, TypeError, "coeffs must be torch.float32"),
        ({"z": z[0]}, ValueError, r"z must be \[B, N, C, H, W\]"),
        ({"z": z.transpose(3, 4)}, ValueError, "z must be contiguous"),
        ({"coeffs": coeffs[:, :3]}, ValueError, r"coeffs must be \[3, 5, 5\]"),
        ({"step": coeffs[0, 0, :1]}, TypeError, "step must be torch.int32"),
        ({"out": out[:3]}, ValueError, r"out must be \[10 or 20, 6/p, 10/p, K\], got \[3,"),
        ({"out": out[:, :2]}, ValueError, "out must be"),
        ({"out": out[..., :16].contiguous()}, ValueError, "24 channels or more, got 16"),
        ({"out": out[..., :24]}, ValueError, "out must be contiguous"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"z": z.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "auto"}, ValueError, "no kernel for CPU tensors, say backend='reference'"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cpu"}, ValueError, "only kernels for triton"),
    ):
        with pytest.raises(error, match=words):
            model_input(**{**case, "backend": "reference", **change})
