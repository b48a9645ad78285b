"""python -m vfengine.generate on the engine: motions, previews, pictures, windows, caches, VDM*."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_generate
import test_session
import tqdm
from conftest import ON_CPU
from PIL import Image

import vfengine as vf
from vfengine.cli import settings as generate_settings
from vfengine.cli.settings import read_settings
from vfengine.media.video import read_video
from vfengine.pipelines import base_cache
from vfengine.pipelines.videofusion import to_uint8

cli, refused, STEPS = test_generate.cli, test_generate.refused, test_generate.STEPS
clean_checkpoint = test_session.clean_checkpoint
WALK = ["--label", "walk"]


def frames_of(name):
    return read_video(name).frames


def clips(name, count):
    return [frames_of(f"{name}-{k:03d}.webp") for k in range(count)]


def done(result):
    """The --json line of a run that went well."""
    status, out, err = result
    assert (status, err) == (0, "")
    return json.loads(out)


def close(a, b):
    """Equal but for the rounding of a sum in another order."""
    return bool(np.abs(a.astype(int) - b).max() <= 1)


@pytest.fixture
def picture(tmp_path):
    """A picture of the model's size, outside the folder that tests list; its file and pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = tmp_path.parent / f"{tmp_path.name}.png"
    Image.fromarray(pixels).save(file)
    return file, pixels


# -- motions of one base path ----------------------------------------------------------------------


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
    walk = vf.VideoFusionPipeline.walk_base

    def counted(self, *args, **kwargs):
        walks.append(kwargs["sample_offset"])
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(vf.VideoFusionPipeline, "walk_base", counted)
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
    monkeypatch.setattr("vfengine.cli.generate._open_pipeline", None)
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


# -- pictures --------------------------------------------------------------------------------------


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


# -- windows, overlapped phases, the base network in memory ----------------------------------------


def test_windows(cli, tiny_checkpoint):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    made = set()
    for flags, window, overlap in (
        ([], 4, 3),
        (["--window", 0], 0, None),
        (["--window", 5, "--window-overlap", 4], 5, 4),
        (["--window-overlap", 3], 4, 3),  # as without flags: the least
    ):
        record = done(cli(*WALK, "--num-frames", 9, *flags, "--output", "c.webp", "--json"))
        assert record["settings"]["window"] == window
        assert record["settings"]["window_overlap"] == overlap
        asked = {} if not flags else {"window": window, "window_overlap": overlap}
        out = pipe("walk", num_frames=9, num_inference_steps=int(STEPS), **asked)
        assert np.array_equal(frames_of("c.webp"), to_uint8(out.frames)[0])
        made.add(frames_of("c.webp").tobytes())
    assert len(made) == 3
    assert done(cli(*WALK, "--json"))["settings"]["window"] == 0


@pytest.mark.parametrize("flags", [[], ["--num-residuals", 3], ["--num-videos", 3]])
def test_overlapped_phases_give_the_same_clips(cli, flags):
    arguments = [*WALK, *flags, "--batch-size", 2, "--base-path", "stepwise", "--output"]
    cli(*arguments, "a.webp")
    both = [*arguments, "b.webp", "--overlap-phases", "--base-trajectory", "t.safetensors"]
    record = done(cli(*both, "--json"))
    assert record["settings"]["overlap_phases"] is True
    assert record["settings"]["offload_base"] is False
    assert record["timings"]["base"] == 0.0
    paths = 3 if "--num-videos" in flags else 1
    assert vf.BaseTrajectory.load("t.safetensors").final.shape[0] == paths
    names = [f"-{k:03d}.webp" for k in range(3)] if flags else [".webp"]
    for name in names:
        assert np.array_equal(frames_of(f"a{name}"), frames_of(f"b{name}"))
    assert refused(cli(*both), "overlap_phases", "a given base path is there already")
    os.unlink("t.safetensors")
    assert "both phases " in cli(*both)[1]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ([], [False]),
        (["--no-offload-base"], [True]),
        (["--num-videos", 2], [True, True]),
        (["--num-videos", 2, "--offload-base"], [False, False]),
        (["--num-videos", 2, "--batch-size", 2], [False]),
        (["--num-residuals", 2], [False, False]),
    ],
)
def test_base_network_is_let_go_unless_it_is_needed_again(cli, monkeypatch, flags, kept):
    seen = []
    call = vf.VideoFusionPipeline.__call__

    def watched(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        seen.append("base" in self._session.networks)
        return out

    monkeypatch.setattr(vf.VideoFusionPipeline, "__call__", watched)
    assert done(cli(*WALK, *flags, "--json"))["settings"]["offload_base"] is not kept[0]
    assert seen == kept


def test_no_capture(cli, monkeypatch):
    asked = []
    make = vf.VideoFusionPipeline.from_pretrained

    def watched(*args, **kwargs):
        asked.append(kwargs["capture"])
        return make(*args, **kwargs)

    monkeypatch.setattr(vf.VideoFusionPipeline, "from_pretrained", watched)
    cli(*WALK)
    assert done(cli(*WALK, "--no-capture", "--json"))["settings"]["no_capture"] is True
    assert asked == [True, False]

    def uncapturable(self, *args, **kwargs):
        raise RuntimeError("this step cannot be captured in a CUDA graph (why); …")

    monkeypatch.setattr(vf.VideoFusionPipeline, "__call__", uncapturable)
    status, _, err = cli(*WALK)
    assert (status, err.endswith(": try --no-capture\n")) == (1, True)


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_multistep_solvers(cli, tiny_checkpoint, solver):
    assert cli(*WALK, "--solver", solver, "--output", "c.webp")[0] == 0
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    out = pipe("walk", num_inference_steps=int(STEPS), solver=solver)
    assert np.array_equal(frames_of("c.webp"), to_uint8(out.frames)[0])


# -- VDM* ------------------------------------------------------------------------------------------


def test_a_plain_video_model_is_sampled(cli, tiny_video_checkpoint):
    plain = [*WALK, "--seed", 3, "--output", "c.webp"]
    record = done(cli(*plain, "--json", model=tiny_video_checkpoint))
    assert (record["base_seed"], record["residual_seed"]) == (None, 4)
    for name in ("base_path", "window", "offload_base"):
        assert record["settings"][name] is None
    assert record["timings"]["base"] == 0.0 < record["timings"]["residual"]
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_video_checkpoint, **ON_CPU)
    out = pipe("walk", num_inference_steps=int(STEPS), residual_seed=4)
    assert np.array_equal(frames_of("c.webp"), to_uint8(out.frames)[0])
    status, out, _ = cli(*plain, "--num-videos", 2, "--num-frames", 3, model=tiny_video_checkpoint)
    assert status == 0
    assert "2 clips: 3 frames, 4 steps" in out and ", sampling " in out and "base" not in out
    assert frames_of("c-001.webp").shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--base-seed", "0"],
        ["--base-path", "clean"],
        ["--base-trajectory", "t.safetensors"],
        ["--base-cache", "cache"],
        ["--image", "a.png"],
        ["--preview"],
        ["--num-residuals", "2"],
        ["--window", "0", "--window-overlap", "3"],
        ["--overlap-phases"],
        ["--offload-base"],
        ["--no-offload-base"],
    ],
)
def test_a_plain_video_model_has_no_base_path(cli, tiny_video_checkpoint, flags):
    names = [flag for flag in flags if flag.startswith("--")]
    result = cli(*WALK, *flags, model=tiny_video_checkpoint)
    assert refused(result, "a plain video model has no base path, so it takes no", *names)
    assert os.listdir() == []


# -- progress --------------------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch):
    """Every progress bar made, with the totals it has announced."""
    made = []

    class Bar:
        def __init__(self, total, **_):
            self.n, self.total, self.announced = 0, total, [total]
            made.append(self)

        def update(self, n):
            self.n += n
            assert self.n <= self.total
            if self.announced[-1] != self.total:
                self.announced.append(self.total)

        def set_description(self, *_, **__):
            pass

        def close(self):
            assert self.n == self.total

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return made


@pytest.mark.parametrize(
    ("flags", "total"),
    [
        ([], 8),
        (["--num-videos", 3, "--batch-size", 2], 16),
        (["--num-residuals", 3, "--batch-size", 2], 12),
        (["--preview", "--num-videos", 2], 8),
        (["--overlap-phases"], 8),
        (["--overlap-phases", "--num-videos", 2], 16),
        (["--overlap-phases", "--num-residuals", 3], 16),
    ],
)
def test_progress_counts_every_phase(cli, bars, flags, total):
    assert cli(*WALK, *flags)[0] == 0
    assert [bar.announced for bar in bars] == [[total]]


def test_progress_leaves_out_what_is_there_already(
    cli, bars, clean_checkpoint, tiny_video_checkpoint, picture
):
    cli(*WALK, "--image", picture[0], "--num-residuals", 2, model=clean_checkpoint)
    cli(*WALK, "--num-videos", 2, model=tiny_video_checkpoint)
    for _ in range(2):
        cli(*WALK, "--base-trajectory", "t.safetensors")
    assert [bar.announced for bar in bars] == [[8], [8], [8], [4]]
    bars.clear()
    for flags in ([], [], ["--num-residuals", 2], ["--num-videos", 2]):
        cli(*WALK, "--base-cache", "cache", *flags)
    assert [bar.announced for bar in bars] == [[8], [8, 4], [12, 8], [16, 12]]
    cli(*WALK, "--base-cache", "cache", "--preview")  # closes with 0 of 0
    assert (bars[-1].n, bars[-1].announced) == (0, [4])


# -- settings and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_config_file_takes_switches_either_way(tmp_path, suffix):
    file = tmp_path / f"c.{suffix}"
    for text, value in (("true", True), ("false", False), ("null", None)):
        file.write_text(f'{{"offload_base": {text}, "no-capture": true, "json": false}}')
        settings = read_settings(["--config", str(file)])
        assert settings.offload_base is value
        assert (settings.no_capture, settings.json) == (True, False)
        assert ("offload_base" in settings.given) == (value is not None)
        assert read_settings(["--config", str(file), "--no-offload-base"]).offload_base is False
    file.write_text('{"offload_base": "no"}')
    with pytest.raises(ValueError, match="offload_base must be true or false, got no"):
        read_settings(["--config", str(file)])
    file.write_text('{"preview": null}')
    with pytest.raises(ValueError, match="preview must be true or false, got None"):
        read_settings(["--config", str(file)])


def test_seed_is_not_a_seed_by_name(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"residual_seed": 4, "base-seed": 3}')
    with_file = ["--config", str(file)]
    assert read_settings(with_file).given == {"base_seed", "residual_seed"}
    assert read_settings([*with_file, "--seed", "5"]).given == set()
    assert read_settings(["--preview", "--seed", "5"]).residual_seed == 6
    with pytest.raises(ValueError, match="--preview cannot go with --residual-seed"):
        read_settings([*with_file, "--preview"])


def test_names_in_the_tables_are_flags():
    known = generate_settings._parser()._option_string_actions
    named = [*generate_settings.BASE_FLAGS]
    for flag, _, others in generate_settings.APART:
        named += [flag, *others]
    assert {name.partition(" ")[0] for name in named} <= known.keys()


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("--num-residuals 2", "--num-videos 2"),
        ("--base-cache c", "--base-trajectory t.safetensors"),
        ("--base-cache c", "--image a.png"),
        ("--base-cache c", "--overlap-phases"),
        ("--image a.png", "--base-trajectory t.safetensors"),
        ("--image a.png", "--base-seed 0"),
        ("--image a.png", "--base-path stepwise"),
        ("--image a.png", "--preview"),
        ("--image a.png", "--overlap-phases"),
        ("--preview", "--num-frames 4"),
        ("--preview", "--num-residuals 2"),
        ("--preview", "--residual-seed 1"),
        ("--preview", "--window 0"),
        ("--preview", "--window-overlap 3"),
        ("--preview", "--base-path clean"),
        ("--preview", "--overlap-phases"),
        ("--preview", "--offload-base"),
        ("--preview", "--no-offload-base"),
        ("--overlap-phases", "--base-path clean"),
        ("--overlap-phases", "--offload-base"),
    ],
)
def test_flags_that_cannot_go_together(cli, monkeypatch, flag, other):
    monkeypatch.setattr(
        "vfengine.cli.generate._open_pipeline", None
    )  # found before a model is opened
    result = cli(*WALK, *flag.split(), *other.split())
    assert refused(result, f"{flag.split()[0]} cannot go with {other.split()[0]}")
    assert os.listdir() == []


def test_flags_that_can(cli, clean_checkpoint, picture):
    for flags in (
        ["--num-residuals", 1, "--num-videos", 2],
        ["--num-residuals", 2, "--num-videos", 1],
        ["--preview", "--num-residuals", 1, "--seed", 3],
        ["--image", picture[0], "--base-path", "clean", "--seed", 3],
        ["--overlap-phases", "--base-path", "stepwise", "--no-offload-base"],
    ):
        assert cli(*WALK, *flags, "--quiet", model=clean_checkpoint) == (0, "", ""), flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window", 2], ["window must be at least 3 frames, got 2"]),
        (["--window", -1], ["--window", "from 0 to 4096"]),
        (["--window", 5, "--window-overlap", 2], ["window_overlap of a window of 5 frames"]),
        (["--window", 5, "--window-overlap", 5], ["from 3 to 4, got 5"]),
        (["--window-overlap", 4], ["window_overlap of a window of 4 frames", "got 4"]),
        (["--window", 0, "--window-overlap", 3], ["window=0 asks for none"]),
        (["--window-overlap", 0], ["--window-overlap", "from 1"]),
        (["--num-residuals", 0], ["--num-residuals", "from 1"]),
        (["--overlap-phases"], ["overlap_phases", "base_path='clean' finishes the base frame"]),
        (["--solver", "unipc", "--eta", 0.5], ["unipc is deterministic: eta must be 0"]),
        (["--preview", "--solver", "unipc", "--eta", 0.5], ["eta must be 0"]),
        (["--preview", "--num-inference-steps", 1001], ["num_inference_steps", "1000"]),
        (["--preview", "--output", "a.txt"], ["unknown suffix '.txt'"]),
        (["--preview", "--output", "no/a.png"], ["no: no such folder"]),
    ],
)
def test_refused_before_sampling(cli, clean_checkpoint, monkeypatch, flags, words):
    monkeypatch.setattr("vfengine.sampling.driver.Driver._run", None)
    monkeypatch.setattr("vfengine.sampling.driver.Driver.overlapped", None)
    many = [] if "--preview" in flags or "--num-residuals" in flags else ["--num-residuals", 2]
    assert refused(cli(*WALK, *many, *flags, model=clean_checkpoint), *words)
    assert os.listdir() == []


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
