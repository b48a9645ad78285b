"""diffusion/base_path.py: the states it holds, the file it writes, the files it refuses."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.noise import base_noise, residual_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import SOLVERS, solver_table
from vfengine.sampling.api import sample_base, sample_residual

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
WALK = {"schedule": SCHEDULE, "num_inference_steps": 6}


def model(z, t):
    return 0.8 * torch.tanh(z)


def walked(dtype=torch.float32, **options) -> BaseTrajectory:
    noise = base_noise((2, 3, 5, 7), 0, dtype=dtype)
    return sample_base(model, noise, metadata={"base_seed": "0"}, **WALK, **options)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_states_are_the_path_without_its_noise_estimate(eta):
    path = walked(torch.float64, eta=eta)
    z = base_noise((2, 3, 5, 7), 0, dtype=torch.float64)
    for k in range(6):
        a = path.table.alphas_cumprod[k]
        torch.testing.assert_close(path.states[k], z - (1 - a).sqrt() * model(z, None))
        c1, c2, sigma = path.table.coeffs[k]
        xi = base_noise(z.shape, 0, step=k + 1, dtype=z.dtype)
        z = c1 * z + c2 * model(z, None) + sigma * xi
        torch.testing.assert_close(path.base_terms()[k], path.states[k + 1] - c1 * path.states[k])
    torch.testing.assert_close(path.final, z)
    assert path.states.shape == (7, 2, 3, 5, 7)
    assert path.timesteps.tolist() == SCHEDULE.timesteps(6).tolist()
    assert path.num_inference_steps == 6


def test_path_is_kept_in_fp32_for_a_half_precision_network():
    assert walked(torch.bfloat16).states.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_path_of_an_image_is_its_scaled_copies(dtype):
    x = torch.rand(2, 3, 5, 7, dtype=dtype)
    path = BaseTrajectory.from_image(x, **WALK)
    assert torch.equal(path.final, x.to(path.states.dtype))
    alphas = SCHEDULE.alphas_cumprod[path.timesteps]
    for k in range(6):
        torch.testing.assert_close(path.states[k], (alphas[k].sqrt() * x.double()).to(path.final))
    assert path.base_path == "clean"
    assert path.base_terms().abs().max() == 0


def test_clean_starts_from_the_finished_frame():
    path = walked(eta=0.5)
    clean = path.clean()
    image = BaseTrajectory.from_image(path.final, eta=0.5, **WALK)
    assert torch.equal(clean.states, image.states)
    assert torch.equal(clean.final, path.final)
    assert clean.base_path == "clean"
    assert clean.metadata == path.metadata
    assert torch.equal(clean.clean().states, clean.states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_file_round_trips_bit_for_bit(tmp_path, solver, dtype):
    path = walked(dtype, solver=solver)
    path.save(tmp_path / "x.safetensors")
    again = BaseTrajectory.load(str(tmp_path / "x.safetensors"), schedule=SCHEDULE)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert again.states.dtype == dtype
    assert torch.equal(again.states, path.states)
    for name in ("timesteps", "alphas_cumprod", "coeffs", "mixing"):
        assert torch.equal(getattr(again.table, name), getattr(path.table, name))
    assert (again.table.solver, again.table.eta) == (path.table.solver, path.table.eta)
    assert (again.schedule_id, again.base_path) == (path.schedule_id, path.base_path)
    assert again.metadata == {"base_seed": "0"}
    noise = residual_noise((2, 3, 3, 5, 7), 1, dtype=dtype)
    clips = [sample_residual(lambda z, t: 0.5 * z, p, noise) for p in (path, again)]
    assert torch.equal(*clips)


def test_clean_file_round_trips(tmp_path):
    walked().clean().save(tmp_path / "x.safetensors")
    again = BaseTrajectory.load(tmp_path / "x.safetensors")
    assert again.base_path == "clean"
    assert again.base_terms().abs().max() == 0


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_file_is_refused_in_one_line(tmp_path, keep):
    file = tmp_path / "x.safetensors"
    walked().save(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="truncated") as refused:
        BaseTrajectory.load(file)
    assert "\n" not in str(refused.value)
    assert str(file) in str(refused.value)


def foreign(path: Path, change=lambda tensors, header: None, solver="ddim") -> None:
    """A well-formed safetensors file that is a trajectory but for `change`."""
    trajectory = walked(solver=solver)
    table = trajectory.table
    tensors = {
        "states": trajectory.states,
        "timesteps": table.timesteps,
        "alphas_cumprod": table.alphas_cumprod,
        "coeffs": table.coeffs,
        "mixing": table.mixing,
    }
    header = {
        "format": "vfengine.base_trajectory.2",
        "solver": solver,
        "eta": "0.0",
        "schedule_id": trajectory.schedule_id,
        "base_path": "stepwise",
        "metadata": "{}",
    }
    change(tensors, header)
    save_file(tensors, path, header)


def format_1(w: torch.Tensor | None):
    """A change to the older format, which kept w of ε̃ = ε + w (ε - ε_prev) instead of mixing."""

    def change(tensors, header):
        del tensors["mixing"]
        header["format"] = "vfengine.base_trajectory.1"
        if w is not None:
            tensors["extrapolation"] = w

    return change


@pytest.mark.parametrize("solver", SOLVERS)
def test_file_by_hand_is_read(tmp_path, solver):
    foreign(tmp_path / "x", solver=solver)
    assert torch.equal(BaseTrajectory.load(tmp_path / "x").states, walked(solver=solver).states)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver"])
def test_file_of_format_1_is_read(tmp_path, solver):
    table = solver_table(solver, SCHEDULE, 6)
    w = torch.zeros(6, dtype=torch.float64)
    if solver == "dpmsolver":
        ell = torch.logit(table.alphas_cumprod) / 2
        w[1:-1] = (ell[2:-1] - ell[1:-2]) / (2 * (ell[1:-2] - ell[:-3]))
    foreign(tmp_path / "x", format_1(w), solver)
    again = BaseTrajectory.load(tmp_path / "x", schedule=SCHEDULE)
    torch.testing.assert_close(again.table.mixing, table.mixing, rtol=0, atol=1e-14)
    assert again.table.num_history == (solver == "dpmsolver")
    assert torch.equal(again.states, walked(solver=solver).states)
    assert torch.equal(again.table.coeffs, table.coeffs)
    again.save(tmp_path / "y")
    assert torch.equal(BaseTrajectory.load(tmp_path / "y").table.mixing, again.table.mixing)


def spoilt(name: str, value: float):
    """A change of one number."""

    def change(tensors, header):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[2] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.clear(),
        lambda tensors, header: header.update(format="pt"),
        lambda tensors, header: header.update(format="vfengine.base_trajectory.1"),
        lambda tensors, header: header.update(format="vfengine.base_trajectory.3"),
        lambda tensors, header: header.update(solver="euler"),
        lambda tensors, header: header.update(solver="unipc"),
        lambda tensors, header: header.update(eta="much"),
        lambda tensors, header: header.update(base_path="smooth"),
        lambda tensors, header: header.update(metadata="[]"),
        lambda tensors, header: header.update(metadata="{"),
        lambda tensors, header: tensors.pop("states"),
        lambda tensors, header: tensors.pop("mixing"),
        lambda tensors, header: tensors.update(states=torch.zeros(6, 1, 1, 2, 2)),
        lambda tensors, header: tensors.update(states=torch.zeros(7, 1, 1, 2, 2).half()),
        lambda tensors, header: tensors.update(coeffs=torch.zeros(6, 2).double()),
        lambda tensors, header: tensors.update(timesteps=torch.zeros(6)),
        lambda tensors, header: tensors.update(mixing=torch.ones(6, 1, 1)),
        lambda tensors, header: tensors.update(mixing=torch.ones(5, 1, 1).double()),
        lambda tensors, header: tensors.update(mixing=torch.ones(6, 2, 2).double()),
        lambda tensors, header: tensors.update(mixing=torch.ones(6).double()),
        lambda tensors, header: tensors.update(mixing=torch.ones(()).double()),
        lambda tensors, header: header.update(eta="nan"),
        lambda tensors, header: header.update(eta="-0.5"),
        lambda tensors, header: header.update(metadata='{"seed": 7}'),
        lambda tensors, header: header.update(metadata="[" * 100_000),
        spoilt("states", torch.inf),
        spoilt("coeffs", torch.nan),
        spoilt("mixing", torch.inf),
        spoilt("alphas_cumprod", torch.nan),
        spoilt("alphas_cumprod", 0),
        spoilt("alphas_cumprod", 1.5),
        lambda tensors, header: tensors.update(timesteps=tensors["timesteps"].flip(0)),
        lambda tensors, header: tensors.update(timesteps=tensors["timesteps"] - 999),
        format_1(None),
        format_1(torch.zeros(6)),
        format_1(torch.zeros(5).double()),
        format_1(torch.zeros(6, 1).double()),
        format_1(torch.ones(6).double()),  # no ddim does this
    ],
)
def test_foreign_file_is_refused_in_one_line(tmp_path, change):
    foreign(tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError, match="not a base trajectory") as refused:
        BaseTrajectory.load(tmp_path / "x.safetensors")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_newer_solver_in_format_1_is_refused(tmp_path, solver):
    foreign(tmp_path / "x", format_1(torch.zeros(6).double()), solver)
    with pytest.raises(ValueError, match="not a base trajectory"):
        BaseTrajectory.load(tmp_path / "x")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        BaseTrajectory.load(tmp_path / "x.safetensors")


def test_other_schedule_is_refused(tmp_path):
    walked().save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="noise schedule"):
        BaseTrajectory.load(tmp_path / "x.safetensors", schedule=NoiseSchedule.scaled_linear(1000))


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"old")

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        walked().save(file)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert file.read_bytes() == b"old"


def test_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(OSError):
        walked().save(tmp_path / "none" / "x.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: BaseTrajectory.from_image(torch.zeros(3, 4, 4), **WALK), ValueError),
        (lambda: BaseTrajectory.from_image(torch.zeros(1, 3, 4, 4).byte(), **WALK), TypeError),
        (
            lambda: BaseTrajectory.from_image(
                torch.zeros(1, 3, 4, 4), schedule=SCHEDULE, num_inference_steps=0
            ),
            ValueError,
        ),
        (lambda: BaseTrajectory(torch.zeros(3, 1, 1, 2, 2), walked().table, "0"), ValueError),
        (lambda: BaseTrajectory(torch.zeros(7, 1, 1, 2, 2).half(), walked().table, "0"), TypeError),
        (lambda: BaseTrajectory(walked().states, walked().table, "0", "smooth"), ValueError),
    ],
)
def test_rejects(call, error):
    with pytest.raises(error):
        call()


def test_states_of_an_image_are_contiguous_whatever_its_strides():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    states = BaseTrajectory.from_image(x, **WALK).states
    assert states.is_contiguous()
    assert torch.equal(states, BaseTrajectory.from_image(x.contiguous(), **WALK).states)
