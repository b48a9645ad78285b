"""temporal_attention against its reference: vfengine/ops/temporal_attention.py, csrc, kernels."""

import itertools

import pytest
import torch
from kernel_cases import (
    ALL_DTYPES,
    all_dtypes,
    as_it_is,
    assert_as_close_as_pytorch,
    doubled,
    misaligned,
    placed,
)

from vfengine.ops import temporal_attention, temporal_attention_reference

# B, N, P, H, D
SHAPES = {
    "model": (2, 16, 16, 2, 32),
    "odd": (1, 5, 7 * 11, 1, 40),
    "tiny": (1, 1, 1, 1, 8),
    "single_frame": (2, 1, 4, 2, 64),
    "two_frames": (1, 2, 3, 2, 72),
    "most_frames": (1, 128, 1, 1, 64),
    "largest_head": (1, 19, 2, 1, 256),
}
SMALL = {
    **{name: shape for name, shape in SHAPES.items() if name not in ("model", "most_frames")},
    "odd": (1, 5, 11, 3, 40),
    "tiles_of_keys": (1, 37, 1, 1, 64),
}
RACE = {"race": (1, 3, 1, 1, 8), "two_tiles": (1, 17, 1, 1, 8)}
GPU = {"model": SHAPES["model"], "odd": SHAPES["odd"]}
SETS = {"all": SHAPES, "small": SMALL, "race": RACE, "gpu": GPU}

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape=SMALL["odd"], dtype=torch.float32, biased=True, device="cpu"):
    """Keyword arguments of a call."""
    batch, frames, pixels, heads, head_dim = shape
    random = torch.Generator().manual_seed(sum(shape))
    qkv = torch.randn(batch, frames, pixels, 3 * heads * head_dim, generator=random)
    case = {"qkv": qkv.to(device, dtype), "num_heads": heads}
    if biased:
        case["bias"] = 2 * torch.randn(heads, frames, frames, generator=random).to(device)
    return case


def in_own_dtype(qkv, num_heads, bias=None):
    """The formula in plain PyTorch (vfengine/ops/attention.py, "math")."""
    rows = qkv.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 2, 4, 1, 5)  # [3, B, P, H, N, D]
    q, k, v = rows.unbind(0)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    y = logits.float().softmax(-1).to(v.dtype) @ v
    return y.permute(0, 3, 1, 2, 4).flatten(-2)


def assert_matches(case, backend, place=as_it_is):
    qkv = case["qkv"]
    out = place(torch.empty_like(qkv[..., : qkv.shape[-1] // 3].contiguous()))
    assert temporal_attention(**case, out=out, backend=backend) is out
    exact = temporal_attention_reference(**doubled(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend, with and without bias."""
    cases = list(itertools.product(shapes.values(), dtypes, (True, False)))
    for shape, dtype, biased in cases:
        assert_matches(placed(make_case(shape, dtype, biased, device), place), backend, place)
    for dtype in dtypes:
        assert_masks(backend, dtype, device)
    return len(cases)


def assert_masks(backend, dtype, device="cpu"):
    """A bias of -inf hides frames, be it all of the first that a kernel looks at."""
    shape = (1, 33, 1, 1, 8)
    case = make_case(shape, dtype, device=device)
    case["bias"][:, 3, :32] = float("-inf")
    case["bias"][:, 4] = float("-inf")
    out = temporal_attention(**case, backend=backend)
    torch.testing.assert_close(out[0, 3], case["qkv"][0, 32, :, 16:])
    assert out[0, 4].isnan().all(), "nothing to attend to"
    assert not out[0, 5:].isnan().any()


@all_dtypes
@all_shapes
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_temporal_attention_matches_reference(dtype, shape, biased, place):
    assert_matches(placed(make_case(shape, dtype, biased), place), "cpu", place)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bias_of_minus_infinity_hides_frames(dtype, backend):
    assert_masks(backend, dtype)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_large_logits_do_not_overflow(dtype, backend):
    case = make_case(SMALL["odd"], dtype)
    case["qkv"].mul_(50)
    out = temporal_attention(**case, backend=backend)
    assert out.isfinite().all()


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    out = temporal_attention(**case, backend="reference")
    assert torch.equal(out, temporal_attention_reference(**case).to(dtype))


def test_temporal_attention_registers():
    check_registration("cpu", "reference")


def check_registration(device, backend="auto"):
    case = make_case(device=device)
    arguments = (case["qkv"], case["bias"], 3, backend, torch.empty(1, 5, 11, 120, device=device))
    torch.library.opcheck(torch.ops.vfengine.temporal_attention.default, arguments)


def test_rejects_other_dtype_shape_strides_and_device():
    case = make_case()
    qkv, bias = case["qkv"], case["bias"]
    out = torch.empty(1, 5, 11, 120)
    for change, error, words in (
        ({"qkv": qkv.double()}, TypeError, "qkv must be fp32, fp16 or bf16"),
        ({"qkv": None}, TypeError, "qkv must be a tensor"),
        ({"bias": bias.half()}, TypeError, "bias must be torch.float32"),
        ({"out": out.half()}, TypeError, "out must be torch.float32"),
        ({"qkv": qkv[0]}, ValueError, r"qkv must be \[B, N, P, 3\*H\*D\]"),
        ({"num_heads": 7}, ValueError, "360 channels are not q, k, v of num_heads=7"),
        ({"num_heads": 30}, ValueError, "must be a multiple of 8, at most 256, got 4"),
        ({"qkv": qkv.transpose(1, 2)}, ValueError, "qkv must be contiguous"),
        ({"bias": bias[:, 1:]}, ValueError, r"bias must be \[3, 5, 5\]"),
        ({"out": out[..., 1:]}, ValueError, r"out must be \[1, 5, 11, 120\]"),
        ({"out": out.to("meta")}, ValueError, "out must be on cpu"),
        ({"out": qkv.view(-1)[: out.numel()].view(out.shape)}, ValueError, "out shares memory"),
        ({"qkv": torch.ones(1, 129, 1, 24), "num_heads": 1}, ValueError, "at most 128 frames"),
        ({"bias": bias.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' takes CUDA tensors"),
    ):
        with pytest.raises(error, match=words):
            temporal_attention(**{**case, **change})
