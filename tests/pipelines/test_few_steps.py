"""Distilled models: sampled in the steps that they were made for, and in no others."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU, save_random, save_tiny, tiny_config
from few_step_models import save_latent_student, save_student

import vfengine as vf
from vfengine.diffusion.noise import base_noise, residual_noise
from vfengine.formats.checkpoint import DecomposedConfig, load_network, read_config
from vfengine.formats.few_steps import UsualSteps
from vfengine.pipelines.clip_settings import clip_settings
from vfengine.pipelines.forecast import forecast
from vfengine.pipelines.request import SamplingRequest
from vfengine.pipelines.together import sample_together
from vfengine.serving.engine import model_info

TIMESTEPS = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Both networks of four steps; its base path is clean unless one is named."""
    return save_student(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The base network of four steps, beside a residual network that is no student."""
    return save_student(tmp_path_factory.mktemp("models") / "half", names=("base",))


def loaded(folder):
    return vf.VideoFusionPipeline.from_pretrained(folder, **ON_CPU)


def restated(folder, label: int, scale: float, base_path: str) -> np.ndarray:
    """A clip of seeds 0 and 1 by `sample` and the networks themselves, in 0..1."""
    config = read_config(folder)
    told = {"class_labels": torch.tensor([label]), "guidance": scale}
    networks = [load_network(folder, config, name) for name in ("base", "residual")]
    models = [lambda z, t, _net=net: _net(z, t, **told) for net in networks]
    shape = (1, 4, 3, 16, 16)
    noise = base_noise((1, 3, 16, 16), 0), residual_noise(shape, 1)
    how = {"schedule": config.noise_schedule(), "timesteps": TIMESTEPS, "base_path": base_path}
    clip = vf.sample(*models, *noise, lam=config.lam, **how)
    return (clip.clamp(-1, 1) + 1).div(2).movedim(2, -1).numpy()


@pytest.mark.parametrize("base_path", ["clean", "stepwise"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_clip_is_that_of_the_networks_told_the_scale(student, scale, base_path):
    out = loaded(student)("jump", guidance_scale=scale, base_path=base_path)
    assert out.trajectory.timesteps.tolist() == TIMESTEPS
    expected = restated(student, 1, scale, base_path)
    np.testing.assert_allclose(out.frames, expected, atol=2e-5)
    others = loaded(student)("jump", guidance_scale=3.0, base_path=base_path).frames
    assert np.abs(others - out.frames).max() > 1e-3


def test_its_own_number_of_steps_may_be_said(student):
    pipe = loaded(student)
    first, second = pipe("walk").frames, pipe("walk", num_inference_steps=4).frames
    assert np.array_equal(first, second)


def test_what_it_was_not_made_for_is_refused_before_a_step(student):
    pipe = loaded(student)
    for words, settings in (
        ("distilled to 4 steps.* num_inference_steps=50", {"num_inference_steps": 50}),
        ("distilled for the solver ddim: unipc", {"solver": "unipc"}),
        ("adds? no noise, but eta=0.5", {"eta": 0.5}),
        ("from 1 to 4, got guidance_scale=4.5", {"guidance_scale": 4.5}),
        ("from 1 to 4, got guidance_scale=0.5", {"guidance_scale": 0.5}),
    ):
        with pytest.raises(ValueError, match=words):
            pipe("walk", **settings)
        with pytest.raises(ValueError, match=words):
            pipe.preview("walk", **settings)
    assert pipe("walk", guidance_scale=4.0).frames.shape == (1, 4, 16, 16, 3)


def test_motions_windows_loops_and_overlap_are_those_of_any_model(student):
    pipe = loaded(student)
    motions = pipe("walk", num_residuals=3).frames
    alone = pipe("walk", sample_offset=2, base_offset=0).frames
    assert np.array_equal(motions[2], alone[0])
    assert np.array_equal(motions[0, 2], motions[1, 2])  # one base frame
    assert pipe("walk", num_frames=9).frames.shape[1] == 9
    assert pipe("walk", loop=True).frames.shape[1] == 4
    stepwise = pipe("walk", base_path="stepwise").frames
    overlapped = pipe("walk", base_path="stepwise", overlap_phases=True).frames
    assert np.array_equal(stepwise, overlapped)


def test_a_picture_is_animated_in_its_steps(student):
    pipe, picture = loaded(student), torch.rand(3, 16, 16)
    out = pipe("walk", image=picture)
    assert out.trajectory.timesteps.tolist() == TIMESTEPS
    np.testing.assert_allclose(out.frames[0, 2], picture.movedim(0, -1).numpy(), atol=1 / 250)
    with pytest.raises(ValueError, match="distilled to 4 steps"):
        pipe("walk", image=picture, num_inference_steps=20)


def test_a_preview_and_a_kept_path_are_those_of_the_clip(student, tmp_path):
    pipe = loaded(student)
    clip, preview = pipe("walk"), pipe.preview("walk")
    assert np.array_equal(preview.frames[0, 0], clip.frames[0, 2])
    again = pipe("walk", trajectory=preview.trajectory, num_inference_steps=4)
    assert np.array_equal(again.frames, clip.frames)
    for _ in range(2):
        cached = pipe("walk", base_cache=tmp_path / "paths")
        assert np.array_equal(cached.frames, clip.frames)


def test_a_path_of_other_steps_is_refused(student):
    other = loaded(student)
    path = vf.BaseTrajectory.from_image(
        torch.rand(1, 3, 16, 16), schedule=other.schedule, num_inference_steps=4
    )
    with pytest.raises(ValueError, match="timesteps"):
        other("walk", trajectory=path)


def test_networks_of_different_steps_go_by_the_finished_frame(half):
    pipe, phases = loaded(half), {}
    out = pipe("walk", callback=lambda phase, done, total: phases.update({phase: total}))
    assert phases == {"base": 4, "residual": 50}
    phases.clear()
    pipe("walk", num_inference_steps=7, callback=lambda p, d, total: phases.update({p: total}))
    assert phases == {"base": 4, "residual": 7}
    assert out.trajectory.timesteps.tolist() == TIMESTEPS
    other = pipe("walk", num_inference_steps=7, solver="unipc")
    assert other.trajectory.table.solver == "ddim"
    assert not np.array_equal(other.frames, pipe("walk", num_inference_steps=7).frames)
    with pytest.raises(ValueError, match="distilled for the solver ddim: unipc"):
        pipe.preview("walk", solver="unipc")
    for settings in ({"base_path": "stepwise"}, {"overlap_phases": True}):
        with pytest.raises(ValueError, match="from t = 999, and the residual network 50 steps"):
            pipe("walk", **settings)
    with pytest.raises(ValueError, match="distilled to 4 steps"):
        pipe.preview("walk", num_inference_steps=7)


def test_plans_tell_the_steps_of_each_phase(half, student):
    found = forecast(loaded(half), SamplingRequest(label="walk"))
    assert (found.steps["base"], found.steps["residual"]) == (4, 50)
    assert (found.calls["base"], found.calls["residual"]) == (4, 100)  # the second one is guided
    both = forecast(loaded(student), SamplingRequest(label="walk"))
    assert both.calls == {"base": 4, "residual": 4}


def test_clips_made_together_are_those_made_alone(student):
    pipe = loaded(student)
    requests = [
        SamplingRequest(label=label, base_seed=k, residual_seed=9 - k)
        for k, label in enumerate(("walk", "jump"))
    ]
    alone = [pipe.sample(request).frames for request in requests]
    together = sample_together(pipe, requests)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other.frames)


def test_a_model_of_prompts_takes_no_negative_one(tmp_path):
    pipe = vf.VideoFusionPipeline.from_pretrained(save_latent_student(tmp_path / "m"), **ON_CPU)
    out = pipe(prompt="a person walking")
    assert out.frames.shape[:2] == (1, 4)
    nothing = pipe(prompt="")
    assert np.isfinite(nothing.frames).all()
    with pytest.raises(ValueError, match="takes no negative_prompt"):
        pipe(prompt="a person walking", negative_prompt="red")


def test_another_base_network_is_no_student(student, tmp_path):
    unet = vf.models.UNet(
        vf.models.UNetConfig(
            block_out_channels=(16, 16),
            head_dim=8,
            layers_per_block=(1, 1),
            spatial_attention=(False, False),
            temporal_attention=(False, False),
            temporal_conv=(False, False),
        )
    )
    pipe = vf.VideoFusionPipeline.from_pretrained(student, base_unet=unet.eval(), **ON_CPU)
    phases = {}
    pipe("walk", callback=lambda phase, done, total: phases.update({phase: total}))
    assert phases == {"base": 50, "residual": 4}


def test_a_server_names_what_it_was_made_for(student, half, tmp_path):
    info = model_info(loaded(student), "few", 1)
    assert (info.steps, info.only_steps, info.guidance_range) == (4, (4,), (1.0, 4.0))
    assert (info.solvers, info.takes_negatives) == (("ddim",), False)
    info = model_info(loaded(half), "half", 1)
    assert (info.steps, info.only_steps) == (50, ())
    info = model_info(loaded(save_tiny(tmp_path / "any")), "any", 1)
    assert (info.steps, info.only_steps, info.guidance_range) == (50, (), (0, 100))


# -- the checkpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"timesteps": [249, 999]}, "must descend"),
        ({"timesteps": []}, "must be whole numbers"),
        ({"timesteps": [999.0]}, "must be whole numbers"),
        ({"timesteps": [1200, 3]}, "begins at 1200 of 1000 steps"),
        ({"guidance": [3, 1]}, "must not descend"),
        ({"guidance": [1, 200]}, "out of range"),
        ({"guidance": 2}, "two numbers"),
        ({"solver": "unipc"}, 'must be "ddim"'),
        ({"teacher": 3}, "must be a text"),
        ({"steps": 4}, "another version"),
    ],
)
def test_odd_entries_are_refused_by_name(student, tmp_path, change, words):
    entries = json.loads((student / "config.json").read_text())
    entries["distilled"]["base"] |= change
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"distilled": None}, "base has a guidance_embedding, but was not distilled"),
        ({"distilled": {}}, "must be an object of networks"),
        ({"distilled": 3}, "must be an object"),
        ({"distilled": {"video": {"timesteps": [9], "guidance": [1, 4]}}}, "none of its networks"),
    ],
)
def test_odd_networks_are_refused_by_name(student, tmp_path, change, words):
    entries = json.loads((student / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=words):
        read_config(tmp_path)


def test_a_network_without_its_embedding_is_refused(student, tmp_path):
    entries = json.loads((student / "config.json").read_text())
    entries["base"]["guidance_embedding"] = False
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="base is distilled, but has no guidance_embedding"):
        read_config(tmp_path)


# -- the usual steps -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    steps = UsualSteps(solver="unipc", num_inference_steps=5)
    config = tiny_config(base_path="clean", usual_steps=steps)
    return save_random(tmp_path_factory.mktemp("usual") / "tiny", config)


@pytest.mark.parametrize(
    "asked, taken",
    [
        ({}, (5, "unipc", 0.0)),
        ({"num_inference_steps": 3}, (3, "unipc", 0.0)),
        ({"solver": "unipc"}, (5, "unipc", 0.0)),
        ({"solver": "ddim"}, (50, "ddim", 0.0)),
        ({"eta": 0.5}, (50, "ddim", 0.5)),
        ({"solver": "ddpm", "num_inference_steps": 4}, (4, "ddpm", 0.0)),
    ],
)
def test_a_checkpoint_names_its_usual_steps(asked, taken, usual):
    pipe = loaded(usual)
    table = pipe.preview("walk", **asked).trajectory.table
    assert (len(table), table.solver) == taken[:2]
    filled = pipe.fill_defaults(SamplingRequest(label="walk", **asked))
    assert (filled.num_inference_steps, filled.solver, filled.eta) == taken
    assert clip_settings(pipe, filled)["settings"]["solver"] == taken[1]


def test_a_model_that_names_no_steps_takes_fifty_of_ddim(tiny_checkpoint):
    table = loaded(tiny_checkpoint).preview("walk").trajectory.table
    assert (len(table), table.solver) == (50, "ddim")


def test_an_eta_beside_a_solver_without_noise_is_refused(usual):
    with pytest.raises(ValueError, match="unipc is deterministic"):
        loaded(usual)("walk", solver="unipc", eta=0.5)


def test_the_usual_steps_are_kept_in_the_folder(usual, tmp_path):
    config = read_config(usual)
    assert config.usual_steps == UsualSteps(solver="unipc", num_inference_steps=5)
    assert DecomposedConfig.from_json(config.to_json()) == config
    for changed, words in (
        ({"solver": "euler"}, "solver must be one of"),
        ({"num_inference_steps": 0}, "must be an int from 1 to 1000, got 0"),
        ({"num_inference_steps": True}, "must be an int from 1 to 1000, got True"),
        ({"steps": 3}, "unexpected keyword argument"),
        ({"timesteps": 3}, "must be rows of whole numbers, got 3"),
        ({"timesteps": [9, 4]}, "must be whole numbers, got 9"),
        ({"timesteps": [[]]}, "must be whole numbers"),
        ({"timesteps": [[9, True]]}, "must be whole numbers"),
        ({"timesteps": [[4, 9]]}, "must descend"),
        ({"timesteps": [[9, 4], [8, 1]]}, "one row for a number of steps, got two"),
        ({"timesteps": [[5], [1000, 1]]}, "a row begins at 1000 of 1000 steps"),
    ):
        values = json.loads(config.to_json())
        values["usual_steps"] = changed
        with pytest.raises(ValueError, match=words):
            DecomposedConfig.from_json(json.dumps(values))
    with pytest.raises(TypeError, match="usual_steps must be UsualSteps"):
        replace(config, usual_steps=8)


def test_a_model_names_timesteps_for_some_numbers_of_steps(usual):
    steps = UsualSteps(solver="unipc", num_inference_steps=5, timesteps=((900, 300), (999, 2, 0)))
    config = replace(read_config(usual), usual_steps=steps)
    assert DecomposedConfig.from_json(config.to_json()) == config
    pipe = loaded(usual)
    pipe.config = config
    for asked, visited in (
        ({"num_inference_steps": 2}, [900, 300]),
        ({"num_inference_steps": 3}, [999, 2, 0]),
        ({"num_inference_steps": 4}, [999, 749, 499, 249]),
        ({"num_inference_steps": 2, "solver": "dpmsolver"}, [999, 499]),
    ):
        path = pipe.preview("walk", **asked).trajectory
        assert path.table.timesteps.tolist() == visited
        clip = pipe("walk", **asked)  # both phases take them
        assert np.array_equal(pipe("walk", trajectory=path, **asked).frames, clip.frames)
    named = pipe("walk", num_inference_steps=2)
    assert not np.array_equal(loaded(usual)("walk", num_inference_steps=2).frames, named.frames)


def test_paths_of_the_usual_steps_are_followed_and_others_named(usual):
    pipe = loaded(usual)
    clip = pipe("walk")
    again = pipe("walk", trajectory=pipe.preview("walk").trajectory)
    assert np.array_equal(again.frames, clip.frames)
    other = pipe.preview("walk", solver="ddim", num_inference_steps=5).trajectory
    with pytest.raises(ValueError, match="made with solver ddim, but unipc is asked for"):
        pipe("walk", trajectory=other)


def test_a_server_takes_the_usual_steps(usual):
    info = model_info(loaded(usual), "usual", 1)
    assert (info.steps, info.solver, info.only_steps) == (5, "unipc", ())
    assert "ddim" in info.solvers
