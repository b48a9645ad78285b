"""python -m vfengine.generate and base paths: files, sharing, previews, the cache, images."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import STEPS, WALK, clips, close, done, frames_of, refused
from conftest import ON_CPU, save_tiny
from PIL import Image

import vfengine as vf
from vfengine.media.video import read_video
from vfengine.pipelines import base_cache
from vfengine.pipelines.session import Session
from vfengine.pipelines.videofusion import to_uint8

# -- files of base trajectories --------------------------------------------------------------------


def test_trajectory_is_written_then_read(cli):
    arguments = ["--label", "walk", "--base-trajectory", "t.safetensors", "--output", "a.webp"]
    first = json.loads(cli(*arguments, "--base-seed", 3, "--json")[1])
    assert sorted(os.listdir()) == ["a.webp", "t.safetensors"]
    frames, written = read_video("a.webp").frames, Path("t.safetensors").read_bytes()
    second = json.loads(cli(*arguments, "--json")[1])
    assert [first["base_trajectory_read"], second["base_trajectory_read"]] == [False, True]
    assert second["base_seed"] == 3
    assert second["timings"]["base"] == 0.0
    assert np.array_equal(read_video("a.webp").frames, frames)
    assert Path("t.safetensors").read_bytes() == written
    cli(*arguments, "--residual-seed", 9)
    assert np.array_equal(read_video("a.webp").frames[2], frames[2])
    assert not np.array_equal(read_video("a.webp").frames[1], frames[1])


def test_trajectory_of_several_clips(cli):
    many = ["--label", "walk", "--num-videos", 3, "--output", "a.webp"]
    cli(*many, "--base-trajectory", "t.safetensors", "--batch-size", 2)
    assert vf.BaseTrajectory.load("t.safetensors").final.shape[0] == 3
    written = [read_video(f"a-{k:03d}.webp").frames for k in range(3)]
    cli(*many, "--base-trajectory", "t.safetensors", "--batch-size", 2)
    for k in range(3):
        assert np.array_equal(read_video(f"a-{k:03d}.webp").frames, written[k])
    assert refused(
        cli("--label", "walk", "--num-videos", 2, "--base-trajectory", "t.safetensors"),
        "t.safetensors: ",
        "holds 3 clips, neither 1 nor the 2 asked for",
    )


def test_one_trajectory_serves_several_clips(cli):
    cli("--label", "walk", "--base-trajectory", "t.safetensors", "--output", "a.webp")
    cli(
        "--label",
        "walk",
        "--base-trajectory",
        "t.safetensors",
        "--num-videos",
        3,
        "--output",
        "b.webp",
    )
    clips = [read_video(f"b-{k:03d}.webp").frames for k in range(3)]
    assert np.array_equal(clips[0], read_video("a.webp").frames)
    assert np.array_equal(clips[0][2], clips[2][2])
    assert not np.array_equal(clips[0][1], clips[2][1])


def test_foreign_trajectories_are_refused(cli, tmp_path):
    file = ["--base-trajectory", "t.safetensors"]
    cli("--label", "walk", *file, "--output", "a.webp")
    Path("a.webp").unlink()
    before = os.listdir()
    other = save_tiny(tmp_path.parent / f"{tmp_path.name}-other", seed=1)
    walk = ["--label", "walk", *file]
    assert refused(cli(*walk, model=other), "t.safetensors: ", "made by another model")
    assert refused(cli(*walk, steps="5"), "num_inference_steps 4, but 5 is asked for")
    assert refused(cli(*walk, "--solver", "dpmsolver"), "solver ddim, but dpmsolver")
    assert refused(cli(*walk, "--eta", 1), "eta 0.0, but 1.0")
    assert refused(cli(*walk, "--base-seed", 5), "made with base seed 0, but 5 is asked for")
    schedule = vf.NoiseSchedule.linear(1000, 1e-4, 3e-2).to_dict()
    other = save_tiny(tmp_path.parent / f"{tmp_path.name}-schedule", schedule=schedule)
    assert refused(cli(*walk, model=other), "made with noise schedule")
    data = Path("t.safetensors").read_bytes()
    Path("t.safetensors").write_bytes(data[:-50])
    assert refused(cli(*walk), "t.safetensors: truncated")
    Path("t.safetensors").write_bytes(b"")
    assert refused(cli(*walk), "t.safetensors: ")
    assert os.listdir() == before


def test_trajectory_paths_are_checked(cli):
    walk = ["--label", "walk"]
    assert refused(cli(*walk, "--base-trajectory", "t.mp4"), "expected a .safetensors file")
    assert refused(cli(*walk, "--base-trajectory", "no/t.safetensors"), "no: no such folder")
    os.mkdir("d.safetensors")
    assert refused(cli(*walk, "--base-trajectory", "d.safetensors"), "d.safetensors")
    assert os.listdir() == ["d.safetensors"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label", "jump"], 'made with labels ["walk"], but ["jump"] is asked for'),
        ([*WALK, "--guidance-scale", "7"], "made with guidance scale 2.0, but 7.0 is asked for"),
        ([*WALK, "--base-seed", "4"], "made with base seed 0, but 4 is asked for"),
    ],
)
def test_a_path_of_another_look_is_refused(cli, flags, message):
    done(cli(*WALK, "--preview", "--base-trajectory", "path.safetensors", "--json"))
    path = ["--base-trajectory", "path.safetensors", "--output", "other.png"]
    status, out, err = cli(*flags, "--preview", *path)
    assert (status, out) == (2, "")
    assert message in err
    assert not Path("other.png").exists()
    assert done(cli(*WALK, *path, "--json"))["base_trajectory_read"]


# -- several clips of one base path ----------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_motions_share_the_base_frame_and_begin_with_the_plain_clip(cli, solver):
    walk = [*WALK, "--solver", solver]
    cli(*walk, "--output", "plain.webp")
    plain = frames_of("plain.webp")
    many = [*walk, "--num-residuals", 3, "--output", "m.webp", "--json"]
    record = done(cli(*many))
    assert record["files"] == [f"m-{k:03d}.webp" for k in range(3)]
    assert record["settings"]["num_residuals"] == 3
    made = clips("m", 3)
    assert np.array_equal(made[0], plain)
    for clip in made[1:]:
        assert np.array_equal(clip[2], plain[2])
        assert not np.array_equal(clip[1], plain[1])
    done(cli(*many, "--batch-size", 2))
    for clip, alone in zip(clips("m", 3), made, strict=True):
        assert close(clip, alone)
        assert np.array_equal(clip[2], plain[2])


def test_motions_walk_once(cli, monkeypatch):
    walks = []
    walk = Session.base

    def counted(self, noise, condition, table, place, run, reuse_every):
        walks.append(place.sample_offset)
        return walk(self, noise, condition, table, place, run, reuse_every)

    monkeypatch.setattr(Session, "base", counted)
    cli(*WALK, "--num-residuals", 5, "--batch-size", 2)
    assert walks == [0]
    assert len(os.listdir()) == 5


def test_motions_write_and_read_a_path_of_one_clip(cli):
    file = ["--base-trajectory", "t.safetensors"]
    cli(*WALK, *file, "--num-residuals", 3, "--batch-size", 2, "--output", "m.webp")
    assert vf.BaseTrajectory.load("t.safetensors").final.shape[0] == 1
    written = clips("m", 3)
    again = [*WALK, *file, "--num-residuals", 3, "--batch-size", 2, "--output", "m.webp"]
    record = done(cli(*again, "--json"))
    assert record["base_trajectory_read"]
    assert record["timings"]["base"] == 0.0
    assert all(np.array_equal(a, b) for a, b in zip(written, clips("m", 3), strict=True))


# -- preview ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_path", ["stepwise", "clean"])
def test_preview_is_the_clips_base_frame(cli, base_path):
    record = done(cli(*WALK, "--seed", 3, "--preview", "--json"))
    assert (record["files"], os.listdir()) == (["walk.png"], ["walk.png"])
    assert (record["base_seed"], record["residual_seed"]) == (3, None)
    assert record["settings"]["num_frames"] == 1
    assert record["timings"]["residual"] == 0.0
    assert frames_of("walk.png").shape == (1, 16, 16, 3)
    cli(*WALK, "--seed", 3, "--base-path", base_path, "--num-frames", 5, "--output", "c.webp")
    assert np.array_equal(frames_of("walk.png")[0], frames_of("c.webp")[2])


def test_previews_of_several_videos_in_any_format(cli):
    many = [*WALK, "--num-videos", 3, "--batch-size", 2]
    status, out, err = cli(*many, "--preview", "--output", "p.webp", "--scale", 2)
    assert (status, err) == (0, "")
    assert out.startswith("p-000.webp ... p-002.webp: 3 pictures: base frame, 4 steps, ")
    assert "residual" not in out
    cli(*many, "--output", "c.webp", "--scale", 2)
    for preview, clip in zip(clips("p", 3), clips("c", 3), strict=True):
        assert preview.shape == (1, 32, 32, 3)
        assert np.array_equal(preview[0], clip[2])


def test_preview_needs_no_residual_network(cli, tiny_checkpoint, tmp_path):
    model = shutil.copytree(tiny_checkpoint, tmp_path.parent / f"{tmp_path.name}-base")
    (model / "residual.safetensors").unlink()
    assert cli(*WALK, "--preview", model=model)[0] == 0


def test_preview_leaves_the_path_for_the_clip(cli):
    file = ["--base-trajectory", "t.safetensors"]
    two = [*WALK, "--num-videos", 2, "--base-seed", 7]
    assert not done(cli(*two, *file, "--preview", "--json"))["base_trajectory_read"]
    assert vf.BaseTrajectory.load("t.safetensors").final.shape[0] == 2
    looks = [frames_of(f"walk-{k:03d}.png")[0] for k in range(2)]
    record = done(cli(*two, *file, "--output", "c.webp", "--json"))
    assert record["base_trajectory_read"]
    for look, clip in zip(looks, clips("c", 2), strict=True):
        assert np.array_equal(look, clip[2])
    record = done(cli(*two, *file, "--preview", "--output", "p.webp", "--json"))  # of the file
    assert (record["base_trajectory_read"], record["base_seed"]) == (True, 7)
    assert all(np.array_equal(a, b[0]) for a, b in zip(looks, clips("p", 2), strict=True))
    cli(*WALK, "--base-trajectory", "one.safetensors", "--preview")
    cli(*WALK, "--base-trajectory", "one.safetensors", "--num-videos", 2, "--preview")
    assert np.array_equal(frames_of("walk-001.png"), frames_of("walk.png"))


# -- base cache ------------------------------------------------------------------------------------


def test_base_cache_is_filled_and_found(cli):
    cached = [*WALK, "--base-cache", "a/cache", "--output", "c.webp", "--json"]
    first = done(cli(*cached))
    made = frames_of("c.webp")
    assert len(os.listdir("a/cache")) == 1
    second = done(cli(*cached))
    assert [r["base_cache_hit"] for r in (first, second)] == [False, True]
    assert second["timings"]["base"] == 0.0 < first["timings"]["base"]
    assert second["settings"]["base_cache"] == "a/cache"
    assert np.array_equal(frames_of("c.webp"), made)
    assert done(cli(*cached, "--num-residuals", 2))["base_cache_hit"]  # of the same path
    assert np.array_equal(frames_of("c-000.webp"), made)
    assert not done(cli(*cached, "--base-seed", 2))["base_cache_hit"]
    assert len(os.listdir("a/cache")) == 2
    assert done(cli(*WALK, "--json"))["base_cache_hit"] is None


def test_base_cache_of_several_videos_and_of_previews(cli):
    two = [*WALK, "--num-videos", 2, "--base-cache", "cache", "--json"]
    assert not done(cli(*two, "--preview"))["base_cache_hit"]
    assert len(os.listdir("cache")) == 2
    assert done(cli(*two, "--preview", "--output", "p.webp"))["base_cache_hit"]
    assert done(cli(*two, "--output", "c.webp"))["base_cache_hit"]
    for look, clip in zip(clips("p", 2), clips("c", 2), strict=True):
        assert np.array_equal(look[0], clip[2])
    status, out, _ = cli(*WALK, "--base-cache", "cache", "--preview")
    assert (status, out.startswith("walk.png: base frame, 4 steps")) == (0, True)
    os.unlink(f"cache/{sorted(os.listdir('cache'))[0]}")
    assert not done(cli(*two))["base_cache_hit"]  # one of two


def test_base_cache_folders_are_checked_first(cli, monkeypatch):
    Path("file").touch()
    for folder in ("file", "file/cache"):
        assert refused(cli(*WALK, "--base-cache", folder), "file: not a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(vf.VideoFusionPipeline, "from_pretrained", None)
    assert refused(cli(*WALK, "--base-cache", "no/cache"), "folder is not writable")
    assert os.listdir() == ["file"]


def test_faults_of_the_cache(cli, monkeypatch):
    two = [*WALK, "--num-videos", 2, "--base-cache", "cache"]
    cli(*two)
    for file in Path("cache").iterdir():
        data = file.read_bytes()
        file.write_bytes(data[:-9])
        status, out, err = cli(*two)
        file.write_bytes(data)
        assert (out, err.count("\n"), file.name in err) == ("", 1, True)
        late = "(complete: walk-000.mp4)" in err  # the fault is of the second clip's path
        assert status == (1 if late else 2)

    def full_disk(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_cache.BaseTrajectory, "save", full_disk)
    status, _, err = cli(*WALK, "--base-cache", "cache", "--base-seed", 9)
    assert status == 1
    assert err == "vfengine.generate: error: --base-cache cache: No space left on device\n"


# -- images ----------------------------------------------------------------------------------------


def test_a_picture_is_animated(cli, clean_checkpoint, picture):
    file, pixels = picture
    image = [*WALK, "--image", file, "--seed", 3, "--output", "c.webp"]
    record = done(cli(*image, "--json", model=clean_checkpoint))
    assert (record["base_seed"], record["residual_seed"]) == (None, 4)
    assert record["settings"]["base_path"] == "clean"
    assert record["settings"]["image"] == str(file)
    assert record["timings"]["base"] == 0.0
    clip = frames_of("c.webp")
    assert np.array_equal(clip[2], pixels)
    assert not np.array_equal(clip[1], pixels)
    pipe = vf.VideoFusionPipeline.from_pretrained(clean_checkpoint, **ON_CPU)
    out = pipe("walk", image=Image.open(file), num_inference_steps=int(STEPS), residual_seed=4)
    assert np.array_equal(clip, to_uint8(out.frames)[0])


@pytest.mark.parametrize("flag", ["--num-videos", "--num-residuals"])
def test_motions_of_a_picture(cli, clean_checkpoint, picture, flag):
    image = [*WALK, "--image", picture[0], "--output", "c.webp"]
    cli(*image, model=clean_checkpoint)
    assert cli(*image, flag, 3, "--batch-size", 2, model=clean_checkpoint)[0] == 0
    made = clips("c", 3)
    assert close(made[0], frames_of("c.webp"))
    for clip in made:
        assert np.array_equal(clip[2], picture[1])
    assert not np.array_equal(made[0][1], made[2][1])


def test_pictures_that_cannot_be_animated(cli, clean_checkpoint, picture):
    file = picture[0]
    model = {"model": clean_checkpoint}
    assert refused(cli(*WALK, "--image", file), "this model cannot animate a picture")
    assert refused(cli(*WALK, "--image", "none.png", **model), "none.png: no such image")
    broken = file.with_suffix(".jpg")
    for data in (b"", b"no image", file.read_bytes()[:-40]):
        broken.write_bytes(data)
        assert refused(cli(*WALK, "--image", broken, **model), "not an image that can be read")
    assert os.listdir() == []
