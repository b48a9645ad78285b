"""vfengine/sampling/api.py: dtypes, backends, seeds, what networks may do, what is refused."""

import pytest
import torch
from toy_models import WALK, Counted, base_model, noise_of, residual_model

from vfengine.diffusion.noise import base_noise, residual_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.sampling.api import sample, sample_base, sample_residual, sample_video


def test_half_precision_stays_near_fp32():
    shape = (1, 4, 3, 8, 8)
    fp32 = sample(base_model, residual_model, *noise_of(shape, torch.float32), **WALK)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.06)):
        half = sample(base_model, residual_model, *noise_of(shape, dtype), **WALK)
        assert (half.float() - fp32).abs().max() < tolerance * fp32.abs().max()


def test_backends_by_name_agree_and_float64_has_only_the_reference():
    noise = noise_of((1, 3, 1, 5, 7), torch.float32)
    videos = [
        sample(base_model, residual_model, *noise, backend=backend, **WALK)
        for backend in ("cpu", "reference")
    ]
    torch.testing.assert_close(*videos)
    with pytest.raises(ValueError, match="float64"):
        sample(base_model, residual_model, *noise_of((1, 3, 1, 5, 7)), backend="cpu", **WALK)


def test_same_seeds_give_the_same_clip_and_others_do_not():
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    walk = {**WALK, "eta": 1.0}
    first, again, other_base, other_residual = (
        sample(base_model, residual_model, *noise, base_seed=b, residual_seed=r, **walk)
        for b, r in ((3, 4), (3, 4), (5, 4), (3, 5))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[:, 1], other_base[:, 1])
    assert torch.equal(first[:, 1], other_residual[:, 1])
    assert not torch.equal(first[:, 0], other_residual[:, 0])


def test_models_and_noise_are_left_alone():
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    copies = [x.clone() for x in noise]
    for method in ("two_phase", "interleaved"):
        sample(lambda z, t: z, lambda z, t: z.clone(), *noise, method=method, **WALK)
    sample(lambda z, t: z, lambda z, t: z, *noise, overlap_phases=True, **WALK)
    sample_video(lambda z, t: z, noise.residual, **WALK)
    assert all(torch.equal(x, y) for x, y in zip(noise, copies, strict=True))


@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
@pytest.mark.parametrize("give_back", [lambda z, t: z, lambda z, t: z.view(z.shape)])
def test_models_may_give_their_input_back(give_back, method):
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    clone = lambda z, t: z.clone()  # noqa: E731
    expected = sample(clone, clone, *noise, method=method, **WALK)
    assert torch.equal(sample(give_back, give_back, *noise, method=method, **WALK), expected)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver"])
def test_models_may_write_every_estimate_to_the_same_memory(solver):
    """As a network replayed from a CUDA graph does."""

    def reusing(model, buffers):
        def call(z, t):
            return buffers.setdefault(z.shape, torch.empty_like(z)).copy_(model(z, t))

        return call

    noise = noise_of((1, 3, 1, 4, 4))
    for method in ("two_phase", "interleaved"):
        walk = {**WALK, "solver": solver, "method": method}
        video = sample(reusing(base_model, {}), reusing(residual_model, {}), *noise, **walk)
        assert torch.equal(video, sample(base_model, residual_model, *noise, **walk))


def test_callback_reports_every_step():
    for method, phases in (("two_phase", ["base", "residual"]), ("interleaved", ["interleaved"])):
        calls: list[tuple] = []

        def callback(*call, calls=calls):
            calls.append(call)

        sample(
            base_model,
            residual_model,
            *noise_of((1, 2, 1, 4, 4)),
            method=method,
            callback=callback,
            **WALK,
        )
        assert calls == [(phase, k + 1, 8) for phase in phases for k in range(8)]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "parallel"}, ValueError, "method must be one of"),
        ({"base_path": "smooth"}, ValueError, "base_path must be one of"),
        ({"method": "interleaved", "base_path": "clean"}, ValueError, "two_phase"),
        ({"overlap_phases": True, "base_path": "clean"}, ValueError, "finishes the base frame"),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"eta": -1.0}, ValueError, "eta"),
        ({"spacing": "even"}, ValueError, "spacing"),
        ({"num_inference_steps": 0}, ValueError, "1 … 1000"),
        ({"num_inference_steps": 1001}, ValueError, "1 … 1000"),
        ({"lam": 1.5}, ValueError, "lam"),
        ({"lam": [0.5, 0.5]}, ValueError, "lam"),
        ({"base_seed": -1}, ValueError, "base_seed"),
        ({"residual_seed": 2**64}, ValueError, "residual_seed"),
        ({"base_noise": torch.zeros(1, 3, 1, 4, 4)}, ValueError, "base_noise must be"),
        ({"base_noise": torch.zeros(2, 1, 4, 4)}, ValueError, "does not fit"),
        ({"base_noise": torch.zeros(1, 1, 4, 5)}, ValueError, "does not fit"),
        ({"residual_noise": torch.zeros(1, 1, 4, 4)}, ValueError, "residual_noise must be"),
        ({"residual_noise": torch.zeros(1, 0, 1, 4, 4)}, ValueError, "residual_noise must be"),
        ({"base_noise": torch.zeros(1, 1, 4, 4).int()}, TypeError, "base_noise"),
        ({"base_model": lambda z, t: z[:, :, :2]}, ValueError, "base_model must return"),
        ({"residual_model": lambda z, t: (z, z)}, ValueError, "residual_model must return"),
    ],
)
@pytest.mark.parametrize("method", ["two_phase", "interleaved"])
def test_rejects(method, change, error, message):
    noise = noise_of((1, 3, 1, 4, 4), torch.float32)
    arguments = {
        "base_model": base_model,
        "residual_model": residual_model,
        "base_noise": noise.base,
        "residual_noise": noise.residual,
        "method": method,
        **WALK,
    }
    with pytest.raises(error, match=message):
        sample(**{**arguments, **change})


@pytest.mark.parametrize("change", [{"lam": 2.0}, {"residual_seed": -1}])
def test_refuses_residual_arguments_before_the_base_phase_runs(change):
    base = Counted(base_model)
    with pytest.raises(ValueError):
        sample(base, residual_model, *noise_of((1, 3, 1, 4, 4)), **change, **WALK)
    assert base.shapes == []


def test_rejects_a_path_of_another_schedule_or_picture():
    path = sample_base(base_model, base_noise((2, 1, 4, 4), 0), **WALK)
    with pytest.raises(ValueError, match="noise schedule"):
        sample_residual(
            residual_model,
            path,
            residual_noise((2, 3, 1, 4, 4), 1),
            schedule=NoiseSchedule.cosine(1000),
        )
    for shape in ((3, 3, 1, 4, 4), (2, 3, 1, 4, 5), (2, 3, 2, 4, 4)):
        with pytest.raises(ValueError, match="base path"):
            sample_residual(residual_model, path, residual_noise(shape, 1))
