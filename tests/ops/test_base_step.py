"""base_step against remove_base and decomposed_step: vfengine/ops/base_step.py, csrc, kernels."""

from itertools import product

import pytest
import torch
from kernel_cases import (
    COEFFS,
    SHAPES,
    all_shapes,
    as_it_is,
    assert_same_bits,
    clock_case,
    frames_case,
    on_cpu,
    placed,
    stepped,
)

from vfengine.ops import base_step, decomposed_step, remove_base

SEED = 2**63 + 7  # as int64 it is negative
WRITTEN = ("z", "states", "counter", "ticket", "t")


def make_case(shape=SHAPES["odd"], step=2, mixed=True, device="cpu"):
    """Keyword arguments of a call; those of the clock one by one."""
    case = frames_case(shape, torch.float32, step, False, device)
    batch, _, *image = shape
    case = {"z": case["r"][:, 0].contiguous(), "b": case["image"], "coeffs": case["coeffs"]}
    if mixed:
        case["mixed"] = case["b"].flip(0) + 0.5
    case["noise_levels"] = torch.tensor([0.9, 0.5, 0.1], device=device)
    case["states"] = torch.full((len(COEFFS) + 1, batch, *image), 7.0, device=device)
    return {**case, **clock_case(step, batch, device), "seed": SEED, "sample_offset": 3}


def by_parts(case):
    """What the call writes, by remove_base, decomposed_step and PyTorch."""
    step, z, states = int(case["counter"]), case["z"].unsqueeze(1), case["states"].clone()
    place = {"lam": torch.ones(1), "step": case["counter"]}
    d = remove_base(
        z, case["b"], **place, noise_levels=case["noise_levels"], out=torch.empty_like(z)
    )
    place |= {"base_seed": SEED, "residual_seed": 0, "sample_offset": 3}
    b = case.get("mixed", case["b"])
    out = torch.empty_like(z)
    decomposed_step(z, b, b.unsqueeze(1), coeffs=case["coeffs"], **place, out=out)
    states[step], states[step + 1] = d[:, 0], out[:, 0]
    t = case["timesteps"][min(step + 1, len(COEFFS) - 1)].expand_as(case["t"])
    counter, ticket = case["counter"] + 1, case["ticket"] * 0
    return {"z": out[:, 0], "states": states, "counter": counter, "ticket": ticket, "t": t}


def assert_step(case, backend):
    expected = by_parts(on_cpu(case))
    if int(case["counter"]) == len(COEFFS) - 1:
        case["t"].copy_(expected["t"])  # the last step leaves t as it is
    result = stepped(base_step, case, backend)
    for name in WRITTEN:
        assert_same_bits(result[name].cpu(), expected[name], name)


def check_registration(device, backend):
    case = make_case(device=device)
    names = ("z", "b", "states", "noise_levels", "coeffs", "counter", "ticket", "timesteps", "t")
    arguments = (*(case[name] for name in names), case["mixed"], 7, 0, backend)
    op = torch.ops.vfengine.base_step.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=tests)


def run_steps(backend, shapes, device, place, _dtypes=None):
    """All shapes on one backend: the very bits of its parts on the CPU."""
    for shape, step, mixed in product(shapes.values(), (1, 2), (False, True)):
        assert_step(placed(make_case(shape, step, mixed, device), place), backend)
    return 4 * len(shapes)


def run_cases(backend, shapes, device, place, _dtypes=None):
    """Those, and what is refused."""
    check_registration(device, backend)
    count = run_steps(backend, shapes, device, place)
    case = stepped(base_step, {**make_case(device=device), "seed": None}, backend)
    assert case["z"].isnan().all(), "sigma > 0 without noise"
    for step in (-1, len(COEFFS)):
        case = stepped(base_step, make_case(step=step, device=device), backend)
        assert case["z"].isnan().all() and (case["states"] == 7).all(), "step outside coeffs"
        assert int(case["counter"]) == step + 1 and int(case["ticket"]) == 0
        assert (case["t"] == (900 if step < 0 else -1)).all()
    return count


@all_shapes
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("step", [1, 2], ids=["sigma=0", "sigma>0"])
@pytest.mark.parametrize("place", [as_it_is])
def test_base_step_is_made_of_the_other_ops(shape, mixed, step, place):
    assert_step(placed(make_case(shape, step, mixed), place), "cpu")


@pytest.mark.parametrize("mixed", [False, True])
def test_reference_backend(mixed):
    case = make_case(mixed=mixed)
    expected = by_parts(case)
    result = stepped(base_step, case, "reference")
    for name in WRITTEN:
        torch.testing.assert_close(result[name][..., :], expected[name])


def test_float64_runs_the_references_alone():
    exact = make_case()
    for name in ("z", "b", "mixed", "coeffs", "states", "noise_levels"):
        exact[name] = exact[name].double()
    expected = by_parts(make_case())
    with pytest.raises(ValueError, match="float64 clips run backend='reference', got 'cpu'"):
        stepped(base_step, exact, "cpu")
    result = stepped(base_step, exact, "auto")
    assert result["z"].dtype == torch.float64
    for name in ("z", "states"):
        torch.testing.assert_close(result[name].float(), expected[name])


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("z", lambda x: x[0], ValueError, r"z must be \[B, C, H, W\]"),
        ("z", lambda x: x.half(), TypeError, "z must be torch.float32"),
        ("b", lambda x: x.half(), TypeError, "b must be torch.float32"),
        ("mixed", lambda x: x[1:], ValueError, r"mixed must be \[3, 3, 7, 11\]"),
        ("states", lambda x: x[1:], ValueError, r"states must be \[4, 3, 3, 7, 11\]"),
        ("noise_levels", lambda x: x[1:], ValueError, r"noise_levels must be \[3\]"),
        ("coeffs", lambda x: x[1:], ValueError, r"coeffs must be \[3, 3\]"),
        ("ticket", lambda x: x.long(), TypeError, "ticket must be torch.int32"),
        ("t", lambda x: x[1:], ValueError, r"t must be \[3\]"),
    ],
)
def test_rejects(name, change, error, words, monkeypatch):
    """What the kernels cannot take; under the interpreter's name they take CPU tensors too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case()
    case[name] = change(case[name])
    with pytest.raises(error, match=f"base_step: {words}"):
        stepped(base_step, case, "triton")


def test_rejects_memory_that_is_shared(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case()
    with pytest.raises(ValueError, match="out shares memory with b"):
        stepped(base_step, {**case, "b": case["z"]}, "triton")
