"""reuse_every: its forms, what it refuses, and where it is recorded."""

import json

import pytest
import torch

from vfengine.media.metadata import read_metadata
from vfengine.pipelines.clip_settings import clip_settings
from vfengine.pipelines.request import SamplingRequest, TextRequest, VideoRequest
from vfengine.pipelines.together import sample_together
from vfengine.pipelines.videofusion import VideoFusionPipeline

MIXED = "base=2,residual=3"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (1, 1),
        (torch.tensor(3), 3),
        ("3", 3),
        (MIXED, MIXED),
        (" residual=3, base=2", MIXED),
        ({"residual": 3}, "base=1,residual=3"),
        ("base=4,residual=4", 4),
    ],
)
def test_its_forms(given, plain):
    request = SamplingRequest(label="walk", reuse_every=given)
    assert request.reuse_every == plain
    assert request.part(0, 1).reuse_every == plain


@pytest.mark.parametrize(
    "given",
    [0, -1, 1.5, True, None, "", "x", "0", "-1", "2,3", "base=0", "base=2,base=2", "video=2", {}]
    + [{"base": "2"}, {"base": -1}, [2, 3], "base=", "base=2=3"],
)
def test_it_refuses_what_is_no_number_of_a_phase(given):
    with pytest.raises(ValueError, match="reuse_every must be an int of at least 1, or one"):
        SamplingRequest(label="walk", reuse_every=given)


def test_models_of_one_phase_have_one_number():
    assert VideoRequest(label="walk", reuse_every="2").reuses("video") == 2
    assert TextRequest(prompt="a", reuse_every={"video": 3}).reuse_every == 3
    with pytest.raises(ValueError, match="as in 'video=2', got 'base=2'"):
        TextRequest(prompt="a", reuse_every="base=2")


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return VideoFusionPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)


def request(every, **more):
    return SamplingRequest(label="walk", num_inference_steps=3, reuse_every=every, **more)


def test_a_record_names_it_where_it_is_set(pipe):
    assert clip_settings(pipe, request(MIXED))["settings"]["reuse_every"] == MIXED
    assert "reuse_every" not in clip_settings(pipe, request(1))["settings"]


def test_base_paths_note_it_and_are_found_by_it(pipe, tmp_path):
    """Only the base phase's; without it, notes and key are as they were."""
    paths = [
        pipe.walk_base("walk", num_inference_steps=3, reuse_every=every, base_cache=tmp_path)
        for every in (1, {"residual": 3}, MIXED, 2)
    ]
    assert [path.metadata.get("reuse_every") for path in paths] == [None, None, "2", "2"]
    assert len(list(tmp_path.iterdir())) == 2
    for every, walked in ((1, paths[0]), (2, paths[2])):
        record = clip_settings(pipe, request(every, trajectory=walked))
        assert "beyond" not in record
    assert "beyond" in clip_settings(pipe, request(1, trajectory=paths[2]))


def test_requests_of_one_batch_share_it(pipe):
    (made,) = sample_together(pipe, [request(MIXED)])
    assert (made.frames == pipe.sample(request(MIXED)).frames).all()
    with pytest.raises(ValueError, match="requests of one batch must have one reuse_every"):
        sample_together(pipe, [request(1), request(2)])


def test_a_clip_says_how_it_was_made_and_is_made_again(cli, tmp_path):
    assert cli("--label", "walk", "--reuse-every", MIXED, "--output", "a.png")[0] == 0
    assert json.loads(read_metadata(tmp_path / "a.png"))["settings"]["reuse_every"] == MIXED
    assert cli("--config", "a.png")[0] == 0
    assert (tmp_path / "a-again.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("value", ["0", "-1", "some", "video=2"])
def test_the_command_line_refuses_it_in_one_line(cli, value):
    status, _, error = cli("--label", "walk", f"--reuse-every={value}")
    assert (status, error.count("\n")) == (2, 1)
    assert "--reuse-every: must be an int of at least 1, or one for each phase" in error
