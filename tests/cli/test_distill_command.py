"""vfengine train --objective distill: from a teacher's folder to one that takes few steps."""

import json

import numpy as np
import pytest
from conftest import ON_CPU, TINY_LABELS, save_tiny
from latent_models import latent_config, save_latent_model

from vfengine.cli import train
from vfengine.cli.flags import UsageError
from vfengine.cli.train_settings import read_settings
from vfengine.formats.checkpoint import read_config
from vfengine.media.video import write_video
from vfengine.pipelines.videofusion import VideoFusionPipeline

FAST = [
    *("--objective", "distill", "--updates", "3", "--batch-size", "2", "--extra-images", "2"),
    *("--precision", "fp32", "--save-every", "2", "--log-every", "1", "--teacher-steps", "8"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("teachers") / "tiny", base_path="clean")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of two of the teacher's three classes."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in TINY_LABELS[1:]:
        (folder / name).mkdir()
        write_video(folder / name / "0.webp", rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    return folder


def test_networks_are_distilled_one_after_the_other(teacher, videos, tmp_path, capsys):
    shared = [*FAST, "--from", str(teacher), "--data", str(videos), "--steps", "2"]
    base, both = tmp_path / "base", tmp_path / "both"
    assert train.main([*shared, "--output", str(base), "--train", "base"]) == 0
    assert "guidance_embedding" in capsys.readouterr().err
    assert list(read_config(base / "checkpoint").distilled) == ["base"]
    second = [*shared, "--output", str(both), "--train", "residual", "--sample-every", "3"]
    second += ["--init-from", str(base / "checkpoint"), "--clean-share", "0.5"]
    assert train.main(second) == 0
    config = read_config(both / "checkpoint")
    assert {name: few.timesteps for name, few in config.distilled.items()} == {
        "base": (999, 499),
        "residual": (999, 499),
    }
    assert config.sha256["base"] == read_config(base / "checkpoint").sha256["base"]
    assert (config.clean_share, config.base_path) == (0.5, "clean")
    assert list(both.glob("samples/*.png"))
    log = [json.loads(line) for line in (both / "log.jsonl").read_text().splitlines()]
    assert [row["residual"] > 0 for row in log if "residual" in row] == [True] * 3
    clip = VideoFusionPipeline.from_pretrained(both / "checkpoint", **ON_CPU)("walk")
    assert clip.trajectory.num_inference_steps == 2


def test_two_students_become_one_model(teacher, videos, tmp_path):
    shared = [*FAST, "--from", str(teacher), "--data", str(videos)]
    for name in ("base", "residual"):
        assert train.main([*shared, "--output", str(tmp_path / name), "--train", name]) == 0
    sources = ["--init-from", str(tmp_path / "base/checkpoint")]
    sources += ["--residual-from", str(tmp_path / "residual/checkpoint"), "--max-minutes", "0"]
    assert train.main([*shared, *sources, "--output", str(tmp_path / "one")]) == 0
    one = read_config(tmp_path / "one" / "checkpoint")
    for name in ("base", "residual"):
        assert one.sha256[name] == read_config(tmp_path / name / "checkpoint").sha256[name]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(teacher, videos, tmp_path):
    shared = [*FAST, "--from", str(teacher), "--data", str(videos), "--train", "base"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*shared, "--output", str(whole)]) == 0
    assert train.main([*shared, "--output", str(parts), "--max-minutes", "0"]) == 0
    assert train.main([*shared, "--output", str(parts), "--resume"]) == 0
    ends = [read_config(folder / "checkpoint").sha256 for folder in (whole, parts)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_of_latents_is_distilled_on_its_own_latents(precision, tmp_path):
    teacher = save_latent_model(tmp_path / "teacher", latent_config(base_path="clean"))
    command = [*FAST, "--from", str(teacher), "--output", str(tmp_path / "run"), "--steps", "1"]
    command += ["--num-clips", "3", "--captions", "2", "--base-images", "4", "--sample-every", "0"]
    assert train.main([*command, "--precision", precision]) == 0
    config = read_config(tmp_path / "run" / "checkpoint")
    assert config.distilled["residual"].timesteps == (999,)
    pipe = VideoFusionPipeline.from_pretrained(tmp_path / "run" / "checkpoint", **ON_CPU)
    assert pipe(prompt="a person walking").frames.shape == (1, 4, 32, 32, 3)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "needs --from FOLDER"),
        (["--from", "x", "--steps", "3"], "must be one of 1, 2, 4, 8, 16"),
        (["--from", "x", "--guidance-range", "4,1"], "the least first"),
        (["--from", "x", "--guidance-range", "1"], "two scales"),
        (["--from", "x", "--guidance-range", "1,1000"], "in 0..100"),
        (["--from", "x", "--teacher-steps", "7"], "at least twice --steps"),
        (["--from", "x", "--size", "64"], "--size has no meaning for --objective distill"),
        (["--from", "x", "--lam", "0.4"], "--lam has no meaning"),
        (["--from", "x", "--autoencoder", "y"], "--autoencoder has no meaning"),
    ],
)
def test_flags_that_no_student_takes_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        read_settings(["--objective", "distill", "--output", "out", *flags])


@pytest.mark.parametrize("name", ["--from", "--updates", "--teacher-steps", "--guidance-range"])
def test_other_objectives_take_no_flags_of_students(name):
    with pytest.raises(UsageError, match=f"{name} has no meaning for --objective decomposed"):
        read_settings(["--output", "out", name, "2,3" if name == "--guidance-range" else "2"])


def test_what_is_no_teacher_is_refused_in_one_line(tiny_video_checkpoint, tmp_path, capsys):
    command = [*FAST, "--output", str(tmp_path / "out"), "--data", str(tmp_path)]
    for folder, words in (
        (tiny_video_checkpoint, "only decomposed models are distilled"),
        (tmp_path / "missing", "no config.json"),
    ):
        assert train.main([*command, "--from", str(folder)]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_classes_that_the_teacher_does_not_know_are_refused(teacher, tmp_path, capsys):
    (tmp_path / "videos" / "swim").mkdir(parents=True)
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    write_video(tmp_path / "videos" / "swim" / "a.webp", frames)
    command = [*FAST, "--from", str(teacher), "--data", str(tmp_path / "videos")]
    assert train.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "knows no class 'swim'" in capsys.readouterr().err
