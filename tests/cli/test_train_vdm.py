"""python -m vfengine.train --objective vdm: plain video diffusion, the baseline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_train import interrupt_training, weights_of
from test_training import random_clips

from vfengine.cli import train
from vfengine.formats.checkpoint import build_network, read_config
from vfengine.media.video import write_video
from vfengine.models import vdm_config

FLAGS = [
    *("--objective", "vdm", "--num-frames", "4", "--size", "16", "--patch-size", "2"),
    *("--layers-per-block", "1,1", "--base-channels", "16,16", "--precision", "fp32"),
    *("--steps", "4", "--batch-size", "2", "--warmup", "1"),
    *("--save-every", "2", "--log-every", "2", "--sample-every", "4"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Trains on two videos of one class; --output is still to be given."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "left").mkdir()
    for i, frames in enumerate(random_clips(2)[0]):
        write_video(folder / "left" / f"{i}.webp", frames)
    return ["--data", str(folder), *FLAGS]


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory) -> Path:
    """The output of a complete run."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert train.main([*command, "--output", str(output)]) == 0
    return output


def test_command_trains_a_vdm(trained):
    assert {str(file.relative_to(trained)) for file in trained.rglob("*.*")} == {
        *("checkpoint/config.json", "checkpoint/video.safetensors", "log.jsonl"),
        *("samples/step-0000004.png", "training.safetensors"),
    }
    config = read_config(trained / "checkpoint")
    assert config.video == replace(
        vdm_config(replace(config.video, temporal_attention=(False, False))),
        block_out_channels=(16, 16),
    )
    with Image.open(trained / "samples" / "step-0000004.png") as sheet:
        assert sheet.size == (4 * 17 - 1, 17 - 1)  # one class, its clip in a row
    start, *logged = map(json.loads, (trained / "log.jsonl").read_text().splitlines())
    assert (start["objective"], start["extra_images"], start["lam"]) == ("vdm", 0, None)
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert line.keys() == {
            *("step", "video", "video_by_t", "clips_per_second", "peak_memory_mib")
        }
        assert line["video"] > 0 and len(line["video_by_t"]) == 5


def test_interrupted_command_resumes_to_the_same_weights(command, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_training(patch, step=3)
        assert train.main([*command, "--output", str(tmp_path)]) == 130
    assert weights_of(tmp_path) != weights_of(trained)
    assert train.main([*command, "--output", str(tmp_path), "--resume"]) == 0
    assert weights_of(tmp_path) == weights_of(trained)


def test_command_says_how_large_the_network_is_and_what_is_new_in_it(
    command, tiny_checkpoint, tmp_path, capsys
):
    flags = ["--init-from", str(tiny_checkpoint), "--steps", "1", "--sample-every", "0"]
    assert train.main([*command, *flags, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    size = sum(
        p.numel() for p in build_network(read_config(tmp_path / "checkpoint"), "video").parameters()
    )
    assert f"video {size / 1e6:.2f} M parameters" in said
    assert "video.mid.0.temporal.proj_out.weight" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lam", "0.5"], "--lam has no meaning for --objective vdm"),
        (["--residual-channels", "16,16"], "--residual-channels has no meaning"),
        (["--base-path", "clean"], "--base-path has no meaning"),
        (["--extra-images", "40"], "--extra-images has no meaning"),
        (["--clean-share", "0"], "--clean-share has no meaning"),
        (["--base-jitter", "0.1"], "--base-jitter has no meaning"),
        (["--base-channels", "16"], "one per level"),
        (["--size", "18"], "--size must be a multiple of 4"),
    ],
)
def test_flags_of_decomposed_models_are_refused(command, tmp_path, capsys, flags, message):
    assert train.main([*command, *flags, "--output", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vfengine.train: error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "new").exists()


def test_outputs_of_the_other_objective_are_not_resumed(command, trained, tmp_path, capsys):
    output = shutil.copytree(trained, tmp_path / "run")
    other = [*command, "--output", str(output), "--resume", "--objective", "decomposed"]
    assert train.main([*other, "--residual-channels", "16,16"]) == 2
    assert "training state of another model" in capsys.readouterr().err
    assert weights_of(output) == weights_of(trained)


def test_help_tells_the_objectives_apart(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--objective {decomposed,vdm,autoencoder,text,distill}" in text
