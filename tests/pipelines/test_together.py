"""Requests in one batch: the bits of each made alone, base paths walked once, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from latent_models import PROMPTS, save_latent_model
from PIL import Image
from seeded import normal

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.pipelines.request import SamplingRequest
from vfengine.pipelines.together import base_frame, keep_networks, sample_together
from vfengine.pipelines.videofusion import VideoFusionPipeline, to_uint8

STEPS = 3
LABELS = [{"label": label} for label in ("walk", "jump", None, "walk")]
TEXTS = [
    {"prompt": PROMPTS[0]},
    {"prompt": PROMPTS[1], "negative_prompt": "blue"},
    {"prompt": "red", "negative_prompt": "red"},
    {"label": "walk"},
]
SHOWN = {"pixels": LABELS, "latents": TEXTS}


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp("models") / "latents")


@pytest.fixture(params=["pixels", "latents"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind, tiny_checkpoint, latent_folder):
    folder = {"pixels": tiny_checkpoint, "latents": latent_folder}[kind]
    return VideoFusionPipeline.from_pretrained(folder, **ON_CPU)


def requests_for(kind, **settings):
    """Requests of different seeds, prompts or labels; the last two share a base seed."""
    return [
        SamplingRequest(
            **{"num_inference_steps": STEPS, "base_seed": min(k, 2), "residual_seed": 7 + k},
            **{**shown, **settings},
        )
        for k, shown in enumerate(SHOWN[kind])
    ]


def walked(pipe, requests, **more):
    """What sample_together makes, and the steps of the base phase that it took."""
    steps = []
    outputs = sample_together(pipe, requests, callback=lambda *step: steps.append(step), **more)
    return outputs, [step for step in steps if step[0] == "base" and step[1] > 0]


def assert_same(alone, together):
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert torch.equal(one.trajectory.states, other.trajectory.states)
        assert one.trajectory.base_path == other.trajectory.base_path


@pytest.mark.parametrize("base_path, scale", [("stepwise", 2.0), ("clean", 1.0)])
def test_together_as_alone(pipe, kind, tmp_path, base_path, scale):
    requests = requests_for(kind, base_path=base_path, guidance_scale=scale)
    alone = [pipe.sample(request) for request in requests]
    assert_same(alone, sample_together(pipe, requests))
    for expected in (STEPS, 0):  # walked, then found
        outputs, steps = walked(pipe, requests, base_cache=tmp_path / "paths")
        assert len(steps) == expected
        assert_same(alone, outputs)
    cached = [pipe.sample(replace(r, base_cache=tmp_path / "paths")) for r in requests]
    assert_same(cached, outputs)  # found by one pipeline where the other keeps them
    assert len(list((tmp_path / "paths").iterdir())) == 4


@pytest.mark.parametrize("settings", [{"num_frames": 7}, {"solver": "dpmsolver++"}, {"lam": 0.25}])
def test_together_at_other_settings(pipe, kind, settings):
    requests = requests_for(kind, **settings)
    assert_same([pipe.sample(request) for request in requests], sample_together(pipe, requests))


def test_equal_paths_are_walked_once(pipe, kind, tmp_path, monkeypatch):
    batches = []
    base = pipe._session.base

    def counted(noise, *rest):
        batches.append(len(noise))
        return base(noise, *rest)

    monkeypatch.setattr(pipe._session, "base", counted)
    first, second = requests_for(kind)[:2]
    motions = [replace(first, residual_seed=seed) for seed in range(3)]
    outputs = sample_together(pipe, [*motions, second], base_cache=tmp_path)
    assert batches == [2]
    assert not np.array_equal(outputs[0].frames, outputs[1].frames)
    assert torch.equal(outputs[0].trajectory.states, outputs[2].trajectory.states)
    alone = [pipe.sample(request) for request in [*motions, second]]
    assert_same(alone, outputs)
    batches.clear()
    sample_together(pipe, motions)  # without a folder too
    assert batches == [1]


def test_pictures_together(pipe, kind):
    if kind == "pixels":  # its residual network has to have seen exact base noise
        pipe.config = replace(pipe.config, clean_share=0.5)
    pixels = (normal(3, 20, 24, 3).clamp(0, 1) * 255).byte().numpy()
    requests = [
        replace(request, image=Image.fromarray(picture))
        for request, picture in zip(requests_for(kind), pixels, strict=False)
    ]
    alone = [pipe.sample(request) for request in requests]
    outputs, steps = walked(pipe, requests)
    assert_same(alone, outputs)
    assert not steps and outputs[0].trajectory.base_path == "clean"


def test_a_look_of_another_prompt(pipe, kind, tmp_path):
    look, other = requests_for(kind)[:2]
    request = replace(
        look, label=other.label, prompt=other.prompt, negative_prompt=other.negative_prompt
    )
    path = pipe.sample(look).trajectory
    alone = pipe.sample(replace(request, trajectory=path))
    for expected in (STEPS, 0):
        (output,), steps = walked(pipe, [request], looks=[look], base_cache=tmp_path)
        assert len(steps) == expected
        assert_same([alone], [output])
    assert not np.array_equal(pipe.sample(request).frames, alone.frames)
    assert walked(pipe, [look], base_cache=tmp_path)[1] == []  # the path is the look's


def test_the_base_frame_is_there_before_the_clips(pipe, kind):
    requests, shown, phases = requests_for(kind), {}, []

    def on_base(index, path):
        assert "residual" not in phases
        shown[index] = base_frame(pipe, path)
        return index != 1

    outputs = sample_together(
        pipe, requests, on_base=on_base, callback=lambda phase, *_: phases.append(phase)
    )
    assert outputs[1] is None  # no longer wanted
    for index in (0, 2, 3):
        frames = outputs[index].frames[0]
        assert np.array_equal(to_uint8(frames[len(frames) // 2]), shown[index])
        assert_same([pipe.sample(requests[index])], [outputs[index]])
    before = len(phases)
    nothing = sample_together(
        pipe, requests, on_base=lambda *_: False, callback=lambda phase, *_: phases.append(phase)
    )
    assert nothing == [None] * 4 and "residual" not in phases[before:]


def test_a_damaged_path_is_walked_again(pipe, kind, tmp_path):
    (request,) = requests_for(kind)[:1]
    whole = sample_together(pipe, [request], base_cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="walked again"):
        outputs, steps = walked(pipe, [request], base_cache=tmp_path)
    assert len(steps) == STEPS
    assert_same(whole, outputs)
    assert torch.equal(BaseTrajectory.load(file).states, whole[0].trajectory.states)


def test_networks_stay(pipe, kind):
    keep_networks(pipe)
    networks = dict(pipe._session.networks)
    assert networks.keys() == (
        {"base", "residual"} | ({"text", "decode"} if kind == "latents" else set())
    )
    sample_together(pipe, requests_for(kind))
    assert all(pipe._session.networks[name] is network for name, network in networks.items())


def test_what_cannot_go_together(pipe, kind, tmp_path):
    first, second = requests_for(kind)[:2]
    for settings, said in (
        ({"num_frames": 5}, "num_frames, got 4 and 5"),
        ({"guidance_scale": 3.0}, "guidance_scale, got 2.0 and 3.0"),
        ({"num_inference_steps": 4}, "num_inference_steps, got 3 and 4"),
        ({"num_videos": 2}, "requests of one clip"),
        ({"base_cache": tmp_path}, "the batch's own"),
        ({"eta": 0.5}, "eta 0.5 cannot be made together"),
    ):
        with pytest.raises(ValueError, match=said):
            sample_together(pipe, [first, replace(second, **settings)])
    with pytest.raises(ValueError, match="got 1 of 2"):
        sample_together(pipe, [first, second], looks=[first])
    with pytest.raises(ValueError, match="its request's base_seed"):
        sample_together(pipe, [first], looks=[replace(first, base_seed=9)])
    with pytest.raises(ValueError, match="got 0 of 0"):
        sample_together(pipe, [])
