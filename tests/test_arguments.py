"""What Python code may pass as an int or a number; everything else is refused by name."""

import numpy as np
import pytest
import torch

import vfengine
from vfengine.arguments import as_float, as_int
from vfengine.diffusion.noise import decomposed_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.pipelines.request import SamplingRequest, TextRequest, VideoRequest

SCHEDULE = NoiseSchedule.linear(10)
NOISE = decomposed_noise((1, 3, 1, 4, 4), 0, 1)


def test_ints():
    for value in (3, np.int8(3), np.uint64(3), torch.tensor(3), np.array(3)):
        assert type(as_int(value)) is int and as_int(value) == 3
    for value in (True, np.True_, torch.tensor(True), 3.0, np.float64(3), "3", None, [3], 3j):
        assert as_int(value) is None


def test_numbers():
    for value in (2, 2.0, np.float16(2), np.int64(2), torch.tensor(2.0)):
        assert type(as_float(value)) is float and as_float(value) == 2
    for value in (
        True,
        np.True_,
        "2",
        None,
        [2.0],
        torch.tensor([2.0]),
        2j,
        np.complex64(2),
    ):
        assert as_float(value) is None


@pytest.mark.parametrize("kind", [VideoRequest, SamplingRequest, TextRequest])
def test_requests_keep_plain_numbers(kind):
    prompt = {"prompt": "a bird"} if kind is TextRequest else {}
    settings = {
        "num_frames": np.int64(4),
        "num_videos": torch.tensor(2),
        "sample_offset": np.int8(1),
    }
    request = kind(**prompt, **settings, guidance_scale=np.float32(2), eta=np.float64(0.5))
    made = [getattr(request, name) for name in (*settings, "guidance_scale", "eta")]
    assert made == [4, 2, 1, 2.0, 0.5] and [type(n) for n in made] == [int] * 3 + [float] * 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"label": (x for x in ["walk"])}, TypeError, "label must be a text or a list of texts"),
        ({"label": 3}, TypeError, "label must be a text or a list of texts, got int"),
        ({"num_frames": True}, ValueError, "num_frames must be an int of at least 1, got True"),
        ({"num_frames": np.array([4])}, ValueError, "num_frames must be an int"),
        ({"guidance_scale": "2"}, ValueError, "guidance_scale must be in"),
        ({"guidance_scale": None}, ValueError, "guidance_scale must be in"),
        ({"trajectory": "path"}, TypeError, "trajectory must be a BaseTrajectory, got str"),
        ({"loop": "yes"}, TypeError, "loop must be True or False, got 'yes'"),
        ({"overlap_phases": 3}, TypeError, "overlap_phases must be True or False, got 3"),
    ],
)
def test_requests_refuse(settings, error, message):
    with pytest.raises(error, match=message):
        SamplingRequest(**settings)


def base(**changes):
    settings = {"base_noise": NOISE.base, "schedule": SCHEDULE, "num_inference_steps": 3, **changes}
    return vfengine.sample_base(lambda z, t: 0.1 * z, **settings)


def test_samplers_take_ints_and_numbers_of_numpy():
    expected = base(base_seed=5, eta=0.5, solver="ddim", sample_offset=2).states
    given = {"base_seed": np.uint64(5), "eta": np.float32(0.5), "sample_offset": torch.tensor(2)}
    assert torch.equal(base(**given, num_inference_steps=np.int16(3)).states, expected)
    given = (lambda z, t: 0.1 * z), base(), NOISE.residual
    clips = [
        vfengine.sample_residual(*given, lam=lam, window=window)
        for lam, window in ((0.5, 3), (np.float64(0.5), np.int64(3)))
    ]
    assert torch.equal(*clips)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base_noise": None}, TypeError, "base_noise must be a tensor, got NoneType"),
        ({"base_noise": NOISE.base.numpy()}, TypeError, "base_noise must be a tensor, got ndarray"),
        ({"schedule": 1000}, TypeError, "schedule must be a NoiseSchedule, got int"),
        ({"num_inference_steps": True}, ValueError, "num_inference_steps must be an int in 1"),
        ({"eta": True}, ValueError, "eta must be a number"),
        ({"base_seed": True}, TypeError, "base_seed must be an int, got bool"),
        ({"base_seed": 2**64}, ValueError, "base_seed must be in"),
        ({"sample_offset": 1.5}, ValueError, "sample_offset must be an int in"),
        ({"callback": 3}, TypeError, "callback must be callable"),
    ],
)
def test_samplers_refuse(changes, error, message):
    with pytest.raises(error, match=message):
        base(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": None}, TypeError, "path must be a BaseTrajectory, got NoneType"),
        ({"residual_noise": None}, TypeError, "residual_noise must be a tensor"),
        ({"residual_model": 3}, TypeError, "a model must be callable"),
        ({"schedule": "linear"}, TypeError, "schedule must be a NoiseSchedule, got str"),
        ({"lam": "x"}, TypeError, "lam must be a number or"),
        ({"lam": True}, TypeError, "lam must be a number or"),
        ({"lam": None}, TypeError, "lam must be a number or"),
        ({"window": True}, ValueError, "window must be an int, got True"),
    ],
)
def test_residual_samplers_refuse(changes, error, message):
    given = {"residual_model": lambda z, t: z, "path": base(), "residual_noise": NOISE.residual}
    with pytest.raises(error, match=message):
        vfengine.sample_residual(**{**given, **changes})


def test_noise_refuses_sizes_that_are_no_ints():
    assert decomposed_noise(tuple(map(np.int64, (1, 2, 1, 2, 2))), 0, 1).residual.shape[1] == 2
    for size in (1.5, True, -1, 0, "1"):
        with pytest.raises(ValueError, match="positive sizes"):
            decomposed_noise((size, 2, 1, 2, 2), 0, 1)
