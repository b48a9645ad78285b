"""From fields to settings: defaults, bounds and refusals of each kind of model."""

from dataclasses import replace

import pytest
from api_server import INFO, PROMPTED

from vfengine.serving.errors import ApiError, shown
from vfengine.serving.jobs import Job
from vfengine.serving.request_forms import Bounds, create, extend, remix

BOUNDS = Bounds(steps=50, seconds=2.0, scale=3)  # 16 frames of the tiny model
PLAIN = replace(
    INFO,
    kind="plain",
    base_paths=(),
    base_path=None,
    animates_pictures=False,
    has_base=False,
    least_loop=None,
)
TEXT = replace(PLAIN, kind="text", labels=(), takes_prompts=True, guidance_scale=9.0, least_loop=3)
FEW = replace(PROMPTED, steps=4, only_steps=(4,), guidance_range=(1.0, 4.0), takes_negatives=False)
BOTH = replace(PROMPTED, labels=("jump", "walk"))


def made(info=INFO, picture=False, **values):
    return create(values, picture, info, BOUNDS)


def refusal(call, *args, **values) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*args, **values)
    assert caught.value.status in (400, 404)
    return caught.value


def job_of(draft, info=INFO, **changes) -> Job:
    values = {"status": "completed", "model": info.name, "created_at": 0.0, **changes}
    names = ("settings", "seconds", "size")
    return Job(id="video_0", **{name: getattr(draft, name) for name in names}, **values)


@pytest.mark.parametrize(
    "values, fps, frames, seconds",
    [
        ({}, 8, 4, "0.5"),
        ({"seconds": "1"}, 8, 8, "1"),
        ({"seconds": 1}, 8, 8, "1"),
        ({"seconds": "1.50"}, 8, 12, "1.5"),
        ({"seconds": 2.0}, 8, 16, "2"),
        ({"seconds": "0.01"}, 8, 1, "0.01"),
        ({"num_frames": "16"}, 8, 16, "2"),
        ({"num_frames": 5}, 8, 5, "0.625"),
        ({"fps": 16}, 16, 4, "0.25"),
        ({"fps": "2", "seconds": "8"}, 2, 16, "8"),
        ({"fps": 10, "num_frames": 10, "seconds": "1"}, 10, 10, "1"),
        ({"num_frames": 8.0}, 8, 8, "1"),
    ],
)
def test_lengths(values, fps, frames, seconds):
    draft = made(prompt="jump", **values)
    settings = draft.settings
    assert (settings.fps, settings.num_frames, draft.seconds) == (fps, frames, seconds)


@pytest.mark.parametrize(
    "values, param",
    [
        ({"seconds": "2.1"}, "seconds"),
        ({"seconds": "0"}, "seconds"),
        ({"seconds": "-1"}, "seconds"),
        ({"seconds": "nan"}, "seconds"),
        ({"seconds": "inf"}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "1e9"}, "seconds"),
        ({"seconds": "4s"}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"seconds": [4]}, "seconds"),
        ({"seconds": "١"}, "seconds"),
        ({"num_frames": 17}, "num_frames"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 1.5}, "num_frames"),
        ({"num_frames": True}, "num_frames"),
        ({"num_frames": "1_0"}, "num_frames"),
        ({"num_frames": 9, "seconds": "1"}, "num_frames"),
        ({"fps": 0}, "fps"),
        ({"fps": 1000}, "fps"),
        ({"fps": 16, "seconds": "1.5"}, "seconds"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": 101}, "guidance_scale"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": "x"}, "guidance_scale"),
        ({"solver": "euler"}, "solver"),
        ({"solver": ["ddim"]}, "solver"),
        ({"eta": 0.5, "solver": "dpmsolver++"}, "eta"),
        ({"format": "avi"}, "format"),
        ({"format": "../mp4"}, "format"),
        ({"scale": 4}, "scale"),
        ({"size": "64x64"}, "size"),
        ({"size": "16x32"}, "size"),
        ({"size": "16"}, "size"),
        ({"size": 16}, "size"),
        ({"size": "32x32", "scale": 3}, "scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64 - 1}, "seed"),
        ({"residual_seed": 2**64}, "residual_seed"),
        ({"base_path": "other"}, "base_path"),
        ({"label": "run"}, "label"),
        ({"label": "walk"}, "label"),
        ({"model": 7}, "model"),
        ({"negative_prompt": "x"}, "negative_prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"nothing": 1}, "nothing"),
        ({"video": {"id": "video_0"}}, "video"),
    ],
)
def test_refused(values, param):
    assert refusal(made, **{"prompt": "jump", **values}).param == param


def test_sizes_and_scales():
    assert made(prompt="jump", size="48X48").settings.scale == 3
    assert made(prompt="jump", size="48×48").size == "48x48"
    assert made(prompt="jump", size="48x48", scale=3).size == "48x48"
    assert made(prompt="jump", scale="2").size == "32x32"


def test_the_models_own_length_is_always_allowed():
    assert create({"prompt": "jump"}, False, INFO, Bounds(seconds=0.01)).settings.num_frames == 4
    slow = replace(INFO, steps=500)
    assert create({"prompt": "jump"}, False, slow, BOUNDS).settings.num_inference_steps == 50


def test_what_is_shown():
    def what(info, **values):
        settings = made(info, **values).settings
        return settings.label, settings.prompt

    assert what(INFO, prompt=" Jump ") == ("jump", None)
    assert what(INFO, label="walk") == ("walk", None)
    assert what(INFO, label="walk", prompt="") == ("walk", None)
    assert what(INFO, label="walk", prompt="walk") == ("walk", None)
    assert what(INFO, prompt="") == (None, None)
    assert what(PROMPTED, prompt="a dog") == (None, "a dog")
    assert what(BOTH, prompt="jump") == (None, "jump")
    assert what(BOTH, prompt="", label="jump") == ("jump", None)
    assert refusal(made, BOTH, prompt="a dog", label="jump").param == "label"
    assert refusal(made).code == "missing_parameter"
    assert "prompt or label is missing" in str(refusal(made))
    assert what(INFO, picture=True) == (None, None)
    assert "one of cartwheel, jump, walk" in str(refusal(made, prompt="a dog"))
    many = replace(INFO, labels=tuple(f"label {i}" for i in range(100)))
    assert "label 29 and 70 more" in str(refusal(made, many, prompt="a dog"))


def test_seeds():
    def seeds(info=INFO, **values):
        settings = made(info, prompt="jump", **values).settings
        return settings.base_seed, settings.residual_seed

    assert seeds(seed=5) == (5, 6)
    assert seeds(seed="5", base_seed="9") == (9, 6)
    assert seeds(seed=2**64 - 2) == (2**64 - 2, 2**64 - 1)
    assert seeds(base_seed=1, residual_seed=1) == (1, 1)
    assert seeds(TEXT, seed=5) == (5, 5)
    assert seeds(PLAIN, seed=5) == (5, 6)
    assert refusal(made, PLAIN, prompt="jump", base_seed=1).param == "base_seed"
    assert refusal(made, TEXT, prompt="a", residual_seed=1).param == "residual_seed"


def test_pictures():
    settings = made(picture=True, prompt="jump").settings
    assert settings.picture and settings.base_path is None
    assert refusal(made, PLAIN, picture=True, prompt="jump").code == "unsupported"
    assert refusal(made, picture=True, base_seed=1).param == "base_seed"
    assert refusal(made, picture=True, base_path="stepwise").param == "base_path"
    assert made(picture=True, base_path="clean").settings.picture


def test_solvers():
    settings = made(prompt="jump", eta=0.5).settings
    assert (settings.solver, settings.eta) == ("ddim", 0.5)
    assert made(prompt="jump", solver="ddpm").settings.eta == 0
    assert refusal(made, PLAIN, prompt="jump", base_path="clean").param == "base_path"


def test_the_usual_steps_are_those_of_the_models_solver():
    few = replace(INFO, steps=8, solver="unipc", solvers=("ddim", "unipc"))

    def taken(**values):
        settings = made(few, prompt="jump", **values).settings
        return settings.solver, settings.num_inference_steps

    assert taken() == taken(solver="unipc") == ("unipc", 8)
    assert taken(solver="ddim") == ("ddim", min(50, BOUNDS.steps))
    assert taken(num_inference_steps=5) == ("unipc", 5)
    assert taken(eta=0.5) == ("ddim", min(50, BOUNDS.steps))
    assert refusal(made, few, prompt="jump", eta=0.5, solver="unipc").param == "eta"
    source = job_of(made(few, prompt="jump", num_inference_steps=5), few)
    assert remixed(source, few, prompt="walk").settings.num_inference_steps == 5


def test_loops():
    assert not made(prompt="jump").settings.loop
    for on in (True, "true"):
        assert made(prompt="jump", loop=on).settings.loop
    assert not made(PLAIN, prompt="jump", loop="false").settings.loop
    assert refusal(made, PLAIN, prompt="jump", loop=True).param == "loop"
    for other in (1, "yes", [], 0.0):
        assert refusal(made, prompt="jump", loop=other).param == "loop"
    source = job_of(made(prompt="jump", loop=True))
    assert remixed(source).settings.loop and not extended(source).settings.loop
    for short in (
        refusal(made, prompt="jump", loop=True, num_frames=3),
        refusal(remixed, source, num_frames=3),
    ):
        assert short.param == "num_frames" and "4 frames at least" in short.message
    assert made(TEXT, prompt="a panda", loop=True, num_frames=3).settings.loop


def test_equal_requests_have_equal_shapes():
    named = made(prompt="jump", base_path="clean", guidance_scale=2, num_frames="4")
    assert named.settings.shape == made(prompt="walk").settings.shape


# -- remix -----------------------------------------------------------------------------------------


def remixed(source, info=INFO, **values):
    return remix(values, source, info, BOUNDS)


def test_a_remix_changes_what_is_asked_for():
    source = job_of(made(prompt="jump", seed=1, seconds="1", format="gif", scale=2))
    draft = remixed(source, seconds="2", format="webm")
    settings = draft.settings
    assert (settings.num_frames, settings.format, settings.scale) == (16, "webm", 2)
    assert (draft.seconds, draft.size, draft.remixed_from) == ("2", "32x32", "video_0")
    assert settings.base_seed == 1 and settings.residual_seed != 2
    same = remixed(source)
    assert (same.seconds, same.settings.num_frames, same.settings.fps) == ("1", 8, 8.0)
    for name in ("num_inference_steps", "base_seed", "guidance_scale", "input_reference"):
        assert refusal(remixed, source, **{name: 3}).code == "unknown_parameter"


def test_a_remix_of_another_models_clip():
    source = job_of(made(prompt="jump"), model="other")
    assert refusal(remixed, source).code == "model_mismatch"
    larger = replace(INFO, width=32)
    assert refusal(remixed, job_of(made(prompt="jump")), larger).code == "model_mismatch"


@pytest.mark.parametrize("info", [PLAIN, TEXT])
def test_a_remix_without_a_base_path_keeps_the_noise(info):
    source = job_of(made(info, prompt="jump", seed=5))
    old = (source.settings.base_seed, source.settings.residual_seed)

    def seeds(**values):
        settings = remixed(source, info, **values).settings
        assert settings.look is None
        return settings.base_seed, settings.residual_seed

    assert seeds(prompt="walk") == old
    assert seeds(prompt="jump") != old
    assert seeds(prompt="jump", seed=9) == ((9, 9) if info is TEXT else (9, 10))


# -- extensions ------------------------------------------------------------------------------------


def extended(source, info=INFO, **values):
    return extend(values, source, info, BOUNDS)


def test_an_extension_inherits_and_adds():
    source = job_of(made(prompt="jump", seconds="1", num_inference_steps=7, scale=2, format="gif"))
    draft = extended(source, prompt="walk", seconds="0.5")
    settings = draft.settings
    assert (settings.num_frames, settings.extends, settings.label) == (4, "video_0", "walk")
    assert (settings.num_inference_steps, settings.scale, settings.format) == (7, 2, "gif")
    assert (draft.seconds, draft.size) == ("1.5", "32x32")
    assert settings.base_path is None and settings.look is None and not settings.picture
    long = replace(source, result={"num_frames": 24})  # was an extension itself
    assert extended(long, seconds="1").seconds == "4"
    assert extended(source).settings.num_frames == 2


def test_extensions_that_are_refused():
    source = job_of(made(prompt="jump", seconds="1"))
    assert extended(source, seconds="2").seconds == "3"  # as much may be added as may be made
    assert refusal(extended, source, seconds="2.5").param == "seconds"
    assert refusal(extended, source, fps=4).param == "fps"
    assert refusal(extended, source, scale=2).param == "size"
    assert refusal(extended, source, base_seed=2).param == "base_seed"
    assert refusal(extended, replace(source, status="queued")).code == "video_not_ready"
    endless = replace(source, result={"num_frames": 160})
    assert refusal(extended, endless, seconds="1").param == "seconds"
    for info in (PLAIN, TEXT, replace(INFO, animates_pictures=False)):
        assert refusal(extended, job_of(made(prompt="jump")), info).code == "unsupported"


def test_an_extension_of_an_upload():
    draft = extended(None, prompt="walk", seconds="0.5", size="48x48", fps=16)
    settings = draft.settings
    assert (settings.extends, settings.num_frames, settings.scale) == ("", 8, 3)
    assert (draft.seconds, settings.fps) == ("0.5", 16)


def test_a_remix_of_an_extension_keeps_its_length():
    source = job_of(extended(job_of(made(prompt="jump")), seconds="0.5"))
    draft = remixed(source, prompt="jump")
    assert (draft.seconds, draft.settings.extends) == ("1", "video_0")
    assert refusal(remixed, source, seconds="1").param == "seconds"


def test_values_are_shown_short_and_harmless():
    assert shown("a" * 500) == "'" + "a" * 76 + "..."
    assert shown("\x1b[31m\r\n\u202e") == "'\\x1b[31m\\r\\n\\u202e'"
    assert shown({"a": [1] * 10**5}) == "an object" and shown([]) == "a list"


def test_a_distilled_model_takes_what_it_was_made_for():
    draft = made(FEW, prompt="a walk", num_inference_steps=4, guidance_scale=4, negative_prompt="")
    assert (draft.settings.num_inference_steps, draft.settings.guidance_scale) == (4, 4)
    for values, param in (
        ({"num_inference_steps": 20}, "num_inference_steps"),
        ({"guidance_scale": 4.5}, "guidance_scale"),
        ({"guidance_scale": 0}, "guidance_scale"),
        ({"negative_prompt": "red"}, "negative_prompt"),
        ({"eta": 0.5}, "eta"),
    ):
        error = refusal(made, FEW, prompt="a walk", **values)
        assert error.param == param
