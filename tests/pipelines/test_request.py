"""Requests: every rule, from Python and from the command line."""

import json
import os
from dataclasses import fields, replace

import pytest
import torch
from command_line import WALK, refused
from conftest import ON_CPU
from held import networks_of
from PIL import Image

import vfengine as vf
from vfengine.cli.settings import UsageError, read_settings
from vfengine.pipelines.batches import Batches
from vfengine.pipelines.conflicts import CONFLICTS, conflicts
from vfengine.pipelines.plain_video import PlainVideoPipeline
from vfengine.pipelines.request import SamplingRequest, VideoRequest, changed, field_names

STEPS = 4
IMAGE, PATH = Image.new("RGB", (16, 16)), object()  # a path is not looked at
AN_IMAGE = "an image has a base path of its own: {} cannot go with it"
AT_ONCE = "overlap_phases runs both phases at once, but {}"
ALONE = "preview makes the base frame alone: {} has no part in it"
ONE_IS_GIVEN = "base_cache keeps paths that are walked, but one is given"

# what a request is made of and what it says; flags and what they say; None where there is none
RULES = [
    (
        {"num_residuals": 2, "num_videos": 2},
        "num_residuals=2 needs one base path, but label and num_videos make 2",
        "--num-residuals 2 --num-videos 2",
        "--num-residuals cannot go with --num-videos: they share one base path",
    ),
    (
        {"num_residuals": 2, "label": ["walk", "jump"]},
        "num_residuals=2 needs one base path, but label and num_videos make 2",
        None,
        None,
    ),
    (
        {"base_cache": "c", "trajectory": PATH},
        ONE_IS_GIVEN,
        "--base-cache c --base-trajectory t.safetensors",
        "--base-cache cannot go with --base-trajectory: a cache finds base paths by seed and",
    ),
    (
        {"base_cache": "c", "image": IMAGE},
        ONE_IS_GIVEN,
        "--base-cache c --image a.png",
        "--base-cache cannot go with --image: a cache finds base paths by seed and settings",
    ),
    (
        {"base_cache": "c", "overlap_phases": True},
        AT_ONCE.format("a base cache keeps finished paths"),
        "--base-cache c --overlap-phases",
        "--base-cache cannot go with --overlap-phases: a cache finds base paths by seed and",
    ),
    (
        {"image": IMAGE, "trajectory": PATH},
        AN_IMAGE.format("a trajectory"),
        "--image a.png --base-trajectory t.safetensors",
        "--image cannot go with --base-trajectory: the picture is the base frame",
    ),
    (
        {"image": IMAGE, "base_path": "stepwise"},
        AN_IMAGE.format("base_path='stepwise'"),
        "--image a.png --base-path stepwise",
        "--image cannot go with --base-path stepwise: the picture is the base frame",
    ),
    (
        {"image": IMAGE, "base_seed": 0},
        None,
        "--image a.png --base-seed 0",
        "--image cannot go with --base-seed: the picture is the base frame",
    ),
    (
        {"image": IMAGE, "base_offset": 0},
        None,
        "--image a.png --base-offset 0",
        "--image cannot go with --base-offset: the picture is the base frame",
    ),
    (
        {"image": IMAGE, "preview": True},
        ALONE.format("an image"),
        "--image a.png --preview",
        "--image cannot go with --preview: the picture is the base frame",
    ),
    (
        {"image": IMAGE, "overlap_phases": True},
        AT_ONCE.format("a given base path is there already"),
        "--image a.png --overlap-phases",
        "--image cannot go with --overlap-phases: the picture is the base frame",
    ),
    (
        None,
        None,
        "--image a.png --base-unet u",
        "--image cannot go with --base-unet: the picture is the base frame",
    ),
    *(
        (
            {"preview": True, name: value},
            None if name == "residual_seed" else ALONE.format(name),
            f"--preview {flags}",
            f"--preview cannot go with {flags.split()[0]}: the base frame is all that is made",
        )
        for name, value, flags in (
            ("num_frames", 4, "--num-frames 4"),
            ("num_residuals", 2, "--num-residuals 2"),
            ("residual_seed", 1, "--residual-seed 1"),
            ("window", 0, "--window 0"),
            ("window_overlap", 3, "--window-overlap 3"),
            ("loop", True, "--loop"),
            ("base_path", "clean", "--base-path clean"),
            ("overlap_phases", True, "--overlap-phases"),
            ("offload_base", True, "--offload-base"),
            ("offload_base", False, "--no-offload-base"),
        )
    ),
    ({"preview": True, "lam": 0.5}, ALONE.format("lam"), None, None),
    (
        {"overlap_phases": True, "trajectory": PATH},
        AT_ONCE.format("a given base path is there already"),
        None,  # the file of --base-trajectory may be one to write
        None,
    ),
    (
        {"overlap_phases": True, "base_path": "clean"},
        AT_ONCE.format("base_path='clean' finishes the base frame first; take 'stepwise'"),
        "--overlap-phases --base-path clean",
        "--overlap-phases cannot go with --base-path clean: both phases run at once",
    ),
    (
        {"overlap_phases": True, "offload_base": True},
        AT_ONCE.format("offload_base frees the base network between them"),
        "--overlap-phases --offload-base",
        "--overlap-phases cannot go with --offload-base: both phases run at once",
    ),
    *(
        (
            None,
            None,
            f"--latents l.safetensors {flags}",
            f"--latents cannot go with {flags.split()[0]}: the latents are finished",
        )
        for flags in (
            "--prompt panda",
            "--negative-prompt bamboo",
            "--num-videos 2",
            "--num-frames 4",
            "--height 64",
            "--width 64",
            "--num-inference-steps 4",
            "--guidance-scale 2",
            "--solver unipc",
            "--eta 0.5",
            "--window 4",
            "--window-overlap 2",
            "--loop",
            "--save-latents s.safetensors",
            "--reuse-every 2",
            "--lora x.safetensors",
        )
    ),
    (
        None,
        None,
        "--prompt panda --label walk",
        "--prompt cannot go with --label: each says what to show",
    ),
    *(
        (None, None, f"--prompts p.txt {flags}", f"--prompts cannot go with {flags.split()[0]}: ")
        for flags in ("--latents l.safetensors", "--save-latents s.safetensors", "--list-labels")
    ),
    *(
        (None, None, f"--prompts p.txt --ray {flags}", f"--ray cannot go with {flags.split()[0]}: ")
        for flags in ("--overlap-phases", "--offload-base", "--dry-run")
        + ("--base-device cpu", "--residual-device cpu")
    ),
]


@pytest.mark.parametrize(("values", "error"), [rule[:2] for rule in RULES if rule[0]])
def test_settings_that_cannot_go_together(values, error):
    if error is None:  # a default, which a request cannot tell from a value that the user wrote
        SamplingRequest(**values)
        assert list(conflicts(values))
        return
    with pytest.raises(ValueError) as caught:
        SamplingRequest(**values)
    assert str(caught.value) == error


@pytest.mark.parametrize(("flags", "error"), [rule[2:] for rule in RULES if rule[2]])
def test_flags_that_cannot_go_together(cli, monkeypatch, flags, error):
    monkeypatch.setattr(vf.VideoFusionPipeline, "from_pretrained", None)  # found before that
    with pytest.raises(UsageError, match=f"^{error}"):
        read_settings(flags.split())
    assert refused(cli(*WALK, *flags.split()), error)
    assert os.listdir() == []


def test_every_conflict_has_its_case():
    values = [rule[0].keys() for rule in RULES if rule[0]]
    flags = [read_names(rule[2]) for rule in RULES if rule[2]]
    for conflict in CONFLICTS:
        pair = {conflict.setting, conflict.other}
        assert any(pair <= set(names) for names in [*values, *flags]), pair


def read_names(flags):
    names = [word for word in flags.split() if word.startswith("--")]
    return {name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in names}


@pytest.mark.parametrize(
    "values",
    [
        {"num_residuals": 1, "num_videos": 2},
        {"num_residuals": 2, "num_videos": 1},
        {"preview": True, "num_residuals": 1, "num_videos": 3, "base_cache": "c"},
        {"image": IMAGE, "base_path": "clean", "residual_seed": 3},
        {"overlap_phases": True, "base_path": "stepwise", "offload_base": False},
        {"overlap_phases": False, "base_cache": "c", "preview": False},
    ],
)
def test_settings_that_can_go_together(values):
    SamplingRequest(**values)
    assert not list(conflicts(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 0}, "num_frames must be an int of at least 1, got 0"),
        ({"num_frames": 2.0}, "num_frames must be an int of at least 1, got 2.0"),
        ({"num_videos": 0}, "num_videos must be an int of at least 1"),
        ({"num_residuals": 0}, "num_residuals must be an int of at least 1"),
        ({"guidance_scale": float("nan")}, r"guidance_scale must be in \[0, 100\], got nan"),
        ({"guidance_scale": 101}, "guidance_scale must be in"),
        ({"label": []}, "label is an empty list"),
        ({"base_path": "straight"}, r"base_path must be one of \(None, 'stepwise', 'clean'\)"),
        ({"output_type": "jpg"}, r"output_type must be one of \('np', 'pt', 'pil'\), got 'jpg'"),
    ],
)
def test_rejects_values(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingRequest(**values)
    with pytest.raises(ValueError, match=message):
        replace(SamplingRequest(), **values)


def test_rejects_names():
    with pytest.raises(TypeError, match="colour"):
        SamplingRequest(colour="red")


def test_a_request_is_made_of_json():
    values = json.loads('{"label": "walk", "num_videos": 2, "solver": "unipc", "base_path": null}')
    request = SamplingRequest(**values)
    assert (request.label, request.num_clips, request.eta) == ("walk", 2, 0.0)


def test_keywords_of_a_call_are_the_fields():
    keywords = vf.VideoFusionPipeline.__call__.__kwdefaults__
    assert keywords.keys() - {"callback"} == field_names(SamplingRequest) - {"label", "preview"}
    for field in fields(SamplingRequest):
        assert keywords.get(field.name, field.default) == field.default, field.name


# -- on a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_phases": True}, "base_path='clean' finishes the base frame first"),
        ({"num_frames": 9, "lam": [0.5] * 9}, "windows need one lam"),
        ({"window": 0, "window_overlap": 2}, "window=0 asks for none"),
        ({"window": 2}, "window must be at least 3"),
        ({"window": 4, "window_overlap": 1}, "window_overlap of a window of 4 frames must be"),
    ],
)
def test_settings_that_do_not_fit_the_model(clean_checkpoint, settings, message):
    pipe = vf.VideoFusionPipeline.from_pretrained(clean_checkpoint, **ON_CPU)
    with pytest.raises(ValueError, match=message):
        pipe("walk", num_inference_steps=STEPS, **settings)
    assert networks_of(pipe) == {}


def test_a_call_refuses_what_its_request_refuses(clean_checkpoint, tmp_path):
    walker, pipe = (
        vf.VideoFusionPipeline.from_pretrained(clean_checkpoint, **ON_CPU) for _ in range(2)
    )
    path = walker.walk_base("walk", num_inference_steps=STEPS)
    for settings, message in (
        ({"image": IMAGE, "trajectory": path}, "a trajectory cannot go with it"),
        ({"trajectory": path, "base_cache": tmp_path / "c"}, ONE_IS_GIVEN),
        ({"trajectory": path, "overlap_phases": True}, "a given base path is there already"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("walk", num_inference_steps=STEPS, **settings)
    assert networks_of(pipe) == {}
    assert not (tmp_path / "c").exists()


def test_defaults_are_filled_in_by_the_model(tiny_checkpoint, clean_checkpoint):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    filled = pipe.fill_defaults(SamplingRequest(label="walk"))
    assert (filled.num_frames, filled.lam, filled.base_path) == (4, 0.5, "stepwise")
    assert (filled.window, filled.window_overlap, filled.offload_base) == (0, None, None)
    longer = pipe.fill_defaults(SamplingRequest(num_frames=9), base_needed_again=True)
    assert (longer.window, longer.window_overlap, longer.offload_base) == (4, 3, False)
    for num_frames, window in ((4, (4, 3)), (9, (4, 3))):
        loop = pipe.fill_defaults(SamplingRequest(num_frames=num_frames, loop=True))
        assert (loop.window, loop.window_overlap) == window
    pipe = vf.VideoFusionPipeline.from_pretrained(clean_checkpoint, **ON_CPU)
    assert pipe.fill_defaults(SamplingRequest()).base_path == "clean"
    assert pipe.fill_defaults(SamplingRequest(base_path="stepwise")).base_path == "stepwise"
    preview = SamplingRequest(preview=True)
    steps = {"num_inference_steps": 50, "solver": "ddim"}
    assert vars(pipe.fill_defaults(preview)) == {**vars(preview), **steps}


# -- plain video models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"base_path": "clean"},
        {"image": IMAGE},
        {"trajectory": PATH},
        {"base_cache": "cache"},
        {"window": 3},
        {"window_overlap": 2},
        {"loop": True},
        {"lam": 0.5},
        {"offload_base": False},
        {"overlap_phases": True},
        {"num_residuals": 2},
        {"window": 0, "offload_base": True},
    ],
)
def test_a_plain_video_model_refuses_what_needs_a_base_path(tiny_video_checkpoint, settings):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_video_checkpoint, **ON_CPU)
    assert isinstance(pipe, PlainVideoPipeline)
    with pytest.raises(ValueError) as caught:
        pipe("walk", num_inference_steps=STEPS, **settings)
    assert str(caught.value) == (
        f"{tiny_video_checkpoint}: a plain video model has no base path, so it takes no "
        f"{', '.join(settings)}"
    )
    for method in (pipe.preview, pipe.walk_base):
        with pytest.raises(ValueError, match=r"a plain video model has no base path$"):
            method("walk")
    assert networks_of(pipe) == {}


def test_a_plain_video_model_takes_what_is_at_its_default(tiny_video_checkpoint):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_video_checkpoint, **ON_CPU)
    settings = {"num_inference_steps": STEPS, "output_type": "pt"}
    clip = pipe("walk", **settings).frames
    same = {"base_seed": 7, "base_path": None, "num_residuals": 1, "overlap_phases": False}
    assert torch.equal(pipe("walk", **settings, **same).frames, clip)
    with pytest.raises(TypeError, match="colour"):
        pipe("walk", colour="red")


def test_foreign_settings_are_those_without_a_field():
    names = ("base_seed", "num_frames", "base_trajectory", "fps", "preview")
    assert VideoRequest.foreign(names) == ["base_seed", "base_trajectory", "preview"]
    assert SamplingRequest.foreign(names) == []
    assert changed({"base_seed": 3, "base_path": None, "window": 0, "fps": 8}) == ["window"]


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"num_videos": 3}, {"num_residuals": 3}])
def test_batches_are_parts_of_the_whole(tiny_checkpoint, settings):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    request = SamplingRequest(label="walk", num_inference_steps=STEPS, output_type="pt", **settings)
    whole = pipe.sample(request).frames
    seen = []
    batches = list(Batches(pipe, request, batch_size=2).run(seen.append))
    assert [batch.first for batch in batches] == [0, 2]
    parts = torch.cat([batch.output.frames for batch in batches])
    torch.testing.assert_close(parts, whole, atol=2e-4, rtol=0)
    total = 4 * STEPS if "num_videos" in settings else 3 * STEPS
    assert {steps.total for steps in seen} == {total}
    assert [steps.done for steps in seen] == sorted(steps.done for steps in seen)
    assert seen[-1].done == batches[-1].steps.done == batches[-1].steps.total == total


def test_batches_reject_several_labels(tiny_checkpoint):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    with pytest.raises(ValueError, match="batches are of one label, got 2"):
        Batches(pipe, SamplingRequest(label=["walk", "jump"]))
