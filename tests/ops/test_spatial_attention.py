"""spatial_attention against its reference: vfengine/ops/spatial_attention.py, csrc/cpu, kernels."""

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
)

from vfengine.ops import spatial_attention, spatial_attention_reference

# F, Sq, Sk, H, D
SHAPES = {
    "model": (8, 64, 64, 2, 32),
    "context": (3, 7 * 11, 77, 3, 40),
    "tiny": (1, 1, 1, 1, 8),
    "single_frame": (1, 100, 33, 2, 64),
    "one_key": (2, 9, 1, 2, 24),
    "many_keys": (1, 20, 1030, 1, 32),
    "largest_head": (2, 19, 70, 1, 256),
}
SMALL = {name: SHAPES[name] for name in ("context", "tiny", "one_key", "largest_head")}
GPU = {"model": SHAPES["model"], "odd": SHAPES["context"]}
SETS = {"all": SHAPES, "small": SMALL, "gpu": GPU}
FORMS = ("separate", "packed", "shared")

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(
    shape=SHAPES["context"], dtype=torch.float32, form="separate", device="cpu", place=as_it_is
):
    """Keyword arguments of a call.

    packed: q is part of rows with something beside it, k and v are halves of rows
    shared: and one frame of k and v serves all
    """
    frames, q_len, k_len, heads, head_dim = shape
    width = heads * head_dim
    random = torch.Generator().manual_seed(sum(shape))

    def rows(frames, length, width):
        return place(torch.randn(frames, length, width, generator=random).to(device, dtype))

    if form == "separate":
        q, k, v = (rows(frames, length, width) for length in (q_len, k_len, k_len))
    else:
        q = rows(frames, q_len, width + 24)[..., 8 : 8 + width]
        k, v = rows(1 if form == "shared" else frames, k_len, 2 * width).chunk(2, -1)
    return {"q": q, "k": k, "v": v, "num_heads": heads}


def in_own_dtype(q, k, v, num_heads):
    """The formula in plain PyTorch (vfengine/ops/attention.py, "math")."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(-2)


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["q"].contiguous()))
    assert spatial_attention(**case, out=out, backend=backend) is out
    exact = spatial_attention_reference(**doubled(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, forms and dtypes on one backend."""
    cases = list(itertools.product(shapes.values(), dtypes, FORMS))
    for shape, dtype, form in cases:
        assert_matches(make_case(shape, dtype, form, device, place), backend, place)
    return len(cases)


@all_dtypes
@all_shapes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_spatial_attention_matches_reference(dtype, shape, form, place):
    assert_matches(make_case(shape, dtype, form, place=place), "cpu", place)


@all_dtypes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_large_logits_do_not_overflow(dtype, backend):
    case = make_case(dtype=dtype)
    case["q"].mul_(1000)
    assert spatial_attention(**case, backend=backend).isfinite().all()


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    out = spatial_attention(**case, backend="reference")
    assert torch.equal(out, spatial_attention_reference(**case).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_spatial_attention_registers(form):
    check_registration("cpu", form, "reference")


def check_registration(device, form="packed", backend="auto"):
    case = make_case(form=form, device=device)
    arguments = (*case.values(), backend, torch.empty(3, 77, 120, device=device))
    torch.library.opcheck(torch.ops.vfengine.spatial_attention.default, arguments)


@pytest.mark.parametrize("name", ["k", "v", "out"])
def test_rejects_other_dtype_shape_and_device(name):
    case = {**make_case(), "out": torch.empty(3, 77, 120)}
    tensor = case[name]
    with pytest.raises(TypeError, match=f"{name} must be torch.float32"):
        spatial_attention(**{**case, name: tensor.half()})
    with pytest.raises(ValueError, match=f"{name} must be on cpu"):
        spatial_attention(**{**case, name: tensor.to("meta")})
    with pytest.raises(ValueError, match=rf"{name} must be \[3"):
        spatial_attention(**{**case, name: torch.cat([tensor, tensor])})


def test_rejects_values():
    case = make_case()
    q, k, v = case["q"], case["k"], case["v"]
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([v, v], -1)[..., :120]
    for change, error, words in (
        ({"q": q.double()}, TypeError, "q must be fp32, fp16 or bf16"),
        ({"v": None}, TypeError, "v must be a tensor"),
        ({"q": q[0]}, ValueError, r"q must be \[F, Sq, H\*D\]"),
        ({"k": k[:2]}, ValueError, r"k must be \[3 or 1, Sk, 120\]"),
        ({"num_heads": 7}, ValueError, "num_heads must divide 120 channels, got 7"),
        ({"num_heads": 30}, ValueError, "must be a multiple of 8, at most 256, got 4"),
        ({"k": strided}, ValueError, "k must have contiguous rows at one distance"),
        ({"k": k[:1].expand(3, -1, -1), "v": v}, ValueError, "k must have contiguous rows"),
        ({"v": wide}, ValueError, "k and v must lie at one distance, got 120 and 240"),
        ({"out": q}, ValueError, "out shares memory with q"),
        ({"q": q.clone().requires_grad_()}, ValueError, "has no derivative"),
        ({"backend": "triton"}, ValueError, "backend='triton' takes CUDA tensors"),
        ({"backend": "cuda"}, ValueError, "only kernels for triton, cpu"),
    ):
        with pytest.raises(error, match=words):
            spatial_attention(**{**case, **change})


def test_rejects_out_between_the_columns_of_its_input():
    """Memory is shared although no element is: what lies between is another row's."""
    both = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="out shares memory with q"):
        rows = both[..., :8]
        spatial_attention(
            rows, torch.ones(1, 2, 8), torch.ones(1, 2, 8), 1, out=both.view(2, 4, 8)[:1]
        )
