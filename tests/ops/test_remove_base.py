"""remove_base against its reference: vfengine/ops/remove_base.py, csrc, kernels."""

import pytest
import torch
from kernel_cases import (
    ALL_DTYPES,
    LARGE,
    SHAPES,
    all_dtypes,
    all_shapes,
    as_it_is,
    assert_as_close_as_pytorch,
    assert_same_bits,
    frames_case,
    frames_cases,
    in_double,
    misaligned,
    on_cpu,
    on_every_isa_and_thread_count,
    placed,
)

from vfengine.diffusion import decompose
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.ops import remove_base, remove_base_reference


def make_case(shape=SHAPES["odd"], dtype=torch.float32, step=1, device="cpu"):
    """Keyword arguments of a call."""
    case = frames_case(shape, dtype, step, False, device)
    levels = torch.tensor([0.99, 0.7, 0.05], device=device)
    return {
        "z": case["clip"],
        "b": case["image"],
        "lam": case["lam"],
        "noise_levels": levels,
        "step": case["step"],
    }


def in_own_dtype(z, b, lam, noise_levels, step):
    """The formula in plain PyTorch: every operation rounds to the dtype of z."""
    level = noise_levels[int(step)].item()
    return z - lam.sqrt().view(-1, 1, 1, 1).to(z.dtype) * level * b.unsqueeze(1)


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["z"]))
    assert remove_base(**case, out=out, backend=backend) is out
    exact = remove_base_reference(**in_double(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes and dtypes on one backend: as the reference, and the CPU's very bits."""
    count = 0
    for shape, dtype, step, guided in frames_cases(shapes, dtypes):
        if guided:
            continue
        case = placed(make_case(shape, dtype, step, device), place)
        out = assert_matches(case, backend, place)
        assert_same_bits(remove_base(**on_cpu(case), backend="cpu"), out.cpu(), (shape, dtype))
        case["z"] = place(case["z"].clone())
        remove_base(**case, backend=backend)
        assert_same_bits(case["z"], out, "in place")
        count += 1
    if backend != "cpu":
        case = make_case(step=3, device=device)
        assert remove_base(**case, backend=backend).isnan().all(), "step outside noise_levels"
        case = make_case(device=device)
        case["lam"][0] = 1.5
        assert remove_base(**case, backend=backend)[:, 0].isnan().all(), "lam outside [0, 1]"
    return count


@all_dtypes
@all_shapes
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_remove_base_matches_reference(dtype, shape, place):
    assert_matches(placed(make_case(shape, dtype), place), backend="cpu")


def test_is_equation_3_of_decompose():
    schedule = NoiseSchedule.linear(1000, 1e-4, 2e-2)
    case = make_case()
    case["noise_levels"] = (1 - schedule.alphas_cumprod).sqrt().float()
    case["step"] = torch.tensor([600], dtype=torch.int32)
    t = torch.full(case["z"].shape[:1], 600)
    expected = decompose.remove_base(case["z"], case["b"], case["lam"], t, schedule)
    torch.testing.assert_close(remove_base(**case), expected, rtol=1e-6, atol=1e-6)


@all_dtypes
@pytest.mark.parametrize("shape", [(2, 9, 3, 61, 67), LARGE], ids=["ragged", "large"])
def test_same_bits_on_any_threads_and_instruction_set(dtype, shape):
    case = make_case(shape, dtype)  # tiles and vectors are all ragged
    out = torch.empty_like(case["z"])
    results = on_every_isa_and_thread_count(lambda: remove_base(**case, out=out).clone())
    for result in results[1:]:
        assert torch.equal(result, results[0])


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    out = remove_base(**case, out=torch.empty_like(case["z"]), backend="reference")
    assert torch.equal(out, remove_base_reference(**case).to(dtype))


def test_remove_base_registers():
    check_registration("cpu")


def check_registration(device):
    case = make_case(device=device)
    arguments = (*case.values(), "auto")
    torch.library.opcheck(torch.ops.vfengine.remove_base_.default, arguments)
    torch.library.opcheck(torch.ops.vfengine.remove_base.default, (*arguments, case["z"].clone()))


@pytest.mark.parametrize("name", ["b", "out"])
def test_rejects_other_dtype_shape_strides_and_device(name):
    case = {**make_case(), "out": torch.empty(SHAPES["odd"])}
    tensor = case[name]
    with pytest.raises(TypeError, match=f"remove_base: {name} must be torch.float32"):
        remove_base(**{**case, name: tensor.half()})
    with pytest.raises(ValueError, match=rf"remove_base: {name} must be \["):
        remove_base(**{**case, name: torch.cat([tensor] * 2, dim=-1)})
    strided = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=f"remove_base: {name} must be contiguous"):
        remove_base(**{**case, name: strided})
    with pytest.raises(ValueError, match=f"remove_base: {name} must be on cpu"):
        remove_base(**{**case, name: tensor.to("meta")})


def test_rejects_tables_overlap_and_backend():
    case = make_case()
    with pytest.raises(ValueError, match=r"noise_levels must be \[3\], got \[3, 1\]"):
        remove_base(**{**case, "noise_levels": case["noise_levels"][:, None]})
    inside = {**case, "z": case["z"][:1], "b": case["z"][0, :1]}
    with pytest.raises(ValueError, match="out shares memory with b"):
        remove_base(**inside)
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"backend='{backend}' takes CUDA tensors"):
            remove_base(**case, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rejects_values(backend):
    with pytest.raises(ValueError, match="lies outside"):
        remove_base(**make_case(step=3), backend=backend)
    case = make_case()
    case["lam"][0] = -0.5
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\]"):
        remove_base(**case, backend=backend)
