"""decomposed_step against its reference: vfengine/ops/decomposed_step.py, csrc, kernels."""

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

from vfengine.diffusion.decompose import combine
from vfengine.diffusion.noise import decomposed_noise
from vfengine.ops import decomposed_step, decomposed_step_reference

STEP = 2  # the row of COEFFS with sigma > 0; row 1 has sigma = 0
SEEDS = {"base_seed": 5, "residual_seed": 2**63 + 7, "sample_offset": 3, "frame_offset": 2}


def make_case(shape=SHAPES["odd"], dtype=torch.float32, step=STEP, device="cpu"):
    """Keyword arguments of a call."""
    case = frames_case(shape, dtype, step, False, device)
    case["z"], case["b"] = case.pop("clip"), case.pop("image")
    return {**case, **SEEDS}


def in_own_dtype(z, b, r, lam, coeffs, step, base_seed, residual_seed, **place):
    """The formula in plain PyTorch: every operation rounds to the dtype of z."""
    c1, c2, sigma = coeffs[int(step)].tolist()
    lam = lam.view(-1, 1, 1, 1)
    shared, own = lam.sqrt().to(z.dtype), (1 - lam).sqrt().to(z.dtype)
    place["step"] = int(step) + 1
    xi_b, xi = (x.to(z) for x in decomposed_noise(z.shape, base_seed, residual_seed, **place))
    eps = shared * b.unsqueeze(1) + own * r
    return c1 * z + c2 * eps + sigma * (shared * xi_b.unsqueeze(1) + own * xi)


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["z"]))
    assert decomposed_step(**case, out=out, backend=backend) is out
    exact = decomposed_step_reference(**in_double(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, dtypes and options on one backend: as the reference, and the CPU's very bits."""
    count = 0
    for *arguments, guided in frames_cases(shapes, dtypes):
        if guided:
            continue
        case = placed(make_case(*arguments, device), place)
        out = assert_matches(case, backend, place)
        assert_same_bits(decomposed_step(**on_cpu(case), backend="cpu"), out.cpu(), arguments)
        case["z"] = place(case["z"].clone())
        decomposed_step(**case, backend=backend)
        assert_same_bits(case["z"], out, "in place")
        count += 1
    if backend != "cpu":
        case = {**make_case(device=device), "base_seed": None, "residual_seed": None}
        assert decomposed_step(**case, backend=backend).isnan().all(), "sigma > 0 without noise"
        case = make_case(step=3, device=device)
        assert decomposed_step(**case, backend=backend).isnan().all(), "step outside coeffs"
        case = make_case(device=device)
        case["lam"][0] = -0.5
        assert decomposed_step(**case, backend=backend)[:, 0].isnan().all(), "lam outside [0, 1]"
    return count


@all_dtypes
@all_shapes
@pytest.mark.parametrize("step", [1, STEP], ids=["sigma=0", "sigma>0"])
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_decomposed_step_matches_reference(dtype, shape, step, place):
    assert_matches(placed(make_case(shape, dtype, step), place), backend="cpu")


def test_base_frame_is_the_image_sampler_bit_for_bit():
    """λ_m = 1: c1 z_m + c2 b̂ + σ ξ_b, to the last bit; no residual reaches it."""
    for step in (1, STEP):
        case = make_case(step=step)
        m = case["z"].shape[1] // 2
        xi = decomposed_noise(
            case["z"].shape, 5, SEEDS["residual_seed"], step=step + 1, sample_offset=3
        ).base
        c1, c2, sigma = case["coeffs"][step]
        expected = c1 * case["z"][:, m] + c2 * case["b"]
        expected = expected if sigma == 0 else expected + sigma * xi
        assert torch.equal(decomposed_step(**case)[:, m], expected)


def test_drawn_noise_is_decomposed_noise():
    case = make_case()
    place = {"step": STEP + 1, "sample_offset": 3, "frame_offset": 2}
    shape = case["z"].shape
    xi = decomposed_noise(shape, SEEDS["base_seed"], SEEDS["residual_seed"], **place)
    zero = {**case, "coeffs": torch.tensor([[0.0, 0.0, 0.0]] * 2 + [[0.0, 0.0, 1.0]])}
    drawn = decomposed_step(**zero)
    combined = sum(
        weight.view(-1, 1, 1, 1) * part
        for weight, part in (
            (case["lam"].sqrt(), xi.base.unsqueeze(1)),
            ((1 - case["lam"]).sqrt(), xi.residual),
        )
    )
    torch.testing.assert_close(drawn, combined, rtol=1e-6, atol=1e-6)
    whole = combine(xi.base, xi.residual, case["lam"])  # the public form, base frame's λ = 1
    torch.testing.assert_close(drawn, whole, rtol=1e-6, atol=1e-6)


@all_dtypes
@pytest.mark.parametrize("shape", [(2, 9, 3, 61, 67), LARGE], ids=["ragged", "large"])
def test_same_bits_on_any_threads_and_instruction_set(dtype, shape):
    case = make_case(shape, dtype)  # tiles and vectors are all ragged
    out = torch.empty_like(case["z"])
    results = on_every_isa_and_thread_count(lambda: decomposed_step(**case, out=out).clone())
    for result in results[1:]:
        assert torch.equal(result, results[0])


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype)
    out = decomposed_step(**case, out=torch.empty_like(case["z"]), backend="reference")
    assert torch.equal(out, decomposed_step_reference(**case).to(dtype))


def test_decomposed_step_registers():
    check_registration("cpu")


def check_registration(device):
    case = make_case(device=device)
    names = ("z", "b", "r", "lam", "coeffs", "step")
    arguments = (*(case[name] for name in names), 5, -7, 3, 2, "auto")
    torch.library.opcheck(torch.ops.vfengine.decomposed_step_.default, arguments)
    torch.library.opcheck(
        torch.ops.vfengine.decomposed_step.default, (*arguments, case["z"].clone())
    )


@pytest.mark.parametrize("name", ["b", "r", "out"])
def test_rejects_other_dtype_shape_and_strides(name):
    case = make_case()
    case["out"] = torch.empty_like(case["z"])
    tensor = case[name]
    with pytest.raises(TypeError, match=f"decomposed_step: {name} must be torch.float32"):
        decomposed_step(**{**case, name: tensor.half()})
    with pytest.raises(ValueError, match=rf"decomposed_step: {name} must be \["):
        decomposed_step(**{**case, name: torch.cat([tensor] * 2, dim=-1)})
    strided = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=f"decomposed_step: {name} must be contiguous"):
        decomposed_step(**{**case, name: strided})
    with pytest.raises(ValueError, match=f"decomposed_step: {name} must be on cpu"):
        decomposed_step(**{**case, name: tensor.to("meta")})


@pytest.mark.parametrize("name", ["b", "r", "lam", "coeffs", "step"])
def test_rejects_out_over_an_input(name):
    case = make_case((2, 4, 1, 2, 2))
    memory = torch.zeros(2 * case["z"].numel())
    inside = memory[4 : 4 + case[name].numel()].view(case[name].dtype).view(case[name].shape)
    case[name] = inside.copy_(case[name])
    out = memory[: case["z"].numel()].view(case["z"].shape)
    with pytest.raises(ValueError, match=f"decomposed_step: out shares memory with {name}"):
        decomposed_step(**case, out=out)


def test_rejects_half_a_pair_of_seeds_and_none_where_noise_is_due():
    case = make_case()
    for name in ("base_seed", "residual_seed"):
        with pytest.raises(ValueError, match="both base_seed and residual_seed"):
            decomposed_step(**{**case, name: None})
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            decomposed_step(**{**case, name: 1.5})
    none = {**case, "base_seed": None, "residual_seed": None}
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="needs the seed"):
            decomposed_step(**none, backend=backend)
    with pytest.raises(ValueError, match="frame_offset must be"):
        decomposed_step(**{**case, "frame_offset": -1})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rejects_values(backend):
    with pytest.raises(ValueError, match="outside coeffs"):
        decomposed_step(**make_case(step=3), backend=backend)
    case = make_case()
    case["lam"][1] = float("nan")
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\]"):
        decomposed_step(**case, backend=backend)
    case = make_case()
    case["r"].requires_grad_()
    with pytest.raises(ValueError, match="no derivative"):
        decomposed_step(**case, backend=backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_rejects_backend_that_cannot_run(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"backend='{backend}' takes CUDA tensors"):
        decomposed_step(**make_case(), backend=backend)
