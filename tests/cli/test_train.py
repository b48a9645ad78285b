"""python -m vfengine.train: what it writes, how it goes on, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from PIL import Image
from safetensors.torch import load_file
from test_training import assert_equal_states

from vfengine.cli import train
from vfengine.cli.train_settings import read_settings
from vfengine.formats.checkpoint import read_config
from vfengine.media.video import write_video
from vfengine.pipelines.videofusion import VideoFusionPipeline
from vfengine.training.trainer import Trainer

SHAPE = [
    *("--num-frames", "4", "--size", "16", "--patch-size", "2", "--layers-per-block", "1,1"),
    *("--base-channels", "16,16", "--residual-channels", "16,16", "--precision", "fp32"),
]
SCHEDULE = [
    *("--steps", "4", "--batch-size", "2", "--extra-images", "2", "--warmup", "1"),
    *("--save-every", "2", "--log-every", "2", "--sample-every", "4"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of two classes with two short videos each."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir()
        for i in range(2):
            frames = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
            write_video(folder / name / f"{i}.webp", frames)
    return folder


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory) -> Path:
    """The output of a complete run."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert train.main(["--data", str(videos), "--output", str(output), *SHAPE, *SCHEDULE]) == 0
    return output


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with what the files hold."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def interrupt_training(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C where a training is about to take this step, counted from 0."""
    plain = Trainer.step

    def interrupted(trainer):
        if trainer.steps_done == step:
            raise KeyboardInterrupt
        return plain(trainer)

    patch.setattr(Trainer, "step", interrupted)


def weights_of(output: Path) -> dict[str, str]:
    return read_config(output / "checkpoint").sha256


def test_command_writes_checkpoint_state_log_and_samples(trained):
    assert sorted(contents(trained)) == [
        "checkpoint",
        "checkpoint/base.safetensors",
        "checkpoint/config.json",
        "checkpoint/residual.safetensors",
        "log.jsonl",
        "samples",
        "samples/step-0000004.png",
        "training.safetensors",
    ]
    config = read_config(trained / "checkpoint")
    assert (config.labels, config.fps) == (("left", "right"), 8.0)  # the rate of the videos
    assert (config.num_frames, config.height, config.width) == (4, 16, 16)
    sheet = Image.open(trained / "samples" / "step-0000004.png")
    assert sheet.size == (4 * 17 - 1, 2 * 17 - 1)  # a clip a row, a class a row


def test_command_logs_one_json_object_a_line(trained):
    lines = (trained / "log.jsonl").read_text().splitlines()
    start, *logged = map(json.loads, lines)
    assert start["start"] == 0
    assert (start["steps"], start["batch_size"], start["precision"]) == (4, 2, "fp32")
    rates = "the clips have 8 frames a second; generated clips play at 8"
    assert (start["fps"], start["rates"]) == (8.0, rates)
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert line["base"] > 0 and line["residual"] > 0 and line["clips_per_second"] > 0
        assert len(line["base_by_t"]) == len(line["residual_by_t"]) == 5


def test_trained_checkpoint_generates(trained):
    pipeline = VideoFusionPipeline.from_pretrained(trained / "checkpoint", **ON_CPU)
    frames = pipeline("left", num_inference_steps=2).frames
    assert frames.shape == (1, 4, 16, 16, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0


def test_interrupted_command_resumes_to_the_same_weights(
    videos, trained, tmp_path, monkeypatch, capsys
):
    command = ["--data", str(videos), "--output", str(tmp_path), *SHAPE, *SCHEDULE]
    with monkeypatch.context() as patch:
        interrupt_training(patch, step=3)
        assert train.main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert weights_of(tmp_path) != weights_of(trained)
    assert train.main([*command, "--resume"]) == 0
    assert weights_of(tmp_path) == weights_of(trained)
    starts = [json.loads(line).get("start") for line in (tmp_path / "log.jsonl").open()]
    assert [start for start in starts if start is not None] == [0, 2]
    first, second = (load_file(run / "training.safetensors") for run in (trained, tmp_path))
    assert_equal_states(first, second)


@pytest.mark.parametrize(
    ("flags", "rates", "fps", "said"),
    [
        ([], (24.0, 24.0), 24.0, "the clips have 24 frames a second; generated clips play at 24"),
        (["--fps", "12"], (24.0,), 12.0, "24 frames a second; generated clips play at 12"),
        ([], (None,), 10.0, "the videos state no frame rate; generated clips play at 10"),
        (["--resume"], (24.0,), 8.0, "24 frames a second; generated clips play at 8"),
        ([], (8.0, 24.0, 24.0), 24.0, "8 (1 of 3), 24 (2 of 3); their median is 24; generated"),
    ],
)
def test_clips_play_at_the_rate_of_the_videos(trained, flags, rates, fps, said):
    settings = read_settings(["--data", "videos", "--output", str(trained), *flags])
    train._choose_fps(settings, rates)
    assert settings.fps == fps
    assert said in settings.rates


def test_rendered_clips_play_at_10_frames_a_second():
    assert read_settings(["--output", "new"]).fps == 10.0
    assert read_settings(["--output", "new", "--objective", "vdm"]).fps == 10.0
    assert read_settings(["--output", "new", "--objective", "text"]).fps is None


def test_resume_goes_on_for_more_steps(videos, trained, tmp_path):
    output = shutil.copytree(trained, tmp_path / "run")
    command = ["--data", str(videos), "--output", str(output), *SHAPE, *SCHEDULE]
    assert train.main([*command, "--resume", "--steps", "6", "--sample-every", "0"]) == 0
    assert weights_of(output) != weights_of(trained)
    assert json.loads((output / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert len(list((output / "samples").iterdir())) == 1


def test_resume_of_a_finished_run_makes_its_checkpoint_again(videos, trained, tmp_path, capsys):
    output = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(output / "checkpoint")
    command = ["--data", str(videos), "--output", str(output), *SHAPE, *SCHEDULE]
    assert train.main([*command, "--resume"]) == 0
    assert weights_of(output) == weights_of(trained)
    said = capsys.readouterr()
    assert "checkpoint was not that of the state, and has been written anew" in said.err
    assert "no step to take: 4 of 4 are done" in said.err
    assert said.out.endswith(f"generate with --model {output / 'checkpoint'}\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "trained"], "training.safetensors exists: pass --resume"),
        (["--output", "new", "--resume"], "nothing to resume"),
        (["--output", "trained", "--resume", "--seed", "5"], "of another model"),
        (["--output", "new", "--data", "nowhere"], "nowhere"),
        (["--output", "new", "--data", "empty"], "empty"),
        (["--output", "new", "--init-from", "nowhere"], "no checkpoint in nowhere"),
        (["--output", "new", "--device", "cuda"], "no CUDA device"),
        (["--output", "new", "--device", "abacus"], "abacus"),
        (["--output", "file"], "file"),
        (["--output", "new", "--steps", "0"], "steps must be at least 1"),
        (["--output", "new", "--steps", "many"], "--steps"),
        (["--output", "new", "--log-every", "0"], "--log-every must be at least 1"),
        (["--output", "new", "--sample-every", "-1"], "--sample-every"),
        (["--output", "new", "--num-frames", "0"], "--num-frames must be at least 1"),
        (["--output", "new", "--size", "18"], "--size must be a multiple of 4"),
        (["--output", "new", "--base-path", "clean", "--clean-share", "0"], "clean_share above 0"),
        (["--output", "new", "--objective", "gan"], "--objective"),
        (["--output", "new", "--lam", "1"], "--lam must be at least 0 and below 1"),
        (["--output", "new", "--fps", "0"], "--fps must be positive"),
        (["--output", "new", "--base-channels", "16"], "one per level"),
        (["--output", "new", "--residual-channels", "16,20"], "multiple of"),
        (["--output", "new", "--base-channels", "wide"], "--base-channels"),
        (["--output", "new", "--colour", "red"], "--colour"),
    ],
)
def test_wrong_usage_ends_in_one_line_and_changes_nothing(
    videos, trained, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(trained, "trained")
    Path("empty").mkdir()
    Path("file").write_text("not a folder")
    before = contents(tmp_path)
    assert train.main(["--data", str(videos), *SHAPE, *SCHEDULE, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vfengine.train: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert contents(tmp_path) == before


def test_missing_output_is_refused(capsys):
    assert train.main([]) == 2
    assert "--output" in capsys.readouterr().err


def test_diverging_training_ends_in_one_line(videos, tmp_path, capsys):
    command = ["--data", str(videos), "--output", str(tmp_path / "run"), *SHAPE, *SCHEDULE]
    assert train.main([*command, "--learning-rate", "1e30", "--gradient-clip", "1e30"]) == 1
    assert "error: the loss is not finite at step" in capsys.readouterr().err.splitlines()[-1]
