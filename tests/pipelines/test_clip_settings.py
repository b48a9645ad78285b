"""What a clip tells of its request, as calls from Python make them."""

import json

import pytest
from conftest import ON_CPU

import vfengine as vf
from vfengine.pipelines.clip_settings import clip_settings, file_record, settings_text
from vfengine.pipelines.request import SamplingRequest


def test_records_of_requests(tiny_checkpoint):
    pipe = vf.load_pipeline(tiny_checkpoint, **ON_CPU)
    steps = {"num_inference_steps": 4}
    both = SamplingRequest(label=["walk", "jump"], num_videos=2, sample_offset=3, **steps)
    settings = clip_settings(pipe, both, 2, fps=9, scale=2)["settings"]
    assert (settings["label"], settings["sample_offset"]) == ("jump", 5)
    assert (settings["fps"], settings["scale_filter"]) == (9.0, "nearest")
    path = pipe.walk_base("walk", base_seed=7, **steps)
    walked = SamplingRequest(label="walk", base_seed=7, trajectory=path, **steps)
    record = clip_settings(pipe, walked)
    assert record["settings"]["base_seed"] == 7
    assert record == clip_settings(pipe, SamplingRequest(label="walk", base_seed=7, **steps))
    other = SamplingRequest(label="jump", base_seed=7, trajectory=path, **steps)
    assert clip_settings(pipe, other)["beyond"]["base_trajectory"]["labels"] == '["walk"]'
    lam = SamplingRequest(label="walk", lam=0.25, **steps)
    assert clip_settings(pipe, lam)["beyond"] == {"lam": 0.25}
    assert json.loads(settings_text(record)) == record


def test_the_same_request_has_the_same_record(tiny_checkpoint):
    """Defaults filled in or not, whole numbers written as floats or not."""
    pipe = vf.load_pipeline(tiny_checkpoint, **ON_CPU)
    request = SamplingRequest(label="walk", num_residuals=3, guidance_scale=2)
    filled = pipe.fill_defaults(SamplingRequest(label="walk", num_residuals=3))
    for number in range(3):
        texts = {settings_text(clip_settings(pipe, r, number)) for r in (request, filled)}
        assert len(texts) == 1
        alone = SamplingRequest(label="walk", sample_offset=number, base_offset=0)
        assert texts == {settings_text(clip_settings(pipe, alone))}


def test_files_are_told_by_name_and_content(tmp_path):
    (tmp_path / "a.png").write_bytes(b"content")
    record = file_record(tmp_path / "a.png")
    assert record["name"] == "a.png"
    assert record["sha256"].startswith("ed7002b439e9ac845f22357d822bac14")
    with pytest.raises(FileNotFoundError):
        file_record(tmp_path / "b.png")
