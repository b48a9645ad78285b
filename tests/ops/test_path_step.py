"""path_step against residual_step along a path: vfengine/ops/path_step.py, csrc, kernels."""

from itertools import product

import pytest
import torch
from kernel_cases import (
    ALL_DTYPES,
    COEFFS,
    SHAPES,
    all_dtypes,
    all_shapes,
    assert_same_bits,
    clock_case,
    frames_case,
    on_cpu,
    placed,
    stepped,
)

from vfengine.ops import path_step, residual_step

SEED = 2**63 + 7  # as int64 it is negative
PLACE = {"sample_offset": 3, "frame_offset": 2}
PATHS = ("stepwise", "shared", "clean", "none")  # a clip's own, one for all, with g = 0, no path
WRITTEN = ("u", "counter", "ticket", "t")


def make_case(shape=SHAPES["odd"], dtype=torch.float32, step=2, path="stepwise", device="cpu"):
    """Keyword arguments of a call; those of the clock one by one."""
    case = frames_case(shape, dtype, step, False, device)
    batch, frames, *image = shape
    case = {"u": case["clip"], **{name: case[name] for name in ("r", "lam", "coeffs")}}
    random = torch.Generator().manual_seed(sum(shape))
    if path != "none":
        rows = (len(COEFFS) + 1, 1 if path == "shared" else batch)
        case["states"] = torch.randn(*rows, *image, generator=random).to(device)
        case["base_frame"] = frames // 2
    if path in ("stepwise", "shared"):
        case["c1"] = case["coeffs"][:, 0].double() + 1e-9
    return {**case, **clock_case(step, batch, device), "seed": SEED, **PLACE}


def by_parts(case):
    """What the call writes, by residual_step and PyTorch."""
    step, u, states = int(case["counter"]), case["u"].clone(), case.get("states")
    g = torch.zeros_like(u[:, 0])
    if "c1" in case:
        d_t, d_p = states[step].double(), states[step + 1].double()
        g.copy_(d_p - case["c1"][step] * d_t)
    tables = {name: case[name] for name in ("lam", "coeffs")}
    residual_step(u, case["r"], g, **tables, step=case["counter"], seed=SEED, **PLACE)
    if states is not None:
        u[:, case["base_frame"]] = states[step + 1].to(u.dtype)
    t = case["timesteps"][min(step + 1, len(COEFFS) - 1)].expand_as(case["t"])
    return {"u": u, "counter": case["counter"] + 1, "ticket": case["ticket"] * 0, "t": t}


def assert_step(case, backend):
    """The call writes what its parts do; the last step leaves t as it is."""
    expected = by_parts(on_cpu(case))
    last = int(case["counter"]) == len(COEFFS) - 1
    if last:
        case["t"].copy_(expected["t"])
    result = stepped(path_step, case, backend)
    for name in WRITTEN:
        assert_same_bits(result[name].cpu(), expected[name], name)


def check_registration(device, backend):
    case = make_case(device=device)
    names = ("u", "r", "lam", "coeffs", "counter", "ticket", "timesteps", "t", "states", "c1")
    arguments = (*(case[name] for name in names), case["base_frame"], 7, 0, 0, backend)
    op = torch.ops.vfengine.path_step.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=tests)


def run_steps(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """All shapes, dtypes and paths on one backend: the very bits of its parts on the CPU."""
    for shape, dtype, step, path in product(shapes.values(), dtypes, (1, 2), PATHS):
        assert_step(placed(make_case(shape, dtype, step, path, device), place), backend)
    return 2 * len(PATHS) * len(shapes) * len(dtypes)


def run_cases(backend, shapes, device, place, dtypes=ALL_DTYPES):
    """Those, and what is refused."""
    check_registration(device, backend)
    count = run_steps(backend, shapes, device, place, dtypes)
    case = stepped(path_step, {**make_case(device=device), "seed": None}, backend)
    others = [n for n in range(case["u"].shape[1]) if n != case["base_frame"]]
    assert case["u"][:, others].isnan().all(), "sigma > 0 without noise"
    for step in (-1, len(COEFFS)):
        case = stepped(path_step, make_case(step=step, device=device), backend)
        assert case["u"].isnan().all(), "step outside coeffs"
        assert int(case["counter"]) == step + 1 and int(case["ticket"]) == 0
        assert (case["t"] == (900 if step < 0 else -1)).all()
    case = make_case(device=device)
    case["lam"][0] = 1.5
    assert stepped(path_step, case, backend)["u"][:, 0].isnan().all(), "lam outside [0, 1]"
    return count


@all_dtypes
@all_shapes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step", [1, 2], ids=["sigma=0", "sigma>0"])
def test_path_step_is_made_of_residual_step(dtype, shape, path, step):
    assert_step(make_case(shape, dtype, step, path), "cpu")


@all_dtypes
@pytest.mark.parametrize("path", PATHS)
def test_reference_backend(dtype, path):
    case = make_case(dtype=dtype, path=path)
    expected = by_parts(case)["u"]
    result = stepped(path_step, case, "reference")["u"]
    torch.testing.assert_close(result, expected)


def test_float64_clips_and_paths():
    exact = make_case()
    for name in ("u", "r", "coeffs", "states"):
        exact[name] = exact[name].double()
    result = stepped(path_step, exact, "auto")["u"]
    assert result.dtype == torch.float64
    torch.testing.assert_close(result.float(), by_parts(make_case())["u"])
    with pytest.raises(ValueError, match="float64 clips run backend='reference', got 'cpu'"):
        stepped(path_step, exact, "cpu")
    case = make_case()
    expected = by_parts(case)["u"]
    case["states"] = case["states"].double()
    assert torch.equal(stepped(path_step, case, "auto")["u"], expected)


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("u", lambda x: x[0], ValueError, r"u must be \[B, N, C, H, W\]"),
        ("r", lambda x: x.half(), TypeError, "r must be torch.float32"),
        ("lam", lambda x: x[1:], ValueError, r"lam must be \[5\]"),
        ("coeffs", lambda x: x[1:], ValueError, r"coeffs must be \[3, 3\]"),
        ("counter", lambda x: x.long(), TypeError, "counter must be torch.int32"),
        ("timesteps", lambda x: x.int(), TypeError, "timesteps must be torch.int64"),
        ("t", lambda x: x[1:], ValueError, r"t must be \[3\]"),
        ("states", lambda x: x[:, :2], ValueError, r"states must be \[4, 3, 3, 7, 11\]"),
        ("states", lambda x: x.half(), TypeError, "states must be torch.float32"),
        ("c1", lambda x: x.float(), TypeError, "c1 must be torch.float64"),
        ("base_frame", lambda m: m + 3, ValueError, r"base_frame must lie in \[0, 5\), got 5"),
    ],
)
def test_rejects(name, change, error, words, monkeypatch):
    """What the kernels cannot take; under the interpreter's name they take CPU tensors too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case()
    case[name] = change(case[name])
    with pytest.raises(error, match=f"path_step: {words}"):
        stepped(path_step, case, "triton")


def test_rejects_memory_that_is_shared(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case()
    with pytest.raises(ValueError, match="out shares memory with r"):
        stepped(path_step, {**case, "r": case["u"]}, "triton")
