"""residual_step against its reference: vfengine/ops/residual_step.py, csrc, kernels."""

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

from vfengine.diffusion.noise import residual_noise
from vfengine.native import vfengine_native
from vfengine.ops import residual_step, residual_step_reference

STEP = 2  # the row of COEFFS with sigma > 0; row 1 has sigma = 0
SEED = 2**63 + 7  # as int64 it is negative
PLACE = {"sample_offset": 3, "frame_offset": 2}


def make_case(shape=SHAPES["odd"], dtype=torch.float32, step=STEP, guided=False, device="cpu"):
    """Keyword arguments of a call."""
    case = frames_case(shape, dtype, step, guided, device)
    case["u"], case["g"] = case.pop("clip"), case.pop("image")
    return {**case, "seed": SEED, **PLACE}


def in_own_dtype(u, r, g, lam, coeffs, step, seed, r_uncond=None, guidance_scale=1.0, **place):
    """The formula in plain PyTorch: every operation rounds to the dtype of u."""
    c1, c2, sigma = coeffs[int(step)].tolist()
    lam = lam.view(-1, 1, 1, 1)
    if r_uncond is not None:
        r = r_uncond + guidance_scale * (r - r_uncond)
    xi = residual_noise(u.shape, seed, step=int(step) + 1, **place).to(u)
    own = (1 - lam).sqrt().to(u.dtype) * (c2 * r + sigma * xi)
    return c1 * u + lam.sqrt().to(u.dtype) * g.unsqueeze(1) + own


def assert_matches(case, backend, place=as_it_is):
    out = place(torch.empty_like(case["u"]))
    assert residual_step(**case, out=out, backend=backend) is out
    exact = residual_step_reference(**in_double(case))
    assert_as_close_as_pytorch(out, exact, in_own_dtype(**case))
    return out


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, dtypes and options on one backend: as the reference, and the CPU's very bits."""
    count = 0
    for arguments in frames_cases(shapes, dtypes):
        case = placed(make_case(*arguments, device), place)
        out = assert_matches(case, backend, place)
        assert_same_bits(residual_step(**on_cpu(case), backend="cpu"), out.cpu(), arguments)
        case["u"] = place(case["u"].clone())
        residual_step(**case, backend=backend)
        assert_same_bits(case["u"], out, "in place")
        count += 1
    if backend != "cpu":
        case = {**make_case(device=device), "seed": None}
        assert residual_step(**case, backend=backend).isnan().all(), "sigma > 0 without noise"
        for step in (-1, 3):
            case = make_case(step=step, device=device)
            assert residual_step(**case, backend=backend).isnan().all(), "step outside coeffs"
        case = make_case(device=device)
        case["lam"][0] = 1.5
        assert residual_step(**case, backend=backend)[:, 0].isnan().all(), "lam outside [0, 1]"
    return count


@all_dtypes
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("step", [1, STEP], ids=["sigma=0", "sigma>0"])
def test_residual_step_matches_reference_beyond_the_caches(dtype, guided, step):
    assert_matches(make_case(LARGE, dtype, step, guided), backend="cpu")


@all_dtypes
@all_shapes
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("step", [1, STEP], ids=["sigma=0", "sigma>0"])
@pytest.mark.parametrize("place", [as_it_is, misaligned])
def test_residual_step_matches_reference(dtype, shape, guided, step, place):
    case = make_case(shape, dtype, step, guided)
    assert_matches(placed(case, place), backend="cpu")


@all_dtypes
def test_writes_u_or_out_and_returns_it(dtype):
    case = make_case(dtype=dtype)
    before = case["u"].clone()
    out = torch.empty_like(before)
    assert residual_step(**case, out=out) is out
    assert torch.equal(case["u"], before)
    u = case["u"]
    assert residual_step(**case) is u
    assert torch.equal(u, out)
    case["u"] = before.clone()
    residual_step(**case, out=case["u"].view(before.shape))  # the same memory under another name
    assert torch.equal(case["u"], out)


def test_seed_draws_residual_noise():
    """With λ = 0, c1 = c2 = 0 and σ = 1 the step is ξ and nothing else."""
    case = make_case()
    case["coeffs"] = torch.tensor([[0.0, 0.0, 0.0]] * STEP + [[0.0, 0.0, 1.0]])
    case["lam"].zero_()
    expected = residual_noise(case["u"].shape, SEED, step=STEP + 1, **PLACE)
    out = torch.empty_like(expected)
    assert torch.equal(residual_step(**case, out=out), expected)
    assert not torch.equal(residual_step(**{**case, "frame_offset": 1}, out=out), expected)


@all_dtypes
@pytest.mark.parametrize("shape", [(2, 9, 3, 61, 67), LARGE], ids=["ragged", "large"])
def test_same_bits_on_any_threads_and_instruction_set(dtype, shape):
    # Tiles and vectors are all ragged.
    case = make_case(shape, dtype, guided=True)
    out = torch.empty_like(case["u"])
    results = on_every_isa_and_thread_count(lambda: residual_step(**case, out=out).clone())
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("isa", vfengine_native.cpu_isas)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_types_round_as_torch_does(dtype, isa):
    u = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)  # every value
    u = u.view(1, 1, 1, 256, 256)
    zero, step = torch.zeros_like(u), torch.zeros(1, dtype=torch.int32)
    former = vfengine_native.cpu_isa()
    try:
        vfengine_native.set_cpu_isa(isa)
        for c1 in (1.0, 1 / 3, 3e-6, 2.7):
            coeffs, out = torch.tensor([[c1, 0.0, 0.0]]), torch.empty_like(u)
            residual_step(u, zero, zero[:, 0], torch.ones(1), coeffs, step, out=out)
            expected = (coeffs[0, 0] * u.float()).to(dtype)
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    finally:
        vfengine_native.set_cpu_isa(former)


@all_dtypes
def test_reference_backend(dtype):
    case = make_case(dtype=dtype, guided=True)
    out = residual_step(**case, out=torch.empty_like(case["u"]), backend="reference")
    assert torch.equal(out, residual_step_reference(**case).to(dtype))


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_residual_step_registers(guided):
    check_registration("cpu", guided)


def check_registration(device, guided=True):
    case = make_case(guided=guided, device=device)
    u, r, g, lam, coeffs, step = (case[k] for k in ("u", "r", "g", "lam", "coeffs", "step"))
    rest = (r, g, lam, coeffs, step, case.get("r_uncond"), 2.5, 7, 0, 0, "auto")
    torch.library.opcheck(torch.ops.vfengine.residual_step_.default, (u, *rest))
    torch.library.opcheck(torch.ops.vfengine.residual_step.default, (u, *rest, u.clone()))


@pytest.mark.parametrize("name", ["r", "g", "r_uncond", "out"])
def test_rejects_other_dtype(name):
    case = make_case(guided=True)
    case["out"] = torch.empty_like(case["u"])
    case[name] = case[name].half()
    with pytest.raises(TypeError, match=f"residual_step: {name} must be torch.float32"):
        residual_step(**case)


def test_rejects_float64_clips_and_tables_of_other_types():
    case = make_case()
    with pytest.raises(TypeError, match="u must be fp32, fp16 or bf16"):
        residual_step(**in_double(case))
    for name in ("lam", "coeffs", "step"):
        with pytest.raises(TypeError, match=f"{name} must be torch"):
            residual_step(**{**case, name: case[name].double()})


@pytest.mark.parametrize("name", ["u", "r", "g", "lam", "coeffs", "step", "r_uncond", "out"])
def test_rejects_other_shape(name):
    case = make_case(guided=True)
    case["out"] = torch.empty_like(case["u"])
    case[name] = torch.cat([case[name]] * 2, dim=-1)
    with pytest.raises(ValueError, match=r"residual_step: .* must be"):
        residual_step(**case)


@pytest.mark.parametrize("name", ["u", "r", "r_uncond", "out"])
def test_rejects_strided_clips(name):
    case = make_case(guided=True)
    case["out"] = torch.empty_like(case["u"])
    case[name] = case[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=f"{name} must be contiguous, got strides"):
        residual_step(**case)


@pytest.mark.parametrize("name", ["r", "g", "lam", "coeffs", "step", "r_uncond", "out"])
def test_rejects_other_device(name):
    case = make_case(guided=True)
    case["out"] = torch.empty_like(case["u"])
    case[name] = case[name].to("meta")
    with pytest.raises(ValueError, match="must be on"):
        residual_step(**case)


@pytest.mark.parametrize("name", ["r", "r_uncond"])
def test_rejects_out_over_an_input(name):
    case = make_case(guided=True)
    with pytest.raises(ValueError, match=f"out shares memory with {name}"):
        residual_step(**case, out=case[name])
    for alias in (case["u"], case["u"].view(case["u"].shape)):
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            residual_step(**{**case, name: alias})


def test_rejects_out_shifted_over_u():
    case = make_case((1, 2, 1, 4, 4))
    memory = torch.zeros(40)
    case["u"] = memory[:32].view(1, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="out shares memory with u"):
        residual_step(**case, out=memory[8:].view(1, 2, 1, 4, 4))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("step", [-1, 3])
def test_rejects_step_outside_the_table(step, backend):
    with pytest.raises(ValueError, match="outside coeffs"):
        residual_step(**make_case(step=step), backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_rejects_lam_outside_unit_interval(value, backend):
    case = make_case()
    case["lam"][0] = value
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\]"):
        residual_step(**case, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rejects_missing_noise(backend):
    with pytest.raises(ValueError, match="needs the seed of its noise"):
        residual_step(**{**make_case(), "seed": None}, backend=backend)
    residual_step(**{**make_case(step=1), "seed": None}, backend=backend)  # sigma = 0 needs none


def test_rejects_seeds():
    for seed, error in ((-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed must be"):
            residual_step(**{**make_case(), "seed": seed})


def test_rejects_what_autograd_records():
    case = make_case()
    case["r"].requires_grad_()
    with pytest.raises(ValueError, match="no derivative"):
        residual_step(**case)
    with torch.no_grad():
        residual_step(**case)


@pytest.mark.parametrize("backend", ["cuda", "triton", "fastest"])
def test_rejects_backend_that_cannot_run(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case()
    with pytest.raises(ValueError, match=f"backend='{backend}'"):
        residual_step(**case, backend=backend)
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", backend)
    with pytest.raises(ValueError, match=f"VFENGINE_KERNEL_BACKEND={backend}"):
        residual_step(**case)
    residual_step(**case, backend="cpu")  # an explicit backend goes before the environment


def test_compiles_into_a_graph_without_breaks():
    case = make_case()
    compiled = torch.compile(residual_step, fullgraph=True, backend="aot_eager")
    out = torch.empty_like(case["u"])
    expected = residual_step(**case, out=torch.empty_like(out))
    assert torch.equal(compiled(**case, out=out), expected)


def test_profilers_see_the_op():
    case = make_case()
    with torch.profiler.profile() as profile:
        residual_step(**case)
    assert "vfengine::residual_step_" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", ["u", "r", "g", "lam", "coeffs", "step"])
@pytest.mark.parametrize("value", [None, 0, "u"])
def test_rejects_what_is_no_tensor(name, value):
    with pytest.raises(TypeError, match=f"residual_step: {name} must be a tensor, got"):
        residual_step(**{**make_case(), name: value})
    if value is None:  # a graph that calls the op by name is stopped as well
        names = ("u", "r", "g", "lam", "coeffs", "step")
        arguments = [{**make_case(), name: None}[n] for n in names]
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
            torch.ops.vfengine.residual_step_(*arguments, None, 1.0, 0, 0, 0, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rejects_numbers_of_other_kinds(backend):
    case = {**make_case(guided=True), "backend": backend}
    for value in ("2", None, True, torch.ones(2), 2j):
        with pytest.raises(TypeError, match="residual_step: guidance_scale must be a number"):
            residual_step(**{**case, "guidance_scale": value})
    for name in ("sample_offset", "frame_offset"):
        for value in (0.0, -1, 2**31, True, None):
            with pytest.raises(ValueError, match=f"residual_step: {name} must be an int in"):
                residual_step(**{**case, name: value})


def test_takes_a_lazily_negated_tensor_for_what_it_means():
    case = make_case(step=1)
    expected = residual_step(**{**case, "r": -case["r"]}, out=torch.empty_like(case["u"]))
    case["r"] = torch._neg_view(case["r"])
    assert case["r"].is_neg()
    assert torch.equal(residual_step(**case), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("in_place", [True, False])
def test_autograd_sees_the_write(in_place, backend):
    """As with torch's own ops: what a backward pass has saved may not be overwritten unnoticed."""
    case = {**make_case(), "backend": backend}
    written = case["u"] if in_place else torch.ones_like(case["u"])
    weight = torch.ones_like(written, requires_grad=True)
    loss = (weight * written).sum()
    with torch.no_grad():
        residual_step(**case, out=written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_function_modes_see_the_op():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    case = make_case()
    with Mode():
        residual_step(**case)
    assert "vfengine.residual_step_.default" in seen
